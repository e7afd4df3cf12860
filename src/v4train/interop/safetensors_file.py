"""One safetensors file: its header, read with distrust, and written as the library writes it.

::

    u64      length n of the header, little-endian
    n bytes  JSON: {"__metadata__": {..}, "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..}, padded with spaces
    the rest the tensors, little-endian, row-major, without gaps; offsets count from here

The `safetensors` package reads such files through a memory map, of which every page that was touched counts as memory of the process, and
writes them from a dictionary that holds all tensors: both need the memory of the model. So headers are handled here, and `tensor_files`
reads and writes bytes at their offsets. What the package writes is the same, byte for byte (tests compare), including its order, widest
dtype first, which keeps every tensor aligned: PyTorch refuses to view bytes at an odd offset as wider numbers.

A reader that trusts the header would hand out other tensors' bytes, or zeros, as weights. So whatever the library refuses is refused
here too, and every problem of a file is reported, not the first.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("U64", np.uint64),
        ("I64", np.int64),
        ("F64", np.float64),
        ("C64", np.complex64),
        ("F32", np.float32),
        ("U32", np.uint32),
        ("I32", np.int32),
        ("BF16", ml_dtypes.bfloat16),
        ("F16", np.float16),
        ("U16", np.uint16),
        ("I16", np.int16),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("I8", np.int8),
        ("U8", np.uint8),
        ("BOOL", np.bool_),
    )
}
"""By the names of the format, in the order of the tensors within a file."""
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# The library's own limit; a longer "header" is the beginning of some other kind of file.
_HEADER_LIMIT = 100_000_000
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: ``nbytes`` at ``offset`` from the beginning of ``file``, a name within the directory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The tensors of a file, and everything that is wrong with it; where something is, the tensors are not to be used."""

    tensors: dict[str, TensorInfo]
    problems: list[str]


def read_header(path: pathlib.Path) -> Header:
    """Reads and checks the header of a file; what is wrong, also with the operating system, is returned and not raised."""
    file = path.name
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if len(start) < 8:
                return Header({}, [f"{file} is no safetensors file or was truncated: it has {size} bytes"])
            (length,) = struct.unpack("<Q", start)
            if 8 + length > size or length > _HEADER_LIMIT:
                return Header({}, [f"{file} is no safetensors file or was truncated: of a header of {length} bytes, {size - 8} are there"])
            text = stream.read(length)
    except FileNotFoundError:
        return Header({}, [f"{file} is missing"])
    except OSError as error:
        return Header({}, [f"{file} cannot be read: {error.strerror}"])
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        return Header({}, [f"{file} is no safetensors file or was damaged: its header is not JSON ({error})"])
    if not isinstance(entries, dict):
        return Header({}, [f"{file} is no safetensors file: its header is a {type(entries).__name__}, not a table of tensors"])
    return _checked(entries, file=file, first=8 + length, size=size)


def encode_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and the offset of each tensor from there on (so without the header).

    Args:
        tensors: dtype and shape by name, in any order.
    """
    order = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    entries: dict[str, dict] = {_METADATA: {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (order[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _checked(entries: dict, *, file: str, first: int, size: int) -> Header:
    tensors, problems = {}, []
    for name, entry in entries.items():
        if name != _METADATA:
            info = _tensor(entry, file=file, first=first)
            if isinstance(info, str):
                problems.append(f"{file}: {name} {info}")
            else:
                tensors[name] = info
    if problems:  # sizes that are not known leave holes that mean nothing
        return Header(tensors, problems)
    end, last = first, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            problems.append(f"{file}: {name} overlaps {last}" if last else f"{file}: {name} begins before the data")
        elif info.offset > end:
            problems.append(f"{file}: {info.offset - end} bytes before {name} belong to no tensor")
        if info.offset + info.nbytes >= end:
            end, last = info.offset + info.nbytes, name
    if end > size:
        problems.append(f"{file} was truncated: its header describes {end} bytes, and it has {size}")
    elif end < size and not problems:
        problems.append(f"{file}: {size - end} bytes at its end belong to no tensor")
    return Header(tensors, problems)


def _tensor(entry: object, *, file: str, first: int) -> TensorInfo | str:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"is not described by dtype, shape and data_offsets but by {entry!r}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}"
    if not _are_counts(shape):
        return f"has the shape {shape!r}, which is no list of sizes"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the offsets {offsets!r}, which are no begin and end"
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != offsets[1] - offsets[0]:
        return f"has {offsets[1] - offsets[0]} bytes, but {dtype} {shape} has {nbytes}"
    return TensorInfo(DTYPES[dtype], tuple(shape), file, first + offsets[0], nbytes)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError("twice: " + ", ".join(sorted({name for name in names if names.count(name) > 1})))
    return table
