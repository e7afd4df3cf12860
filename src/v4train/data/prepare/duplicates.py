"""Which documents are exact copies of an earlier one, over a corpus whose hashes do not fit into memory.

Each part has 16 bytes for every document. The hashes are dealt into buckets by their highest bits, so that equal ones are in the same
bucket; a bucket at a time is sorted, stably, so that of equal hashes the first in the order of the tasks is kept. Memory is that
of one bucket, whatever the corpus; the hashes are read once a bucket. The marks are files of one byte a document, beside the
hashes. (Rejected: a set of all hashes, some 100 bytes each; and a Bloom filter, which would drop documents that are no copies.)

128 bits of BLAKE2b: among 10^12 documents the chance of one false match is 10^-15.
"""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from v4train.data.prepare import part as part_lib

BUCKET = 2**24
"""Hashes that are sorted at a time: about 1 GB."""


def mark(parts: Sequence[pathlib.Path], *, bucket: int = BUCKET) -> list[int]:
    """Writes `part.DROP` into each part, and returns how many documents of each are copies."""
    lengths = mark_none(parts)
    bits = max(0, (-(-sum(lengths) // bucket) - 1).bit_length())
    counts = [0] * len(parts)
    for number in range(2**bits):
        for i, copies in _copies(parts, number=number, bits=bits):
            counts[i] += len(copies)
            marks = np.load(parts[i] / part_lib.DROP, mmap_mode="r+")
            marks[copies] = True
            marks.flush()
    return counts


def mark_none(parts: Sequence[pathlib.Path]) -> list[int]:
    """Writes a `part.DROP` without marks into each part; how many documents each has."""
    lengths = [(path / part_lib.CONTENTS).stat().st_size // part_lib.CONTENT.itemsize for path in parts]
    for path, length in zip(parts, lengths, strict=True):
        np.save(path / part_lib.DROP, np.zeros(length, np.bool_))
    return lengths


def _copies(parts: Sequence[pathlib.Path], *, number: int, bits: int) -> Iterator[tuple[int, np.ndarray]]:
    """Part and numbers of documents that are copies, of one bucket."""
    values, where = [np.zeros(0, part_lib.CONTENT)], [np.zeros((2, 0), np.int64)]
    for i, path in enumerate(parts):
        hashes = np.fromfile(path / part_lib.CONTENTS, part_lib.CONTENT)
        inside = np.flatnonzero(hashes["high"] >> np.uint64(64 - bits) == number) if bits else np.arange(len(hashes))
        values.append(hashes[inside])
        where.append(np.stack([np.full(len(inside), i, np.int64), inside]))
    found, places = np.concatenate(values), np.concatenate(where, axis=1)
    order = np.lexsort((found["low"], found["high"]))
    ordered = found[order]
    copies = places[:, order[1:][ordered[1:] == ordered[:-1]]]
    for i in np.unique(copies[0]).tolist():
        yield i, np.sort(copies[1, copies[0] == i])
