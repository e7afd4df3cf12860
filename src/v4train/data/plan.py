"""The pack plan: which tokens of which documents make up row i.

The documents of an epoch are permuted and thought of as one long stream; rows are cut out of it, S tokens each. Three rules move a cut
forward from "S tokens further on":

* a cut never falls inside an *atom*: a media span, or, with ``whole_documents``, a document (one longer than S is cut like text);
* a row never holds more patches or audio frames than its budgets P and A, because they are the sizes of the batch's arrays;
* rows do not run across the end of a *block*.

What is missing to S is padding. A block is as many epochs as give about 256 rows (one, except for tiny stores), each with its own
permutation, so that the padding at its end is negligible; one epoch follows another inside a row without a seam.

Everything is a function of (index, S, P, A, seed, packing), never of what was read before: ``row(i)`` is two binary searches. A
block's cuts are an ``i64`` array (text: ``arange``; with media a few microseconds a row, once), and only the latest blocks are kept.
With media, the number of rows of a block is known only when it is planned: to find row i, all blocks before it are planned once
(a few microseconds a row, so a resume a million rows in costs seconds); text is closed form. A continued document keeps its true
positions. Memory is about 40 bytes a document; a store of more than some 10^8 documents should be split into several.

Rejected: iterator packers (concat-then-split, first-fit), whose state must be saved, depends on the number of workers, and in grain
loses or shifts media; best-fit bins, which need a window of rows in memory to save one or two per cent of padding.
"""

import bisect
import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from v4train.data import document as document_lib
from v4train.data import store as store_lib

VERSION = 1  # goes into fingerprints: change it with any change to which tokens a row holds
_BLOCK_ROWS = 256


class Piece(NamedTuple):
    """Tokens ``start:stop`` of a document of the store."""

    document: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows are cut: their length S, their budgets P and A, the seed of the order, and what may be cut."""

    sequence_length: int
    max_patches: int
    max_audio_frames: int
    seed: int
    policy: Literal["cut_text", "whole_documents"] = "cut_text"


@dataclasses.dataclass(frozen=True)
class Block:
    """Some epochs, cut into rows.

    Attributes:
        documents: ``i64[n]``, the store's document at each place of the stream.
        starts: ``i64[n + 1]``, where each begins in the stream.
        cuts: ``i64[rows + 1]``; row ``i`` is the stream's ``cuts[i]:cuts[i + 1]``.
    """

    documents: np.ndarray
    starts: np.ndarray
    cuts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.cuts) - 1

    def row(self, i: int) -> list[Piece]:
        begin, end = int(self.cuts[i]), int(self.cuts[i + 1])
        pieces, place = [], int(np.searchsorted(self.starts, begin, side="right")) - 1
        while begin < end:
            start, stop = int(self.starts[place]), int(self.starts[place + 1])
            pieces.append(Piece(int(self.documents[place]), begin - start, min(end, stop) - start))
            begin, place = stop, place + 1
        return pieces


def permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A random order of ``range(n)``, ``i64[n]``, the same on every machine and numpy (whose own generators may change).

    Numbers are sorted by a 64-bit hash (the finaliser of splitmix64) of number, seed and epoch.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(epoch))
        return np.argsort(_mix(np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Plan:
    """The endless sequence of rows of one source. Thread-safe.

    Attributes:
        epoch_tokens: tokens of the documents, once.
        block_epochs: epochs that are planned together.
    """

    def __init__(self, store: store_lib.TokenStore, *, documents: np.ndarray, packing: Packing):
        """Plans over a subset of a store.

        Args:
            store: whose index is used; no document is read.
            documents: ``i64[n]`` numbers of the documents to use.
            packing: how to cut.

        Raises:
            ValueError: no documents, or a media span that no row can hold.
        """
        if not len(documents):
            raise ValueError(f"data store {store.path}: no documents in this split; change `holdout` or use a larger store")
        self._store, self._packing, self._documents = store, packing, documents
        self._lengths = store.documents["tokens"][documents].astype(np.int64)
        self._has_media = bool(store.documents["spans"][documents].any())
        if self._has_media:
            self._check_spans()
        self.epoch_tokens = int(self._lengths.sum())
        self.block_epochs = max(1, math.ceil(_BLOCK_ROWS * packing.sequence_length / self.epoch_tokens))
        self._first_row = [0]
        self._lock = threading.Lock()
        self._block = functools.lru_cache(maxsize=3)(self._plan_block)

    def _check_spans(self) -> None:
        packing, documents = self._packing, self._documents
        limits = {
            document_lib.IMAGE: ("image", {"max_patches": packing.max_patches, "sequence_length": packing.sequence_length}),
            document_lib.AUDIO: ("audio", {"max_audio_frames": packing.max_audio_frames, "sequence_length": packing.sequence_length}),
        }
        spans = self._store.spans[_gather(self._store.span_start, documents)]
        for kind, (name, bounds) in limits.items():
            longest = int(spans["n"][spans["kind"] == kind].max(initial=0))
            for field, bound in bounds.items():
                if longest > bound:
                    message = f"data store {self._store.path}: an {name} span has {longest} tokens, but `{field}` is {bound}"
                    raise ValueError(f"{message}; raise `{field}` to {longest} or more, or leave the source out")

    def row(self, i: int) -> list[Piece]:
        """Row ``i``, from 0 without end: its pieces in order, together at most S tokens; the rest of the row is padding."""
        with self._lock:
            number, row = self._locate(i)
            block = self._block(number)
        return block.row(row)

    def _locate(self, i: int) -> tuple[int, int]:
        if not self._has_media and self._packing.policy == "cut_text":
            return divmod(i, -(-self.epoch_tokens * self.block_epochs // self._packing.sequence_length))
        while self._first_row[-1] <= i:
            self._first_row.append(self._first_row[-1] + self._block(len(self._first_row) - 1).rows)
        number = bisect.bisect_right(self._first_row, i) - 1
        return number, i - self._first_row[number]

    def fill(self) -> float:
        """Share of the first block's places that are tokens and not padding."""
        with self._lock:
            block = self._block(0)
        return float(block.cuts[-1]) / (block.rows * self._packing.sequence_length)

    def _plan_block(self, number: int) -> Block:
        epochs = range(number * self.block_epochs, (number + 1) * self.block_epochs)
        order = np.concatenate([permutation(len(self._documents), seed=self._packing.seed, epoch=epoch) for epoch in epochs])
        documents = self._documents[order]
        starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
        if not self._has_media and self._packing.policy == "cut_text":
            length = self._packing.sequence_length
            cuts = np.minimum(np.arange(-(-starts[-1] // length) + 1) * length, starts[-1])
        else:
            cuts = _cut(starts, spans=_stream_spans(self._store, documents=documents, starts=starts), packing=self._packing)
        return Block(documents=documents, starts=starts, cuts=cuts)


def _gather(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions ``offsets[r] : offsets[r + 1]`` for each r of ``rows``, one after another."""
    counts = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1])) + np.repeat(offsets[rows] - (ends - counts), counts)


def _stream_spans(store: store_lib.TokenStore, *, documents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """``i64[spans, 3]``: kind, first token and length of each media span, in stream coordinates."""
    spans = store.spans[_gather(store.span_start, documents)]
    offset = np.repeat(starts[:-1], store.documents["spans"][documents])
    return np.stack([spans["kind"].astype(np.int64), offset + spans["at"], spans["n"].astype(np.int64)], axis=-1)


def _cut(starts: np.ndarray, *, spans: np.ndarray, packing: Packing) -> np.ndarray:
    """``i64[rows + 1]``: the cuts of a stream that has media or whole documents."""
    kind, at, n = spans.T
    budgets = []
    for which, budget in ((document_lib.IMAGE, packing.max_patches), (document_lib.AUDIO, packing.max_audio_frames)):
        mine = kind == which
        if mine.any():
            budgets.append((_view(at[mine]), _view(np.concatenate([[0], np.cumsum(n[mine])])), budget))
    span_at, span_end, document_at = _view(at), _view(at + n), _view(starts)
    whole = packing.policy == "whole_documents"
    begin, total, cuts = 0, int(starts[-1]), [0]
    while begin < total:
        end = min(begin + packing.sequence_length, total)
        for start, used, budget in budgets:
            first = bisect.bisect_left(start, begin)
            last = bisect.bisect_right(used, used[first] + budget) - 1  # spans before `last` fit
            if last < len(start):
                end = min(end, start[last])
        span = bisect.bisect_left(span_at, end) - 1
        if span >= 0 and end < span_end[span]:
            end = span_at[span]
        if whole:
            document = document_at[bisect.bisect_right(document_at, end) - 1]
            if document > begin:
                end = document
        assert end > begin, "a span that no row can hold passed the check"
        cuts.append(end)
        begin = end
    return np.array(cuts, np.int64)


def _view(array: np.ndarray) -> Sequence[int]:
    """For `bisect`: five times faster than `searchsorted` for one number, and no copy as a list would be."""
    return np.ascontiguousarray(array).data
