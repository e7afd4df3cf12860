"""Megatron-LM's ``.bin/.idx`` read as it is: a `store.Store` over somebody's finished token files.

``NAME.bin`` holds nothing but token ids. ``NAME.idx`` (version 1, little endian) says where they are:

    9 bytes   "MMIDIDX" and two zero bytes
    u64       version, 1
    u8        dtype of the ids: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16 (floats are refused)
    u64       number of sequences
    u64       number of document marks
    i32[...]  tokens of each sequence
    i64[...]  first byte of each sequence in the .bin
    i64[...]  document marks: the first sequence of each document, and at last the number of sequences

A document is what lies between two marks; its sequences (sentences, in older corpora) are joined, and an empty one is left out. Where the
marks are no ascending list over the sequences, each sequence is a document.

**Damage.** The format has no checksums: a flipped bit in an id is seen only if the id leaves the vocabulary. What can be seen becomes
padding when it is met: ids outside of the vocabulary, a pointer behind the end of the file, a shortened file, a placeholder of media
(which no patch belongs to). A length that is negative or that the whole file could not hold is no length at all: such a document
counts as one token, which is always bad, so that it is reported and not forgotten.

**Fingerprint.** Sizes, the digest of the ``.idx`` (of its first and last 128 MB if it is larger) and of 64 blocks of 64 kB, evenly spread
over the ``.bin``: another corpus, another order and most other tokenisations are noticed; a change of a few tokens is not.

**Held out** are documents by the hash of their number: the format has no names.
"""

import hashlib
import os
import pathlib
import struct
from collections.abc import Sequence

import numpy as np

from v4train.data import document as document_lib
from v4train.data import foreign
from v4train.data import shards as shards_lib
from v4train.data import tokenizer as tokenizer_lib

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")
_DIGEST_BYTES = 2**27


class MegatronStore(foreign.PlainTokens):
    """A ``.bin/.idx`` pair, opened for reading."""

    def __init__(self, path: str | os.PathLike, *, tokenizer: tokenizer_lib.Tokenizer):
        """Opens the pair.

        Args:
            path: of either file, or without suffix.
            tokenizer: that the ids are from.

        Raises:
            ValueError: a file that is missing or not of the format, or no documents.
        """
        stem = pathlib.Path(path)
        stem = stem.with_suffix("") if stem.suffix in (".bin", ".idx") else stem
        self._bin, idx = (stem.with_name(stem.name + suffix) for suffix in (".bin", ".idx"))
        for file in (idx, self._bin):
            if not file.is_file():
                raise ValueError(f"Megatron data {path}: {file} is missing; a data set is the pair NAME.bin and NAME.idx")
        content = np.memmap(idx, np.uint8, "r").view(np.ndarray) if idx.stat().st_size else np.zeros(0, np.uint8)
        self._dtype, sizes, pointers, marks = _parse(content, path=idx)
        self._size = self._bin.stat().st_size
        first, last = _documents(marks, sequences=len(sizes))
        lengths, broken = _lengths(sizes, pointers, first, last, bytes_in_file=self._size, width=self._dtype.itemsize)
        kept = np.flatnonzero((lengths > 0) | broken)
        self._first, self._at, self._broken = first[kept], pointers[first[kept]], broken[kept]
        digest = hashlib.sha256(content[:_DIGEST_BYTES].data)
        digest.update(content[max(_DIGEST_BYTES, len(content) - _DIGEST_BYTES) :].data)
        digest.update(foreign.sampled_digest(self._bin))
        super().__init__(stem, lengths=np.where(broken, 1, lengths)[kept], tokenizer=tokenizer, content=digest.hexdigest())
        self._files = shards_lib.Files([self._bin])

    def where(self, i: int) -> str:
        """The place of document ``i`` on disk, for messages."""
        return f"{self._bin.name}, byte {int(self._at[i])} (sequence {int(self._first[i])})"

    def load(self, documents: Sequence[int]) -> None:
        """Nothing: pieces are read by themselves."""

    def fetch(self, i: int, *, start: int, stop: int) -> np.ndarray:
        """Ids ``start:stop`` of document ``i``, as they are stored.

        Raises:
            DamagedRecordError: they are not in the file, or nobody knows where.
            OSError: the disk's own.
        """
        if self._broken[i]:
            raise document_lib.DamagedRecordError("its length or place in the .idx cannot be")
        width, at = self._dtype.itemsize, int(self._at[i])
        ids = np.empty(stop - start, self._dtype)
        if at < 0:
            raise document_lib.DamagedRecordError(f"its pointer in the .idx is {at}")
        self._files[0].read((ids,), at=at + start * width, size=ids.nbytes)
        return ids


def _parse(content: np.ndarray, *, path: pathlib.Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Dtype of the ids, sizes, pointers, document marks."""
    if len(content) < _HEADER.size or not content[:9].tobytes() == MAGIC:
        raise ValueError(f"Megatron data {path}: not an index of `.bin/.idx` (it does not begin with MMIDIDX); name the right file")
    _, version, code, sequences, marks = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version != 1:
        raise ValueError(f"Megatron data {path}: version {version}, this program reads 1; write the data again with a current Megatron")
    if code not in DTYPES:
        raise ValueError(f"Megatron data {path}: dtype code {code}; ids are integers, codes {', '.join(map(str, DTYPES))}")
    needed = _HEADER.size + 12 * sequences + 8 * marks  # multimodal files have a byte a sequence behind that
    if needed > len(content):
        raise ValueError(f"Megatron data {path}: {len(content)} bytes, but its {sequences} sequences need {needed}; copy it again")
    sizes, rest = np.split(content[_HEADER.size : needed], [4 * sequences])
    pointers, document_marks = np.split(rest, [8 * sequences])
    return np.dtype(DTYPES[code]), sizes.view("<i4"), pointers.view("<i8"), document_marks.view("<i8")


def _documents(marks: np.ndarray, *, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """First sequence of each document, and the one behind its last."""
    good = len(marks) > 1 and marks[0] == 0 and marks[-1] == sequences and bool((np.diff(marks) >= 0).all())
    edges = marks if good else np.arange(sequences + 1)
    edges = edges[np.concatenate([[True], np.diff(edges) > 0])]
    return edges[:-1], edges[1:]


def _lengths(
    sizes: np.ndarray, pointers: np.ndarray, first: np.ndarray, last: np.ndarray, *, bytes_in_file: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """``i64[documents]`` tokens, and which documents have no believable length: negative, too large, or sequences that lie apart."""
    impossible = (sizes < 0) | (sizes.astype(np.int64) * width > bytes_in_file)
    starts, total = np.concatenate([[0], np.cumsum(impossible)]), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    broken, lengths = starts[last] > starts[first], total[last] - total[first]
    several = np.flatnonzero((last - first > 1) & ~broken)
    # Between neighbours that are not of one document, anything may lie.
    apart = np.concatenate([pointers[1:] != pointers[:-1] + sizes[:-1].astype(np.int64) * width, [False]]) if len(several) else None
    if apart is not None:
        gaps = np.concatenate([[0], np.cumsum(apart)])
        broken[several] |= gaps[last[several] - 1] > gaps[first[several]]
    return lengths, broken
