"""The pack plan: which tokens of which documents make up row i.

A source's documents are an endless *stream*: epoch after epoch, each in its own random order. The stream is taken in *blocks* of about
256 rows or more (fewer, of very long rows), every block is cut into rows by itself (`packing` has the three policies), and what is
missing to S in its last row is padding. Text that may be split, and ``one_document``, have blocks of whole epochs (one, except for tiny
stores), and one epoch follows another inside a row without a seam. Of ``no_split``, and where there are media, a large epoch is several
blocks: the window that best fit looks at, and as much as is planned at a time. Rows of ``no_split`` are shuffled within their block,
because best fit deals the large documents first.

Everything is a function of (index, start, S, P, A, seed, policy), never of what was read before: ``row(i)`` is two binary searches. Text
that may be split, and one document a row, are closed form. Else a block's number of rows is known only when it is planned, so to find
row i all blocks before it are planned once: 1 to 2 us a document, 3 to 10 us where best fit weighs media. A continued
document keeps its true positions. Memory is about 40 bytes a document; a store of more than some 10^8 documents should be split.

**Milestones.** A run that goes on would plan all its past blocks again only to count their rows. So what was counted can be kept: a
`Milestone` is the number of a block and the rows and tokens before it, three integers for any position. It saves time and decides nothing:
it is taken only where the `fingerprint`, a hash of everything that the counts depend on (the documents themselves, not their names), is
the same, and without it the same rows are found by planning. (Rejected: blocks of a fixed number of rows, which would be closed form.
What a block does not fill would be padding, or spill into the next, and then the next depends on all before it.)

**A change of S.** A plan has one shape of row. The plan of the next shape begins where this one has come to: `after(n)` is the `Start`
that holds what rows before n have left over (the rest of a document, or the documents of a window that best fit had put into
later rows) and the place in the stream from which on nothing was touched. Hence nothing is skipped or repeated.

Rejected: iterator packers (concat-then-split, first-fit), whose state must be saved, depends on the number of workers, and in grain
loses or shifts media.
"""

import array
import bisect
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import xxhash

from v4train.data import document as document_lib
from v4train.data import packing as packing_lib
from v4train.data import store as store_lib

VERSION = 3  # goes into fingerprints: change it with any change to which tokens a row holds
_BLOCK_ROWS = 256
_WINDOW_OF_TEXT, _WINDOW_OF_MEDIA = 2**18, 2**16  # documents that are planned together, at most: half a second or so
_SHUFFLE_ROWS = 2**62  # seeds of row orders, told apart from epochs' seeds

Packing = packing_lib.Packing


class Piece(NamedTuple):
    """Tokens ``start:stop`` of a document of the store."""

    document: int
    start: int
    stop: int


class Start(NamedTuple):
    """Where a plan begins: with left-over pieces, and then at a place of the endless stream, counted in documents."""

    head: tuple[Piece, ...] = ()
    place: int = 0


class Milestone(NamedTuple):
    """Of a plan: the number of a block, counted from the plan's first, and the rows and tokens before it."""

    block: int
    rows: int
    tokens: int


class Planning(NamedTuple):
    """Rows that must be planned, only to be counted, and about how many seconds that takes."""

    rows: int
    seconds: float


class Slice(NamedTuple):
    """Part of a row.

    Attributes:
        pieces: in order.
        segment: number of the first piece in the row, from 1.
        continued: whether the first piece began before the slice.
    """

    pieces: store_lib.Pieces
    segment: int
    continued: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of the stream, cut into rows.

    Attributes:
        documents: ``i64[n]``, the store's document of each item.
        offsets: ``i64[n]``, the item's first token in its document: 0 unless the item is a rest or a part.
        starts: ``i64[n + 1]``, where each item begins in the block.
        cuts: ``i64[rows + 1]``; row ``i`` is the block's ``cuts[i]:cuts[i + 1]``.
    """

    documents: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    cuts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.cuts) - 1

    def pieces(self, begin: int, end: int) -> store_lib.Pieces:
        """What the block's tokens ``begin:end`` are."""
        if begin >= end:
            return store_lib.Pieces.of([])
        first, last = np.searchsorted(self.starts, (begin + 1, end)) - np.array((1, 0))
        shift = self.offsets[first:last] - self.starts[first:last]
        starts = shift + np.maximum(self.starts[first:last], begin)
        stops = shift + np.minimum(self.starts[first + 1 : last + 1], end)
        return store_lib.Pieces(self.documents[first:last], starts, stops)

    def slice(self, i: int, *, start: int, stop: int) -> Slice:
        """Places ``start:stop`` of row ``i``."""
        row, end = int(self.cuts[i]), int(self.cuts[i + 1])
        begin = min(row + start, end)
        first, here = (int(x) for x in np.searchsorted(self.starts, (row, begin), side="right"))
        pieces = self.pieces(begin, min(row + stop, end))
        continued = len(pieces.documents) > 0 and begin > max(row, int(self.starts[here - 1]))
        return Slice(pieces, 1 + here - first, continued)


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
    """The endless sequence of rows of one source in one shape. Thread-safe.

    Attributes:
        epoch_tokens: tokens of the documents, once.
        closed_form: whether any row is found without planning what is before it.
        block_epochs: epochs that are planned together.
        epoch_blocks: blocks that an epoch is planned in; this or ``block_epochs`` is 1.
        start: where it begins.
    """

    def __init__(
        self,
        store: store_lib.Store,
        *,
        documents: np.ndarray,
        packing: Packing,
        start: Start | None = None,
        delimited: Collection[int] = (),
    ):
        """Plans over a subset of a store.

        Args:
            store: whose index is used; no document is read.
            documents: ``i64[n]`` numbers of the documents to use.
            packing: how to cut.
            start: where an earlier plan over the same documents, of another shape, has come to (`after`).
            delimited: kinds of media whose spans have a token before and behind them that belongs to them.

        Raises:
            ValueError: no documents, or a media span that no row can hold.
        """
        if not len(documents):
            raise ValueError(f"data store {store.path}: no documents in this split; change `holdout` or use a larger store")
        self._store, self._packing, self._documents, self._delimited = store, packing, documents, tuple(sorted(delimited))
        self.start = start or Start()
        self._lengths = store.documents["tokens"][documents].astype(np.int64)
        self._has_media = bool(store.documents["spans"][documents].any())
        self._check_spans()
        self.epoch_tokens = int(self._lengths.sum())
        self.block_epochs, self.epoch_blocks = self._divide()
        self._first = self._block_of(self.start.place)
        self.closed_form = packing.policy == "one_document" or (packing.policy == "split_text_keep_spans" and not self._has_media)
        self._sums = [_Sums.at(Milestone(0, 0, 0))]
        self._lock = threading.RLock()
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(len(documents), seed=packing.seed, epoch=epoch))
        self._block = functools.lru_cache(maxsize=3)(self._plan_block)

    def _divide(self) -> tuple[int, int]:
        """Epochs of a block, blocks of an epoch."""
        used = [self.epoch_tokens]
        if self._has_media:
            used += [int(self._store.documents[kind][self._documents].sum(dtype=np.int64)) for kind in ("patches", "frames")]
        rows = max(n / max(1, limit) for n, limit in zip(used, self._packing.limits, strict=False))
        n, most = len(self._documents), _WINDOW_OF_TEXT
        epochs = max(1, math.ceil(_BLOCK_ROWS / rows))
        if self._packing.policy == "one_document" or not (self._has_media or self._packing.policy == "no_split"):
            return epochs, 1
        if self._packing.policy == "no_split" and self._has_media:
            most = _WINDOW_OF_MEDIA
        return max(1, min(epochs, most // n)), min(n, max(1, math.floor(rows / _BLOCK_ROWS), math.ceil(n / most)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of everything that the number of rows of each block depends on."""
        constants = (VERSION, _BLOCK_ROWS, _WINDOW_OF_TEXT, _WINDOW_OF_MEDIA)
        parts = (constants, dataclasses.astuple(self._packing), self._delimited, tuple(self.start.head), self.start.place)
        digest = xxhash.xxh3_128(repr((*parts, len(self._documents))).encode())
        spans = self._store.documents["spans"][self._documents] if self._has_media else np.zeros(0, np.uint32)
        of_media = self._store.spans if self._has_media else np.zeros(0, document_lib.SPAN)
        for values in (self._documents, self._lengths, spans, of_media):
            digest.update(np.ascontiguousarray(values).view(np.uint8).data)
        return digest.hexdigest()

    def milestone(self, n: int) -> Milestone:
        """Of the block of row ``n``."""
        with self._lock:
            return self._locate(n)[0]

    def remember(self, milestone: Milestone) -> None:
        """Takes over what `milestone` said of a plan with this one's `fingerprint`; rows behind it are found from there."""
        with self._lock:
            if milestone.block > 0 and all(milestone.rows != sums.rows[0] for sums in self._sums):
                self._sums = sorted([*self._sums, _Sums.at(milestone)], key=lambda sums: sums.rows[0])

    def planning(self, n: int) -> Planning:
        """What it takes to find row ``n``."""
        with self._lock:
            known = self._sums[bisect.bisect_right(self._sums, n, key=lambda sums: sums.rows[0]) - 1].rows[-1]
            rows = 0 if self.closed_form else max(0, n - known)
            if not rows:
                return Planning(0, 0.0)
            seconds = []
            for _ in range(3):  # the first finds cold caches
                started = time.perf_counter()
                planned = self._plan_block(0).rows
                seconds.append((time.perf_counter() - started) / planned)
            return Planning(rows, rows * min(seconds))

    def _check_spans(self) -> None:
        if not self._has_media:
            return
        length, patches, frames = self._packing.limits
        limits = {
            document_lib.IMAGE: ("image", {"max_patches": patches, "sequence_length": length}),
            document_lib.AUDIO: ("audio", {"max_audio_frames": frames, "sequence_length": length}),
        }
        spans = self._store.spans[_gather(self._store.span_start, self._documents)]
        for kind, (name, bounds) in limits.items():
            longest = int(spans["n"][spans["kind"] == kind].max(initial=0))
            for field, bound in bounds.items():
                if longest > bound:
                    message = f"data store {self._store.path}: an {name} span has {longest} tokens, but `{field}` is {bound}"
                    raise ValueError(f"{message}; raise `{field}` to {longest} or more, or leave the source out")

    def row(self, i: int) -> list[Piece]:
        """Row ``i``, from 0 without end: its pieces in order, together at most S tokens; the rest of the row is padding."""
        return _listed(self.slice(i, start=0, stop=self._packing.sequence_length).pieces)

    def slice(self, i: int, *, start: int, stop: int) -> Slice:
        """Places ``start:stop`` of row ``i``. What the rest of the row holds is not looked at."""
        with self._lock:
            before, row = self._locate(i)
            block = self._block(before.block)
        return block.slice(row, start=start, stop=stop)

    def tokens_before(self, n: int) -> int:
        """Tokens of the first ``n`` rows, padding left out."""
        with self._lock:
            before, row = self._locate(n)
            return before.tokens + (int(self._block(before.block).cuts[row]) if row else 0)

    def after(self, n: int) -> Start:
        """Where a plan of another shape goes on after the first ``n`` rows of this one."""
        with self._lock:
            (number, *_), row = self._locate(n)
            low, high = self._places(number)
            head = self.start.head if number == 0 else ()
            if not row:
                return Start(head, low)
            block = self._block(number)
        cut = int(block.cuts[row])
        if self._packing.policy == "no_split":
            return Start(tuple(_listed(block.pieces(cut, int(block.cuts[-1])))), high)
        item = int(np.searchsorted(block.starts, cut, side="right")) - 1
        rest = _listed(block.pieces(cut, int(block.starts[item + 1])))
        if item < len(head):
            return Start((*rest, *head[item + 1 :]), low)
        split = bool(cut > block.starts[item])
        return Start(tuple(rest) if split else (), low + item - len(head) + split)

    def fill(self) -> float:
        """Share of the first block's places that are tokens and not padding."""
        with self._lock:
            block = self._block(0)
        return float(block.cuts[-1]) / (block.rows * self._packing.sequence_length)

    def _block_of(self, place: int) -> int:
        epoch, within = divmod(place, len(self._documents))
        if self.epoch_blocks == 1:
            return epoch // self.block_epochs
        return epoch * self.epoch_blocks + bisect.bisect_right(range(self.epoch_blocks), within, key=self._window) - 1

    def _window(self, i: int) -> int:
        return len(self._documents) * i // self.epoch_blocks

    def _places(self, number: int) -> tuple[int, int]:
        """The documents of the stream that block ``number``, counted from the plan's first, is made of."""
        block, n = self._first + number, len(self._documents)
        if self.epoch_blocks == 1:
            low, high = block * self.block_epochs * n, (block + 1) * self.block_epochs * n
        else:
            epoch, window = divmod(block, self.epoch_blocks)
            low, high = epoch * n + self._window(window), epoch * n + self._window(window + 1)
        return (self.start.place, high) if number == 0 else (low, high)

    def _locate(self, i: int) -> tuple[Milestone, int]:
        """The block of row ``i``, and the row's number in it."""
        sums = self._sums[bisect.bisect_right(self._sums, i, key=lambda sums: sums.rows[0]) - 1]
        while sums.rows[-1] <= i and not (self.closed_form and len(sums.rows) == 3):
            self._count(sums)
        if sums.rows[-1] <= i:
            # All blocks but the first have the same numbers of rows and tokens: they do not depend on the documents' order.
            (_, first, second), tokens = sums.rows, sums.tokens[1]
            number, row = divmod(i - first, second - first)
            return Milestone(1 + number, i - row, tokens + number * (sums.tokens[2] - tokens)), row
        k = bisect.bisect_right(sums.rows, i) - 1
        return Milestone(sums.first + k, sums.rows[k], sums.tokens[k]), i - sums.rows[k]

    def _count(self, sums: "_Sums") -> None:
        """Adds one more block."""
        number = sums.first + len(sums.rows) - 1
        if self._packing.policy == "split_text_keep_spans" and not self._has_media:
            whole = number > 0 or self.start == Start()
            tokens = self.block_epochs * self.epoch_tokens if whole else int(self._items(number)[2].sum())
            rows = -(-tokens // self._packing.sequence_length)
        else:
            block = self._block(number)
            rows, tokens = block.rows, int(block.cuts[-1])
        sums.rows.append(sums.rows[-1] + rows)
        sums.tokens.append(sums.tokens[-1] + tokens)

    def _items(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, first token and length of each item of a block, before it is cut."""
        low, high = self._places(number)
        n, parts = len(self._documents), []
        for epoch in range(low // n, -(-high // n)):
            parts.append(self._order(epoch)[max(low - epoch * n, 0) : high - epoch * n])
        order = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        documents, lengths = self._documents[order], self._lengths[order]
        if number or not self.start.head:
            return documents, np.broadcast_to(np.int64(0), len(documents)), lengths
        head = np.array(self.start.head, np.int64)
        offsets = np.concatenate([head[:, 1], np.zeros(len(documents), np.int64)])
        return np.concatenate([head[:, 0], documents]), offsets, np.concatenate([head[:, 2] - head[:, 1], lengths])

    def _plan_block(self, number: int) -> Block:
        packing = self._packing
        documents, offsets, lengths = self._items(number)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        spans = self._spans(documents, offsets=offsets, lengths=lengths, starts=starts) if self._has_media else None
        if packing.policy == "split_text_keep_spans":
            return Block(documents, offsets, starts, packing_lib.cut_anywhere(starts, spans=spans, packing=packing))
        cuts = packing_lib.cut_documents(starts, spans=spans, packing=packing)
        if packing.policy == "one_document":
            return Block(documents, offsets, starts, cuts)
        row_of = packing_lib.best_fit(cuts, spans=spans, packing=packing)
        rows = int(row_of.max()) + 1
        shuffled = np.empty(rows, np.int64)
        shuffled[permutation(rows, seed=packing.seed, epoch=_SHUFFLE_ROWS + self._first + number)] = np.arange(rows)
        return _regroup(Block(documents, offsets, starts, cuts), row_of=shuffled[row_of])

    def _spans(self, documents: np.ndarray, *, offsets: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> packing_lib.Spans:
        """Media of a block's items, in its coordinates."""
        spans = self._store.spans[_gather(self._store.span_start, documents)]
        counts = self._store.documents["spans"][documents]
        at = spans["at"] - np.repeat(offsets, counts)
        inside = (at >= 0) & (at < np.repeat(lengths, counts))
        at = (at + np.repeat(starts[:-1], counts))[inside]
        kind, low, high = spans["kind"][inside], np.repeat(starts[:-1], counts)[inside], np.repeat(starts[1:], counts)[inside]
        found = packing_lib.Spans.of(kind, at=at, n=spans["n"][inside].astype(np.int64))
        if not self._delimited:
            return found
        return found.delimited(np.isin(kind, self._delimited), low=low, high=high, longest=self._packing.sequence_length)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Rows and tokens before consecutive blocks, of which the first is number ``first`` and the last is not planned yet."""

    first: int
    rows: array.array
    tokens: array.array

    @classmethod
    def at(cls, milestone: Milestone) -> "_Sums":
        return cls(milestone.block, array.array("q", [milestone.rows]), array.array("q", [milestone.tokens]))


def _listed(pieces: store_lib.Pieces) -> list[Piece]:
    return list(map(Piece, *(array.tolist() for array in pieces)))


def _regroup(block: Block, *, row_of: np.ndarray) -> Block:
    """The parts between a block's cuts as items of their own, those of a row one after another."""
    order = np.argsort(row_of, kind="stable")
    begins, lengths = block.cuts[:-1][order], np.diff(block.cuts)[order]
    item = np.searchsorted(block.starts, begins, side="right") - 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.searchsorted(row_of[order], np.arange(int(row_of.max()) + 1))
    return Block(block.documents[item], block.offsets[item] + begins - block.starts[item], starts, np.append(starts[rows], starts[-1]))


def _gather(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Positions ``offsets[r] : offsets[r + 1]`` for each r of ``rows``, one after another."""
    counts = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(offsets[rows] - (ends - counts), counts)
