"""A checkpoint of ours becomes a directory in the released layout, tensor by tensor.

All names, formats and shapes follow from the model and the precision (`names.stored_as`), so the files are laid out first and filled in
the order of the layers, from blocks of the stacked arrays. Each tensor is rounded, read back and compared with its source: what a format
costs is measured on these very weights, by kind of tensor, and goes into the model card.

The embedding and the head grow with the vocabulary and are not quantised in any released layout: they are read in pieces, and only their
rounded form exists as a whole.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

from v4train.checkpoint import streaming
from v4train.core import param
from v4train.interop import ahead, importing, names, quantised, released_config, tensor_files
from v4train.model import config as config_lib
from v4train.model import transformer

PIECE_BYTES = importing.PIECE_BYTES
_DTYPES = {"fp32": np.dtype(np.float32), "bf16": quantised.BF16, "int64": np.dtype(np.int64)}


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one kind of tensor in one format."""

    kind: str
    format: names.Format
    tensors: int = 0
    nbytes: int = 0
    deviation: quantised.Deviation = dataclasses.field(default_factory=quantised.Deviation)

    def __add__(self, other: "Row") -> "Row":
        assert (self.kind, self.format) == (other.kind, other.format)
        total = self.tensors + other.tensors, self.nbytes + other.nbytes, self.deviation + other.deviation
        return Row(self.kind, self.format, *total)


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A tensor as it is stored, ``{suffix of the name: array}``, with the source's deviation."""

    slot: names.Slot
    arrays: dict[str, np.ndarray]
    deviation: quantised.Deviation


def plan(model: config_lib.ModelConfig, *, precision: names.Precision) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...]]], ...]:
    """Type and shape of every tensor: those of the released files, and those of `names.EXTRAS_STEM`.

    Raises:
        ValueError: tensors that have no form in this precision; the message lists them.
    """
    files: tuple[dict[str, tuple[np.dtype, tuple[int, ...]]], ...] = ({}, {})
    odd: list[str] = []
    for slot in names.slots(model):
        format = names.stored_as(slot, precision)
        if format == "fp4" and slot.shape[1] % quantised.FP4_GROUP:
            odd.append(f"  {slot.released}: rows of {slot.shape[1]} values")
        elif format in ("fp4", "fp8"):
            shapes = (quantised.mxfp4_shapes if format == "fp4" else quantised.fp8_shapes)((slot.shape[0], slot.shape[1]))
            codes = np.dtype(np.int8) if format == "fp4" else quantised.E4M3
            files[slot.extra][slot.released] = codes, shapes[0]
            files[slot.extra][_scale_name(slot)] = quantised.E8M0, shapes[1]
        else:
            files[slot.extra][slot.released] = _DTYPES[format], slot.shape
    if odd:
        listed = "\n".join(odd[:20]) + (f"\n  and {len(odd) - 20} more" if len(odd) > 20 else "")
        raise ValueError(
            f"{len(odd)} tensors have no FP4 form, whose groups are of {quantised.FP4_GROUP} values:\n{listed}\nExport as fp8 or bf16."
        )
    return files


def write_weights(
    reader: streaming.Reader,
    directory: pathlib.Path,
    *,
    model: config_lib.ModelConfig,
    precision: names.Precision,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    progress: importing.Progress = lambda _: None,
) -> list[Row]:
    """Writes the safetensors files, with index and digests.

    Args:
        reader: of a finished step.
        directory: exists; usually a temporary one that is renamed when all is in it.
        model: that the step is of.
        precision: number formats of the released tensors. What only our models have stays FP32.
        shard_bytes: the most bytes of tensors in a file.
        progress: is told the bytes of our arrays as they are done.

    Returns:
        A row for each kind of tensor and format.

    Raises:
        ValueError: the step is not of this model or damaged, a weight is not finite or has no form in this precision, or no space is left.
    """
    declared = param.flatten(param.declarations(transformer.Transformer(model)))
    stored = {path: importing.stored_name(path, d) for path, d in declared.items()}
    _check(reader, {stored[path]: d for path, d in declared.items()})
    writers = []
    for tensors, stem in zip(plan(model, precision=precision), (tensor_files.STEM, names.EXTRAS_STEM), strict=True):
        writers.append(tensor_files.TensorFilesWriter(directory, tensors=tensors, shard_bytes=shard_bytes, stem=stem) if tensors else None)
    rows: dict[tuple[str, str], Row] = {}
    slots = names.slots(model)
    work = (functools.partial(_encode, reader, slot, stored[slot.path], names.stored_as(slot, precision)) for slot in slots)
    for encoded in ahead.prepared(work):
        slot, format = encoded.slot, names.stored_as(encoded.slot, precision)
        for name, array in encoded.arrays.items():
            writers[slot.extra].write(name, array)
        size = sum(array.nbytes for array in encoded.arrays.values())
        row = Row(slot.kind, format, 1, size, encoded.deviation)
        rows[slot.kind, format] = rows[slot.kind, format] + row if (slot.kind, format) in rows else row
        progress(math.prod(slot.shape) * slot.dtype.itemsize)
    for writer in writers:
        if writer is not None:
            writer.finish()
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def write_config(
    directory: pathlib.Path, *, model: config_lib.ModelConfig, precision: names.Precision, tokens: released_config.TokenIds | None
) -> None:
    """Writes config.json and generation_config.json.

    Raises:
        ValueError: the model cannot be said in a config.json.
    """
    config = released_config.config_json(model, precision=precision, tokens=tokens)
    generation: dict[str, Any] = {"_from_model_config": True, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    generation |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    if model.media_tokens:
        generation["suppress_tokens"] = list(model.media_tokens)  # the head never predicts them here; elsewhere it must be told
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with the error against the source: norm of the error over norm of the source, and the largest."""
    lines = [
        "| tensors | format | number | MB | relative error (RMS) | largest error / largest value |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        d = row.deviation
        error = f"{d.relative_rms:.2e} | {d.max_error / d.max_source if d.max_source else 0.0:.2e}" if d.max_error else "exact | exact"
        lines.append(f"| {row.kind.replace('_', ' ')} | {row.format.upper()} | {row.tensors:,} | {row.nbytes / 1e6:,.1f} | {error} |")
    return "\n".join(lines)


def _check(reader: streaming.Reader, wanted: dict[str, param.Declaration]) -> None:
    expected = {name: {"shape": list(d.shape), "dtype": np.dtype(d.dtype).name} for name, d in wanted.items()}
    wrong = [
        f"  {name}: {reader.table.get(name, 'absent')}, expected {row}" for name, row in expected.items() if reader.table.get(name) != row
    ]
    if wrong:
        listed = "\n".join(wrong[:40]) + (f"\n  and {len(wrong) - 40} more" if len(wrong) > 40 else "")
        raise ValueError(f"the arrays of the checkpoint are not those of its recipe's model; {len(wrong)} differ:\n{listed}")


def _encode(reader: streaming.Reader, slot: names.Slot, stored: str, format: names.Format) -> _Encoded:
    if format in ("fp32", "bf16", "int64"):
        array, deviation = _plain(reader, slot, stored, format)
        return _Encoded(slot, {slot.released: array}, deviation)
    tensor = _tensor(reader, slot, stored)
    if format == "fp8":
        packed = quantised.fp8_quantise(tensor, name=slot.released)
        back = quantised.fp8_dequantise(packed.values, scale=packed.scale, name=slot.released)
    else:
        packed = quantised.mxfp4_pack(tensor, name=slot.released)
        back = quantised.mxfp4_unpack(packed.values, scale=packed.scale, name=slot.released)
    return _Encoded(slot, {slot.released: packed.values, _scale_name(slot): packed.scale}, quantised.compare(tensor, stored=back))


def _plain(reader: streaming.Reader, slot: names.Slot, stored: str, format: names.Format) -> tuple[np.ndarray, quantised.Deviation]:
    if math.prod(slot.shape) * 4 <= 2 * PIECE_BYTES or slot.turn == "grouped":
        return _round(slot, _tensor(reader, slot, stored), format)
    array, deviation = np.empty(slot.shape, _DTYPES[format]), quantised.Deviation()
    step = max(PIECE_BYTES // (math.prod(slot.shape[1:]) * 4), 1)
    for start in range(0, slot.shape[0], step):
        rows = slice(start, min(start + step, slot.shape[0]))
        index = (slice(None), rows) if slot.turn == "transposed" else (rows,)
        piece = reader.read(stored, (*slot.index, *index))
        array[rows], own = _round(slot, ahead.contiguous(piece.T if slot.turn == "transposed" else piece), format)
        deviation += own
    return array, deviation


def _tensor(reader: streaming.Reader, slot: names.Slot, stored: str) -> np.ndarray:
    block = reader.read(stored, slot.index)
    return ahead.contiguous(block.T) if slot.turn == "transposed" else slot.to_released(block)


def _round(slot: names.Slot, values: np.ndarray, format: names.Format) -> tuple[np.ndarray, quantised.Deviation]:
    if format == "int64":
        return values.astype(np.int64), quantised.Deviation()
    if format == "bf16":
        rounded = quantised.to_bf16(values, name=slot.released)
        return rounded, quantised.compare(values, stored=rounded)
    quantised.require_finite(values, name=slot.released)
    return values.astype(np.float32, copy=False), quantised.Deviation(values.size)


def _scale_name(slot: names.Slot) -> str:
    return f"{slot.released.removesuffix('weight')}scale"


def misread_by_transformers(model: config_lib.ModelConfig, *, precision: names.Precision) -> list[str]:
    """The FP8 matrices whose blocks `transformers` takes for others: sides above 128 that are no multiple of it.

    It divides a matrix evenly by its grid of scales (``Fp8Dequantize``, 5.23), or refuses what it cannot. No released model has such sides.
    """
    block = quantised.FP8_BLOCK[0]
    slots = [slot for slot in names.slots(model) if names.stored_as(slot, precision) == "fp8" and not slot.released.startswith("mtp.")]
    return [slot.released for slot in slots if any(size > block and size % block for size in slot.shape)]
