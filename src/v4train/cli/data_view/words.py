"""What both views of a batch say in the same words, and how a text is made safe to show."""

from v4train.data import collate
from v4train.data.inspection import rows as rows_lib

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
_C1 = range(0x80, 0xA0)
_VISIBLE = _PICTURES | {code: f"\u2039U+{code:04X}\u203a" for code in (*_DIRECTIONS, *_C1, 0x2028, 0x2029, 0xFEFF)}
_LINE_BREAK = _PICTURES | {10: "\u21b5\n", 9: "\u21e5\t"}


def visible(text: str) -> str:
    """The text with everything that would act on a terminal or a page made visible.

    A document may hold escape sequences, which a terminal would obey, and marks that turn the direction of writing, which would
    reorder the tokens around it. They become symbols; a line break and a tab become a symbol and stay themselves as well.
    """
    return text.translate(_VISIBLE | _LINE_BREAK)


def count(number: int, noun: str) -> str:
    """``1 segment``, ``2 segments``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def row(row: rows_lib.Row) -> str:
    """The figures of a row in one line."""
    tokens = " + ".join(f"{n:,} {name}" for name, n in row.tokens.items() if n) or "none"
    parts = [
        f"{row.length:,} places: {tokens}",
        f"fill {row.fill:.1%}",
        count(row.segment_count, "segment"),
        f"{row.targets:,} in the loss" + ("" if row.weight == row.targets else f" (weight {row.weight:,.1f})"),
    ]
    if row.bad:
        parts.append(f"{count(row.bad, 'unreadable document')} as padding")
    return " · ".join(parts)


def segment(segment: rows_lib.Segment) -> str:
    """Where a segment lies in its row and in its document."""
    last = segment.position + segment.stop - segment.start - 1
    if segment.whole:
        part = "whole document"
    else:
        begin = "" if segment.position == 0 else "continued from an earlier row"
        end = "" if segment.ends else "goes on in a later row"
        part = ", ".join(filter(None, [begin, end]))
    return f"places {segment.start:,}–{segment.stop - 1:,} · positions {segment.position:,}–{last:,} · {part}"


def bad(record: collate.BadRecord) -> str:
    """Which document could not be read, and why."""
    return visible(f"unreadable: {record.source}, document {record.document} ({record.where}): {record.error}")


def image(image: rows_lib.Image) -> str:
    """Size of an image."""
    height, width = image.pixels.shape[:2]
    return f"image of {image.columns} × {image.rows} patches, {width} × {height} pixels"


def sound(sound: rows_lib.Sound) -> str:
    """Length of a sound."""
    return f"sound of {count(sound.n, 'frame')}, {sound.n * 0.05:.2f} s"


def gap(row: rows_lib.Row, start: int, stop: int) -> str:
    """What a stretch of padding is."""
    places = count(stop - start, "place")
    if stop < row.length:
        return f"hole of {places} ({start:,}–{stop - 1:,}): a document that could not be read"
    return f"padding, {places}" + (", of which unreadable documents may be a part" if row.bad else "")


def hidden(row: rows_lib.Row, start: int, stop: int) -> str:
    """What the window leaves out."""
    return f"places {start:,}–{stop - 1:,} of {row.length:,} are not shown (--from, --tokens)"


Piece = rows_lib.Segment | tuple[int, int] | str
"""A segment, a gap ``(start, stop)``, or a remark about what is left out."""


def pieces(row: rows_lib.Row, *, window: tuple[int, int]) -> list[Piece]:
    """What a view shows of a row, in order."""
    start, stop = window
    if row.segments:
        start, stop = min(start, row.segments[0].shown[0]), max(stop, row.segments[-1].shown[1])
    gaps = [gap for gap in row.gaps if gap[0] < stop and gap[1] > start]
    inside: list[Piece] = sorted([*row.segments, *gaps], key=lambda piece: piece.start if isinstance(piece, rows_lib.Segment) else piece[0])
    before = [hidden(row, 0, start)] if start > 0 else []
    after = [hidden(row, stop, row.length)] if stop < row.length else []
    return [*before, *inside, *after]
