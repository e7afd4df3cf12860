"""The arrays of a step in blocks, for states that are larger than the memory: conversions write and read them matrix by matrix.

`arrays` moves whole arrays between devices and disk. A conversion has no devices, and its arrays are stacked over layers and experts: the
routed experts of V4-Flash are three arrays of 690 GB. What this file writes is what Orbax would write (OCDBT, and Zarr 3 within it, with
the same metadata), so `restore` reads it onto any mesh without knowing who wrote it.

**Chunks.** A chunk is one matrix, or a part of it along its longer axis where a matrix exceeds `arrays.CHUNK_BYTES`; leading axes (layers,
experts, groups) are never joined in one. `arrays` cuts large arrays likewise. So a block of whole chunks is read without reading its
neighbours, and written without reading at all.

**Memory.** OCDBT keeps what is written in memory until it is committed, and each commit writes the changed nodes of its B-tree anew. One
commit per block would write a quadratic amount of nodes; one for everything would hold everything. `_IN_FLIGHT_BYTES` of blocks go
together, and nodes are small, so that a commit touches few of them.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from v4train.checkpoint import arrays, integrity, metadata, step_directory

_IN_FLIGHT_BYTES = 160 * 2**20
_CACHE_BYTES = 192 * 2**20
_DATA_FILE_BYTES = 2**30
_NODE_BYTES = 2**18

Index = tuple[int | slice, ...]
"""A block of an array: numbers for leading axes, slices for the rest."""


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """One matrix, cut along its longer axis to `arrays.CHUNK_BYTES`; shorter arrays are one chunk."""
    matrix = shape[-2:]
    if not matrix:
        return ()
    axis = int(np.argmax(matrix))
    other = math.prod(matrix) // max(matrix[axis], 1)
    most = max(arrays.CHUNK_BYTES // max(other * dtype.itemsize, 1), 1)
    chunk = [1] * (len(shape) - len(matrix)) + list(matrix)
    chunk[len(shape) - len(matrix) + axis] = min(matrix[axis], most)
    return tuple(chunk)


@contextlib.contextmanager
def new_step(directory: pathlib.Path, *, step: int, table: arrays.Table, values: dict) -> Iterator["Writer"]:
    """Writes a step that no training has made: yields the writer of its arrays, and publishes the step when the caller is done.

    Args:
        directory: of the checkpoints; made if it does not exist. Nobody else may write to it.
        step: its number.
        table: shape and type of every array.
        values: the step's metadata, as `Manager.save` takes them.

    Raises:
        ValueError: the disk has not enough room, or ``values`` would not come back from JSON as they are.
        OSError: the disk is full, or failed; nothing is left of the step.
    """
    metadata.check_plain(values)
    directory.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(row["shape"]) * np.dtype(row["dtype"]).itemsize for row in table.values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"{directory}: the arrays need {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; make room or use another disk"
        )
    temporary = step_directory.temporary_path(directory, step=step)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / step_directory.ARRAYS).mkdir(parents=True)
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, temporary, ignore_errors=True)
        writer = Writer(temporary / step_directory.ARRAYS, table=table)
        cleaning.callback(writer.abandon)
        yield writer
        writer.finish()
        content = {"format": 1, "step": step, "arrays": table, "metadata": values}
        integrity.write_json(temporary / step_directory.METADATA, content)
        integrity.write_manifest(temporary, files=integrity.digest_files(temporary))
        step_directory.publish(directory, step=step)


class Writer:
    """Writes the arrays of one step in blocks, in any order. Every element must be written once.

    Args:
        directory: empty; the ``arrays`` folder of a step that is being written.
        table: shape and type of every array.

    Attributes:
        chunks: name -> shape of a chunk. Blocks that consist of whole chunks are written without reading.

    Raises:
        OSError: the disk is full, or failed.
    """

    def __init__(self, directory: pathlib.Path, *, table: arrays.Table):
        # An array without elements has no chunks; see `arrays.start_write`.
        self._table = {name: row for name, row in table.items() if math.prod(row["shape"])}
        self._directory = directory
        self.chunks = {name: chunk_shape(tuple(row["shape"]), np.dtype(row["dtype"])) for name, row in self._table.items()}
        context = _context()
        # All at once, so that they are committed together.
        opening = {name: _create(directory, name, row, self.chunks[name], context) for name, row in self._table.items()}
        self._arrays = {name: _explain(future.result) for name, future in opening.items()}
        self._writes: list[Any] = []
        self._bytes = 0
        self._missing = {name: math.prod(row["shape"]) for name, row in self._table.items()}

    def write(self, name: str, index: Index, block: np.ndarray) -> None:
        """Writes one block; returns when it is copied, and sometimes later.

        Raises:
            OSError: the disk is full, or failed.
        """
        row = self._table[name]
        assert block.dtype == np.dtype(row["dtype"]), f"{name} is {row['dtype']}, the block {block.dtype}"
        target = self._arrays[name][index]
        assert target.shape == block.shape, f"{name}{list(index)} is {target.shape}, the block {block.shape}"
        writes = _explain(lambda: target.write(np.asarray(block, order="C")))
        self._writes.append(writes)
        self._missing[name] -= block.size
        self._bytes += block.nbytes
        if self._bytes >= _IN_FLIGHT_BYTES:
            self._flush()

    def finish(self) -> None:
        """Completes the arrays."""
        incomplete = [name for name, missing in self._missing.items() if missing]
        assert not incomplete, f"not written completely: {incomplete[:8]}"
        self._flush()
        integrity.write_json(self._directory / "_METADATA", arrays.tree_metadata(self._table))

    def _flush(self) -> None:
        writes, self._writes, self._bytes = self._writes, [], 0
        # All of them, also after an error: a write that is still under way would put files into a directory that is being removed.
        failures = [failure for write in writes if (failure := write.exception()) is not None]
        if failures:
            _explain(lambda: _raise(failures[0]))

    def abandon(self) -> None:
        """Waits for the writes under way, whatever becomes of them."""
        with contextlib.suppress(OSError):
            self._flush()


class Reader:
    """Reads blocks of the arrays of one finished step.

    Args:
        step: directory of the step.

    Attributes:
        table: shape and type of every array.
    """

    def __init__(self, step: pathlib.Path):
        self.table: arrays.Table = json.loads((step / step_directory.METADATA).read_bytes())["arrays"]
        self._directory = step / step_directory.ARRAYS
        self._context = _context()
        self._open: dict[str, Any] = {}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """One block; all of the array by default.

        Raises:
            ValueError: the arrays on the disk are not what the step says, or cannot be read.
        """
        row = self.table[name]
        if not math.prod(row["shape"]):
            return np.zeros(row["shape"], row["dtype"])[index]
        try:
            if name not in self._open:
                self._open[name] = _existing(self._directory, name, self._context)
            return np.asarray(self._open[name][index].read().result())
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self._directory}: the array {name} cannot be read: {_first_line(error)}") from None


def _context() -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "file_io_concurrency": {"limit": 4}})


def _store(directory: pathlib.Path, name: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory.absolute()}/"}, "path": f"{name}/"}


def _existing(directory: pathlib.Path, name: str, context: Any) -> Any:
    import tensorstore as ts

    return ts.open({"driver": "zarr3", "kvstore": _store(directory, name)}, read=True, context=context).result()


def _create(directory: pathlib.Path, name: str, row: dict[str, Any], chunk: tuple[int, ...], context: Any) -> Any:
    import tensorstore as ts

    inner = {
        "chunk_shape": list(chunk),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": _NODE_BYTES, "manifest_kind": "single"}
    spec = {
        "driver": "zarr3",
        "kvstore": _store(directory, name) | {"config": config, "assume_config": True, "target_data_file_size": _DATA_FILE_BYTES},
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(row["shape"]),
            "data_type": row["dtype"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        },
    }
    return ts.open(spec, create=True, context=context)


def _explain(action: Any) -> Any:
    """TensorStore tells a failure of the system as the text of a ValueError: gives it its type back."""
    try:
        return action()
    except ValueError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from None
        raise OSError(errno.EIO, _first_line(error)) from None


def _raise(error: BaseException) -> None:
    raise error


def _first_line(error: Exception) -> str:
    return str(error).partition(" [source locations=")[0]
