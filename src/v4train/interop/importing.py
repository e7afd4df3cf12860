"""A released checkpoint becomes step 0 of a run of ours, tensor by tensor.

The arrays are those that a training run would save for the same model, without an optimizer: ``params`` (trained), ``buffers`` (router
biases, hash tables), and the counters of steps at zero. One tensor is read, dequantised, turned, and written to its place in the stacked
array; the next ones are prepared by other threads meanwhile. So the memory is that of a few tensors and what `streaming` has in flight. The
embedding and the head, the only matrices that grow with the vocabulary, go in pieces of rows.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from v4train.checkpoint import arrays, streaming
from v4train.core import param
from v4train.interop import ahead, matching, names, quantised
from v4train.interop import released as released_lib
from v4train.model import config as config_lib
from v4train.model import transformer

PIECE_BYTES = 128 * 2**20
"""Matrices above twice this, in fp32, are converted in pieces of rows, where their number format allows it."""

Piece = tuple[names.Slot, streaming.Index, np.ndarray]
Progress = Callable[[int], None]
"""Is told the bytes of each tensor that is done."""


def stored_name(path: str, declaration: param.Declaration) -> str:
    """The name of a parameter's array in a checkpoint."""
    return f"{'params' if declaration.trained else 'buffers'}/{path}"


def state_table(model: config_lib.ModelConfig) -> arrays.Table:
    """The arrays of a state of this model that has no optimizer."""
    declared = param.flatten(param.declarations(transformer.Transformer(model)))
    table = {stored_name(path, d): {"shape": list(d.shape), "dtype": np.dtype(d.dtype).name} for path, d in declared.items()}
    counters = {name: {"shape": [], "dtype": "int32"} for name in ("skipped", "step")}
    return dict(sorted((table | counters).items()))


def write_step(released: released_lib.Released, directory: pathlib.Path, *, values: dict, progress: Progress = lambda _: None) -> None:
    """Writes step 0.

    Args:
        released: what is imported.
        directory: of the checkpoints to be; nobody else may write to it.
        values: metadata of the step.
        progress: is told the bytes of our arrays as they are done.

    Raises:
        ValueError: a tensor cannot be used (not finite, damaged), or the disk has not enough room.
        OSError: the disk is full, or failed.
    """
    declared = param.flatten(param.declarations(transformer.Transformer(released.model)))
    stored = {path: stored_name(path, d) for path, d in declared.items()}
    with streaming.new_step(directory, step=0, table=state_table(released.model), values=values) as writer:
        for slot, index, block in ahead.prepared(_pieces(released, writer, stored)):
            writer.write(stored[slot.path], index, block)
            progress(block.nbytes)
        for counter in ("skipped", "step"):
            writer.write(counter, (), np.zeros((), np.int32))


def step_bytes(model: config_lib.ModelConfig) -> int:
    """The size of the step that `write_step` writes."""
    return sum(math.prod(row["shape"]) * np.dtype(row["dtype"]).itemsize for row in state_table(model).values())


def _pieces(released: released_lib.Released, writer: streaming.Writer, stored: dict[str, str]) -> Iterator[Callable[[], Piece]]:
    for slot in released.slots:
        source = released.sources.get(slot.released)
        if source is None or not _is_cut(slot, source):
            yield functools.partial(_whole, released, slot)
            continue
        # Their rows are our rows, or our columns where the matrix is turned; pieces are whole chunks, which are written without reading.
        axis = int(slot.turn == "transposed")
        chunk = writer.chunks[stored[slot.path]][len(slot.index) + axis]
        rows = max(PIECE_BYTES // (slot.shape[1] * 4) // chunk, 1) * chunk
        for start in range(0, slot.shape[0], rows):
            part = slice(start, min(start + rows, slot.shape[0]))
            yield functools.partial(_piece, released, slot, source, part)


def _whole(released: released_lib.Released, slot: names.Slot) -> Piece:
    return slot, slot.index, ahead.contiguous(released.block(slot))


def _is_cut(slot: names.Slot, source: matching.Source) -> bool:
    large = not slot.extra and len(slot.shape) == 2 and math.prod(slot.shape) * 4 > 2 * PIECE_BYTES
    return large and slot.turn != "grouped" and source.format == "plain" and source.part is None


def _piece(released: released_lib.Released, slot: names.Slot, source: matching.Source, rows: slice) -> Piece:
    values = released.files.read(source.name, rows=rows).astype(slot.dtype)
    quantised.require_finite(values, name=source.name)
    if slot.turn == "transposed":
        return slot, (*slot.index, slice(None), rows), ahead.contiguous(values.T)
    return slot, (*slot.index, rows), values
