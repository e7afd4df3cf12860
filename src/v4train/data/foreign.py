"""What readers of other programs' token files share: documents of plain ids, without media, checksums or names.

Such files do not say which tokenizer made them. The recipe does (`tokenizer_fingerprint` of the source), and every piece is checked as
it is read: an id outside of the vocabulary, or a placeholder that no patch or frame belongs to, makes it a bad record.
"""

import functools
import hashlib
import pathlib

import numpy as np

from v4train.data import document as document_lib
from v4train.data import shards as shards_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

HISTOGRAM_TOKENS = 2**24
SAMPLES = 64
_SAMPLE_BYTES = 2**16


class PlainTokens:
    """A `store.Store` without media; a format adds `fetch`, `load` and `where`."""

    whole_documents = False
    image_patch = 0

    def __init__(self, path: pathlib.Path, *, lengths: np.ndarray, tokenizer: tokenizer_lib.Tokenizer, content: str):
        """Makes the index.

        Args:
            path: for messages.
            lengths: ``i64[documents]``, tokens.
            tokenizer: that the ids are from.
            content: digest of what is on disk.

        Raises:
            ValueError: no documents, or one of 2^32 tokens or more.
        """
        if not len(lengths):
            raise ValueError(f"data source {path}: no documents; leave it out or name the right file")
        if int(lengths.max()) >= 2**32:
            raise ValueError(f"data source {path}: a document has {int(lengths.max()):,} tokens; the most is 2^32 - 1: split it")
        self.path = path
        self.documents = np.zeros(len(lengths), store_lib.ENTRY)
        self.documents["key"] = hash_of_numbers(len(lengths))
        self.documents["tokens"] = lengths
        self.spans = np.zeros(0, document_lib.SPAN)
        self.span_start = np.zeros(len(lengths) + 1, np.int64)
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self._vocab_size, self._never = tokenizer.vocab_size, [i for i in (tokenizer.image, tokenizer.audio) if i >= 0]
        self._histogram = functools.cache(self._count_ids)
        identity = f"{type(self).__name__} {len(lengths)} {int(lengths.sum())} {content} {tokenizer.fingerprint}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.documents)

    def spans_of(self, i: int) -> np.ndarray:
        """None: no media."""
        return self.spans

    def fetch(self, i: int, *, start: int, stop: int) -> np.ndarray:
        """Ids ``start:stop`` of document ``i``, as they are stored; raises `DamagedRecordError` or `OSError`."""
        raise NotImplementedError

    def read(self, i: int) -> document_lib.Document:
        """Document ``i``, checked.

        Raises:
            DamagedRecordError: it cannot be read, or its ids cannot be.
        """
        tokens = np.empty(int(self.documents["tokens"][i]), np.int32)
        for error in self.read_pieces(store_lib.Pieces.of([(i, 0, len(tokens))]), out=tokens).values():
            raise error
        return document_lib.Document(key=str(i), tokens=tokens.view(np.uint32))

    def read_pieces(self, pieces: store_lib.Pieces, *, out: np.ndarray) -> dict[int, document_lib.DamagedRecordError]:
        """Tokens of pieces, one after another, into ``out i32[sum of lengths]``; which pieces failed, and why."""
        bad, done = {}, 0
        for i, (document, start, stop) in enumerate(zip(*(column.tolist() for column in pieces), strict=True)):
            part = out[done : done + stop - start]
            done += stop - start
            try:
                ids = self.fetch(document, start=start, stop=stop)
                part[...] = ids
                if ids.dtype.itemsize > 4 and not np.array_equal(part, ids):
                    raise document_lib.DamagedRecordError("an id does not fit into 32 bits")
            except (document_lib.DamagedRecordError, OSError) as error:
                bad[i], part[...] = shards_lib.unreadable(error), 0
        if len(out) and (int(out.view(np.uint32).max()) >= self._vocab_size or any(bool((out == i).any()) for i in self._never)):
            bad |= self._bad_ids(pieces, out)
        return bad

    def _bad_ids(self, pieces: store_lib.Pieces, out: np.ndarray) -> dict[int, document_lib.DamagedRecordError]:
        bad, edges = {}, np.cumsum(pieces.stops - pieces.starts)
        for i, part in enumerate(np.split(out, edges[:-1])):
            wrong = (part.view(np.uint32) >= self._vocab_size) | np.isin(part, self._never)
            if wrong.any():
                at = int(wrong.argmax())
                what = "a media placeholder" if part[at] in self._never else f"outside the vocabulary of {self._vocab_size}"
                bad[i] = document_lib.DamagedRecordError(f"id {part[at]} of token {int(pieces.starts[i]) + at} is {what}")
        return bad

    def read_span(self, i: int, k: int, *, skip: int, values: np.ndarray, xy: np.ndarray | None) -> None:
        """Never called: no document has a span."""
        raise AssertionError("plain tokens have no media")

    @property
    def histogram(self) -> np.ndarray:
        """``i64[vocab]``, occurrences of each id: from some 2^24 tokens of evenly spread documents, or all if there are fewer."""
        return self._histogram()

    def _count_ids(self) -> np.ndarray:
        lengths = self.documents["tokens"].astype(np.int64)
        total = int(lengths.sum())
        counts, counted = np.zeros(self._vocab_size, np.int64), 0
        chosen = np.unique(np.linspace(0, len(self) - 1, max(1, int(len(self) * min(1.0, HISTOGRAM_TOKENS / total)))).astype(np.int64))
        for i in chosen.tolist():
            tokens = np.empty(min(int(lengths[i]), HISTOGRAM_TOKENS), np.int32)
            if not self.read_pieces(store_lib.Pieces.of([(i, 0, len(tokens))]), out=tokens):
                counts += np.bincount(tokens, minlength=self._vocab_size)
                counted += len(tokens)
        return np.rint(counts * (total / max(1, counted))).astype(np.int64)


def hash_of_numbers(n: int) -> np.ndarray:
    """``u64[n]``: the finaliser of splitmix64, as a key for documents that have no name."""
    with np.errstate(over="ignore"):
        x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sampled_digest(path: pathlib.Path, *, samples: int = SAMPLES) -> bytes:
    """Of a file's size and of some blocks of 64 kB, evenly spread, first and last included."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for at in np.unique(np.linspace(0, max(0, size - _SAMPLE_BYTES), samples).astype(np.int64)).tolist():
            file.seek(at)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
