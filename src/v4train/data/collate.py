"""Pieces of documents into the arrays of a batch.

Where a token or a patch goes is decided by the plan and the index alone. A document that cannot be read therefore leaves a hole of
padding of exactly its size, and every other token, position and slot of the batch stays what it would have been.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from v4train.data import batch as batch_lib
from v4train.data import document as document_lib
from v4train.data import plan as plan_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

log = logging.getLogger(__name__)

_CACHED_DOCUMENTS = 8  # at least: a long document is cut into consecutive rows; decode it once


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
    """Documents of one source; a damaged one is None and is put into quarantine."""

    def __init__(self, store: store_lib.TokenStore, *, name: str, quarantine: Quarantine, cache_bytes: int):
        """Keeps about ``cache_bytes`` of decoded documents: a small store is then decoded once, not once an epoch."""
        self.store, self.name = store, name
        self._quarantine = quarantine
        fits = int(cache_bytes // (1000 + store.mean_document_bytes))
        self._read = functools.lru_cache(maxsize=max(_CACHED_DOCUMENTS, fits))(store.read)

    def read(self, i: int) -> document_lib.Document | None:
        try:
            return self._read(i)
        except document_lib.DamagedRecordError as error:
            self._quarantine.add(BadRecord(self.name, i, self.store.where(i), str(error)))
            return None


class Placement(NamedTuple):
    """Where the next piece of a row begins."""

    token: int = 0
    patch: int = 0
    frame: int = 0


def fill_row(
    batch: batch_lib.Batch, *, row: int, pieces: list[plan_lib.Piece], reader: Reader, segment: int = 1, continued: bool = False
) -> None:
    """Writes pieces into a row of an `empty` batch, in place; `finish` does the rest for all rows at once.

    Args:
        batch: of whole rows, or of one slice of each.
        row: its number in the batch.
        pieces: what the row, or the slice, holds. Those of a slice may begin or end inside a media span.
        reader: of the source.
        segment: the number of the first piece in the whole row.
        continued: whether the first piece began in the slice before, which has counted it.
    """
    place = Placement()
    batch.n_documents[row] += len(pieces) - continued
    for i, piece in enumerate(pieces):
        document = reader.read(piece.document)
        if document is not None:
            where = slice(place.token, place.token + piece.stop - piece.start)
            batch.tokens[row, where] = document.tokens[piece.start : piece.stop]
            batch.segment_ids[row, where] = segment + i
            batch.positions[row, where] = np.arange(piece.start, piece.stop, dtype=np.int32)
        elif i or not continued:
            batch.n_bad[row] += 1
        place = _fill_media(batch, row=row, piece=piece, spans=reader.store.spans_of(piece.document), document=document, place=place)


def _fill_media(
    batch: batch_lib.Batch,
    *,
    row: int,
    piece: plan_lib.Piece,
    spans: np.ndarray,
    document: document_lib.Document | None,
    place: Placement,
) -> Placement:
    """Copies the payloads of a piece's media; returns where the next piece begins."""
    patch, frame = place.patch, place.frame
    done = {document_lib.IMAGE: 0, document_lib.AUDIO: 0}  # payload of the document's spans before this one
    for kind, at, n in spans.tolist():
        before, done[kind] = done[kind], done[kind] + n
        start, stop = max(at, piece.start), min(at + n, piece.stop)
        if start >= stop:
            continue
        first, n = before + start - at, stop - start
        image = kind == document_lib.IMAGE
        slot = patch if image else frame
        if document is not None:
            token = place.token + start - piece.start
            slots = batch.patch_slot if image else batch.audio_slot
            slots[row, token : token + n] = np.arange(slot, slot + n, dtype=np.int32)
            if image:
                batch.patches[row, slot : slot + n] = document.patches[first : first + n]
                batch.patch_xy[row, slot : slot + n] = document.patch_xy[first : first + n]
            else:
                batch.audio[row, slot : slot + n] = document.audio[first : first + n]
        patch, frame = (patch + n, frame) if image else (patch, frame + n)
    return Placement(place.token + piece.stop - piece.start, patch, frame)


def finish(batch: batch_lib.Batch, *, tokenizer: tokenizer_lib.Tokenizer) -> None:
    """Derives modality and loss weight from the ids (a document's placeholders and spans agree, or it would not be here)."""
    weight, modality = _tables(tokenizer)
    batch.loss_weight[...] = np.take(weight, batch.tokens, mode="clip")
    batch.modality[...] = np.take(modality, batch.tokens, mode="clip")


@functools.cache
def _tables(tokenizer: tokenizer_lib.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    weight = np.ones(tokenizer.vocab_size, np.float32)
    weight[list(tokenizer.never_targets)] = 0.0
    modality = np.zeros(tokenizer.vocab_size, np.int8)
    modality[tokenizer.image], modality[tokenizer.audio] = document_lib.IMAGE, document_lib.AUDIO
    return weight, modality
