"""Pieces of documents into the arrays of a batch.

Where a token or a patch goes is decided by the plan and the index alone. A document that cannot be read therefore leaves a hole of
padding of exactly its size, and every other token, position and slot of the batch stays what it would have been.

Speed comes from three things: stores read pieces straight into the batch, rows are filled by a few operations over all their tokens
(only reading and media know documents), and every byte of the batch is written once.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from v4train.data import batch as batch_lib
from v4train.data import document as document_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

log = logging.getLogger(__name__)

_LOAD_BYTES = 2**24  # of documents that are fetched together
_TOKEN_BYTES, _FRAME_BYTES = 4, 80


class BadRecord(NamedTuple):
    """A stored document that was replaced by padding: its source, its number in the store, its place on disk, and why."""

    source: str
    document: int
    where: str
    error: str


class Quarantine:
    """The documents that were replaced by padding so far.

    Attributes:
        records: each bad document once, in order of discovery.
        pieces: how often one was met; the same document counts again in every row and epoch.
    """

    def __init__(self, report: Callable[[BadRecord], None] | None = None):
        self.records: list[BadRecord] = []
        self.pieces = 0
        self._report, self._seen, self._lock = report, set(), threading.Lock()

    def add(self, record: BadRecord) -> None:
        with self._lock:
            self.pieces += 1
            if (record.source, record.document) in self._seen:
                return
            self._seen.add((record.source, record.document))
            self.records.append(record)
        log.warning("data source %s: document %d (%s) became padding: %s", *record)
        if self._report is not None:
            self._report(record)


class Reader:
    """Documents of one source; those that cannot be read are put into quarantine."""

    def __init__(self, store: store_lib.Store, *, name: str, quarantine: Quarantine):
        self.store, self.name = store, name
        self._quarantine = quarantine
        self.has_media = bool(len(store.spans))

    def report(self, i: int, error: document_lib.DamagedRecordError) -> None:
        """Document ``i`` becomes padding."""
        self._quarantine.add(BadRecord(self.name, i, self.store.where(i), str(error)))


class RowPieces(NamedTuple):
    """What a row, or a slice of one, is to hold.

    Attributes:
        reader: of the source.
        pieces: in order. Those of a slice may begin or end inside a media span.
        segment: the number of the first piece in the whole row.
        continued: whether the first piece began in the slice before, which has counted it.
    """

    reader: Reader
    pieces: store_lib.Pieces | Sequence[tuple[int, int, int]]
    segment: int = 1
    continued: bool = False


def fill(batch: batch_lib.Batch, rows: Sequence[RowPieces], *, tokenizer: tokenizer_lib.Tokenizer) -> None:
    """Writes all rows of a batch (`batch.allocate` is enough), in place; ``source`` is left to the caller."""
    rows = [row._replace(pieces=store_lib.Pieces.of(row.pieces)) for row in rows]
    weights = _weights(tokenizer)
    documents = [store_lib.Pieces.of(row.pieces).documents for row in rows]
    for group in _groups(rows, documents):
        for reader in {rows[i].reader for i in group if rows[i].reader.store.whole_documents}:
            reader.store.load(np.concatenate([documents[i] for i in group if rows[i].reader is reader]).tolist())
        for i in group:
            _Row(batch, i, rows[i], pad=tokenizer.pad).fill(weights)


def _groups(rows: Sequence[RowPieces], documents: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Neighbouring rows whose documents together have about `_LOAD_BYTES`."""
    group, size = [], 0
    for i, row in enumerate(rows):
        group.append(i)
        store = row.reader.store
        if not store.whole_documents:
            continue
        entries = store.documents[documents[i]]
        by_field = {"tokens": _TOKEN_BYTES, "patches": 3 * store.image_patch**2, "frames": _FRAME_BYTES}
        size += sum(int(entries[field].sum(dtype=np.int64)) * width for field, width in by_field.items())
        if size >= _LOAD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Medium(NamedTuple):
    """A media span, or the part of one that a slice holds, on its way into a row: ``n`` tokens at ``token``, its payload at ``slot``."""

    kind: int
    token: int
    slot: int
    n: int


class _Row:
    """One row of a batch while it is filled."""

    def __init__(self, batch: batch_lib.Batch, row: int, what: RowPieces, *, pad: int):
        self._what, self._pieces, self._pad = what, store_lib.Pieces.of(what.pieces), pad
        self._lengths = self._pieces.stops - self._pieces.starts
        self._begins = np.cumsum(self._lengths) - self._lengths
        mine = {name: np.asarray(array)[row] for name, array in vars(batch).items()}
        self._tokens, self._segment_ids, self._positions = mine["tokens"], mine["segment_ids"], mine["positions"]
        self._modality, self._loss_weight = mine["modality"], mine["loss_weight"]
        self._counts = (mine["n_documents"], mine["n_bad"])
        self._payload = {document_lib.IMAGE: mine["patches"], document_lib.AUDIO: mine["audio"]}
        self._slots = {document_lib.IMAGE: mine["patch_slot"], document_lib.AUDIO: mine["audio_slot"]}
        self._xy = mine["patch_xy"]
        self._next = {document_lib.IMAGE: 0, document_lib.AUDIO: 0}

    def fill(self, weights: np.ndarray) -> None:
        """Writes everything; ``weights`` are those of ids as targets."""
        reader, _, segment, continued = self._what
        pieces = self._pieces
        n = int(self._lengths.sum())
        bad = reader.store.read_pieces(pieces, out=self._tokens[:n])
        numbers = np.arange(segment, segment + len(pieces.documents), dtype=np.int32)
        self._segment_ids[:n] = np.repeat(numbers, self._lengths)
        shift = (pieces.starts - self._begins).astype(np.int32)
        np.add(np.arange(n, dtype=np.int32), np.repeat(shift, self._lengths), out=self._positions[:n])
        self._blank(slice(n, None))
        self._modality[...] = 0
        for slots in self._slots.values():
            slots[...] = -1
        if reader.has_media:
            for i in np.flatnonzero(reader.store.documents["spans"][pieces.documents]).tolist():
                self._fill_media(i, bad)
        for kind, payload in self._payload.items():
            payload[self._next[kind] :] = 0
        self._xy[self._next[document_lib.IMAGE] :] = 0
        for i, error in bad.items():
            begin = int(self._begins[i])
            self._blank(slice(begin, begin + int(self._lengths[i])))
            reader.report(int(pieces.documents[i]), error)
        np.take(weights, self._tokens, mode="clip", out=self._loss_weight)
        documents, failed = self._counts
        documents[...] = len(numbers) - continued
        failed[...] = len(bad) - (continued and 0 in bad)

    def _blank(self, where: slice) -> None:
        self._tokens[where] = self._pad
        self._segment_ids[where] = 0
        self._positions[where] = 0

    def _fill_media(self, i: int, bad: dict[int, document_lib.DamagedRecordError]) -> None:
        """Reads the payloads of piece ``i``; where one fails, or its tokens did, all of the piece's are blank."""
        store, (documents, starts, stops) = self._what.reader.store, self._pieces
        document, start, stop = int(documents[i]), int(starts[i]), int(stops[i])
        spans = store.spans_of(document)
        first = int(np.searchsorted(spans["at"].astype(np.int64) + spans["n"], start, side="right"))
        last = int(np.searchsorted(spans["at"], stop))
        media: list[_Medium] = []
        for k, (kind, at, length) in enumerate(spans[first:last].tolist(), start=first):
            begin, n = max(at, start), min(at + length, stop) - max(at, start)
            slot = self._next[kind]
            self._next[kind] += n
            media.append(_Medium(kind, int(self._begins[i]) + begin - start, slot, n))
            if i in bad:
                continue
            xy = self._xy[slot : slot + n] if kind == document_lib.IMAGE else None
            try:
                store.read_span(document, k, skip=begin - at, values=self._payload[kind][slot : slot + n], xy=xy)
            except document_lib.DamagedRecordError as error:
                bad[i] = error
        for kind, token, slot, n in media:
            if i in bad:
                self._payload[kind][slot : slot + n] = 0
                if kind == document_lib.IMAGE:
                    self._xy[slot : slot + n] = 0
            else:
                self._slots[kind][token : token + n] = np.arange(slot, slot + n, dtype=np.int32)
                self._modality[token : token + n] = kind


@functools.cache
def _weights(tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
    """Of each id as a target. Placeholders of media are never targets, so the ids decide alone."""
    weight = np.ones(tokenizer.vocab_size, np.float32)
    weight[[i for i in tokenizer.never_targets if i >= 0]] = 0.0
    return weight
