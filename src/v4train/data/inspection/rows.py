"""Rows of a batch, taken apart for a reader: segments of text, images and sounds, and what of it the model is asked for.

Everything here is read from the arrays of a `Batch`, which are what the step consumes, and from nothing else: no store, no plan, no
document. What is wrong in a batch is therefore wrong on the screen, and a picture that looks right was given to the model right. (The
rejected alternative, to look the documents up and show those, would show what the batch should have been.)

**Text.** A token of a byte or BPE vocabulary need not be a whole character. Neighbouring tokens are joined, at most four since UTF-8 has
no longer characters, until they decode without a replacement character; what does not even then is shown as it is.

**Weights.** `Batch.loss_weight` belongs to a token as a target. A token is predicted by the one before it, so one that begins a segment
is never asked for, whatever its weight says: `asked` is the weight with which a token really enters the loss, the same as
the loss's own shift by one.

**Holes.** Documents that could not be read are padding. Where a later segment follows, the hole can be seen; at the end of a row it can
not be told from the row's own padding, but it is counted in ``n_bad``.
"""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Float32, UInt8

from v4train.data import batch as batch_lib
from v4train.data import document as document_lib
from v4train.data import tokenizer as tokenizer_lib

MODALITIES = ("text", "image", "audio")
REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens at most


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """The fewest tokens with a text of their own.

    Attributes:
        place: of the first in the row.
        ids: of the tokens.
        text: decoded, as it is: control characters included.
        special: one of the vocabulary's own marks, not text.
        asked: largest weight in the loss of these tokens as targets; 0 is never asked for.
    """

    place: int
    ids: tuple[int, ...]
    text: str
    special: bool
    asked: float


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One image, put back together from its patches.

    Attributes:
        place: of its first patch in the row.
        n: patches.
        pixels: exactly the bytes of the batch; places of the grid without a patch are black.
        columns: patches side by side.
        rows: patches one below another.
    """

    place: int
    n: int
    pixels: UInt8[np.ndarray, "height width 3"]
    columns: int
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """One stretch of sound: dMel levels of its ``n`` frames."""

    place: int
    n: int
    frames: UInt8[np.ndarray, "n 80"]


Part = Text | Image | Sound


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A document, or the part of one that this row holds.

    Attributes:
        number: 1, 2, ...
        start: its first place in the row.
        stop: the place behind its last.
        position: of its first token in the document.
        ends: its last token is the document's `eos`.
        shown: the places that ``parts`` cover, ``(start, stop)``.
        parts: in reading order.
    """

    number: int
    start: int
    stop: int
    position: int
    ends: bool
    shown: tuple[int, int]
    parts: tuple[Part, ...]

    @property
    def whole(self) -> bool:
        """Neither cut off at its beginning nor at its end."""
        return self.position == 0 and self.ends


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One row.

    Attributes:
        number: in the batch.
        source: name of the source.
        length: places, S.
        segments: in order; only those that touch the window.
        gaps: padding, ``(start, stop)`` each, over the whole row; a hole lies before a segment.
        tokens: modality -> tokens of the whole row.
        targets: tokens of the whole row that are asked for.
        weight: the sum of their weights.
        segment_count: segments of the whole row.
        bad: documents of the row that could not be read.
        segment_ids: ``i32[S]``.
        modality: ``i8[S]``.
        asked: ``f32[S]``.
    """

    number: int
    source: str
    length: int
    segments: tuple[Segment, ...]
    gaps: tuple[tuple[int, int], ...]
    tokens: dict[str, int]
    targets: int
    weight: float
    segment_count: int
    bad: int
    segment_ids: np.ndarray
    modality: np.ndarray
    asked: Float32[np.ndarray, "S"]

    @property
    def fill(self) -> float:
        """Share of the places that hold tokens."""
        return sum(self.tokens.values()) / self.length


def asked(batch: batch_lib.Batch) -> Float32[np.ndarray, "B S"]:
    """The weight with which each token enters the loss, as the target of the token before it: 0 at the start of a segment."""
    segments = np.asarray(batch.segment_ids)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weight = np.zeros(segments.shape, np.float32)
    weight[:, 1:] = np.where(same, np.asarray(batch.loss_weight)[:, 1:], 0)
    return weight


def describe(
    batch: batch_lib.Batch,
    *,
    row: int,
    tokenizer: tokenizer_lib.Tokenizer,
    sources: tuple[str, ...],
    window: tuple[int, int] | None = None,
) -> Row:
    """Takes one row apart.

    Args:
        batch: whole rows, on the host.
        row: its number in the batch.
        tokenizer: of its tokens.
        sources: their names, in the order of `Batch.source`.
        window: places ``(start, stop)`` to take apart, widened where it would cut an image or a sound; by default all. Counts
            are always of the whole row.
    """
    segments, modality, weight = np.asarray(batch.segment_ids[row]), np.asarray(batch.modality[row]), asked(batch)[row]
    real = segments > 0
    start, stop = (0, len(segments)) if window is None else window
    runs = list(_runs(segments))
    start, stop = _whole_media(start, stop, modality=np.where(real, modality, 0))
    wanted = [(a, b) for a, b in runs if segments[a] and a < stop and b > start]
    reader = _Reader(batch, row=row, tokenizer=tokenizer, asked=weight)
    return Row(
        number=row,
        source=sources[int(batch.source[row])],
        length=len(segments),
        segments=tuple(reader.segment(a, b, shown=(max(a, start), min(b, stop))) for a, b in wanted),
        gaps=tuple((a, b) for a, b in runs if not segments[a]),
        tokens={name: int((real & (modality == i)).sum()) for i, name in enumerate(MODALITIES)},
        targets=int((weight > 0).sum()),
        weight=float(weight.sum()),
        segment_count=sum(1 for a, _ in runs if segments[a]),
        bad=int(batch.n_bad[row].sum()),
        segment_ids=segments,
        modality=modality,
        asked=weight,
    )


def _whole_media(start: int, stop: int, *, modality: np.ndarray) -> tuple[int, int]:
    for a, b in _runs(modality):
        if modality[a]:
            start = a if a < start < b else start
            stop = b if a < stop < b else stop
    return start, stop


def _runs(values: np.ndarray, *, start: int = 0) -> list[tuple[int, int]]:
    """``(start, stop)`` of each stretch of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return [(start + a, start + b) for a, b in itertools.pairwise(bounds) if a < b]


class _Reader:
    """Reads the parts of one row's segments."""

    def __init__(self, batch: batch_lib.Batch, *, row: int, tokenizer: tokenizer_lib.Tokenizer, asked: np.ndarray):
        of_row = [batch.segment_ids, batch.positions, batch.tokens, batch.modality]
        self._segment_ids, self._positions, self._tokens, self._modality = (np.asarray(field[row]) for field in of_row)
        self._patch_slot, self._patches, self._xy = (np.asarray(field[row]) for field in (batch.patch_slot, batch.patches, batch.patch_xy))
        self._audio_slot, self._audio = (np.asarray(field[row]) for field in (batch.audio_slot, batch.audio))
        self._asked, self._eos = asked, tokenizer.eos
        self._special = {*tokenizer.never_targets, tokenizer.eos}
        self._decode = functools.cache(lambda ids: tokenizer.decode(np.array(ids)))

    def segment(self, start: int, stop: int, *, shown: tuple[int, int]) -> Segment:
        parts: list[Part] = []
        of_kind = {document_lib.TEXT: self._text, document_lib.IMAGE: self._images, document_lib.AUDIO: self._sound}
        for a, b in _runs(self._modality[slice(*shown)], start=shown[0]):
            parts += of_kind[int(self._modality[a])](a, b)
        return Segment(
            number=int(self._segment_ids[start]),
            start=start,
            stop=stop,
            position=int(self._positions[start]),
            ends=int(self._tokens[stop - 1]) == self._eos,
            shown=shown,
            parts=tuple(parts),
        )

    def _text(self, start: int, stop: int) -> list[Part]:
        parts: list[Part] = []
        place = start
        while place < stop:
            ids, text = self._character(place, stop)
            end = place + len(ids)
            parts.append(Text(place, ids, text, ids[0] in self._special, float(self._asked[place:end].max())))
            place = end
        return parts

    def _character(self, place: int, stop: int) -> tuple[tuple[int, ...], str]:
        """The ids from ``place`` on that decode to something whole, and what."""
        first = (int(self._tokens[place]),)
        text = self._decode(first)
        if REPLACEMENT not in text or first[0] in self._special:
            return first, text
        for n in range(2, min(_LONGEST_CHARACTER, stop - place) + 1):
            ids = tuple(self._tokens[place : place + n].tolist())
            joined = self._decode(ids)
            if ids[-1] in self._special:
                break
            if REPLACEMENT not in joined:
                return ids, joined
        return first, text

    def _images(self, start: int, stop: int) -> list[Part]:
        """Spans may touch: a patch at (0, 0) begins an image, as does one at or before the place of its predecessor."""
        slots = self._patch_slot[start:stop]
        xy = self._xy[slots].astype(np.int64)
        order = xy[:, 1] * (1 + xy[:, 0].max()) + xy[:, 0]
        edges = [0, *(np.flatnonzero(np.diff(order) <= 0) + 1).tolist(), len(slots)]
        return [self._image(start + a, xy[a:b], self._patches[slots[a:b]]) for a, b in itertools.pairwise(edges)]

    def _image(self, place: int, xy: np.ndarray, values: np.ndarray) -> Image:
        side = round((values.shape[1] / 3) ** 0.5)
        columns, rows = (int(n) for n in xy.max(axis=0) + 1)
        grid = np.zeros((rows, columns, side, side, 3), np.uint8)
        grid[xy[:, 1], xy[:, 0]] = values.reshape(-1, side, side, 3)
        return Image(place, len(xy), grid.swapaxes(1, 2).reshape(rows * side, columns * side, 3), columns, rows)

    def _sound(self, start: int, stop: int) -> list[Part]:
        return [Sound(start, stop - start, self._audio[self._audio_slot[start:stop]])]
