"""Rows of a batch in the terminal.

Colour tells segments apart and comes back after six; a token that the loss does not ask for is dim and underlined, a special token
is reversed. Where there are no colours (a pipe, ``NO_COLOR``), what is not asked for stands between ⟦ and ⟧. Images are
drawn with half blocks, two pixels a character, if the terminal has the colours; sound is drawn as the loudness of its frames.
"""

import itertools

import numpy as np
import rich.console
import rich.rule
import rich.text

from v4train.cli.data_view import words
from v4train.data.inspection import look as look_lib
from v4train.data.inspection import rows as rows_lib

SEGMENTS = ("cyan", "yellow", "green", "magenta", "blue", "red")
MODALITIES = ("", "bold yellow", "bold magenta")
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST_IMAGE = 48  # characters


def show(look: look_lib.Look, *, console: rich.console.Console, heading: str, window: tuple[int, int]) -> None:
    """Prints a step."""
    coloured = console.is_terminal and not console.no_color
    console.print(rich.text.Text(heading, style="bold"), soft_wrap=not console.is_terminal)
    console.print(_legend(look, coloured=coloured))
    for bad in look.bad:
        console.print(rich.text.Text(words.bad(bad), style="red"))
    for row in look.rows:
        console.print()
        console.print(rich.rule.Rule(rich.text.Text(f"row {row.number} · {row.source}", style="bold"), align="left", style="dim"))
        console.print(rich.text.Text(words.row(row), style="dim"))
        if coloured:
            console.print(_strip(row, width=console.width))
        for piece in words.pieces(row, window=window):
            _piece(piece, row=row, console=console, coloured=coloured)


def _legend(look: look_lib.Look, *, coloured: bool) -> rich.text.Text:
    if not coloured:
        return rich.text.Text("⟦ ⟧: not asked for by the loss")
    legend = rich.text.Text().append("colour: segment", style=SEGMENTS[0])
    for name, style in (("dim underlined: not asked for by the loss", "dim underline"), ("reversed: special token", "reverse")):
        legend.append("  ")
        legend.append(name, style=style)
    return legend


def _strip(row: rows_lib.Row, *, width: int) -> rich.text.Text:
    """The row as a line of blocks: colour by segment, height by modality, nothing for padding."""
    strip = rich.text.Text()
    edges = np.linspace(0, row.length, min(width, row.length) + 1).astype(int)
    for a, b in itertools.pairwise(edges.tolist()):
        number, kind = int(row.segment_ids[a]), int(row.modality[a:b].max())
        strip.append(" " if not number else "▂▆█"[kind], style=_colour(number))
    return strip


def _colour(segment: int) -> str:
    return SEGMENTS[(segment - 1) % len(SEGMENTS)] if segment else ""


def _piece(piece: words.Piece, *, row: rows_lib.Row, console: rich.console.Console, coloured: bool) -> None:
    if isinstance(piece, str):
        console.print(rich.text.Text(f"… {piece} …", style="dim"))
    elif isinstance(piece, tuple):
        console.print(rich.text.Text(f"[{words.gap(row, *piece)}]", style="dim"))
    else:
        colour = _colour(piece.number)
        console.print(rich.text.Text(f"segment {piece.number} · {words.segment(piece)}", style=f"bold {colour}"))
        for media, parts in itertools.groupby(piece.parts, key=lambda part: not isinstance(part, rows_lib.Text)):
            if media:
                for part in parts:
                    console.print(_media(part, coloured=coloured))
            else:
                console.print(_text(list(parts), colour=colour, coloured=coloured), soft_wrap=False)


def _text(parts: list[rows_lib.Part], *, colour: str, coloured: bool) -> rich.text.Text:
    text = rich.text.Text()
    texts = [part for part in parts if isinstance(part, rows_lib.Text)]
    for asked, same in itertools.groupby(texts, key=lambda part: part.asked > 0):
        if not coloured:
            words_of = "".join(words.visible(part.text) for part in same)
            text.append(words_of if asked else f"⟦{words_of}⟧")
            continue
        for part in same:
            style = f"{colour}{'' if asked else ' dim underline'}{' reverse' if part.special else ''}"
            text.append(words.visible(part.text), style=style)
    return text


def _media(part: rows_lib.Part, *, coloured: bool) -> rich.text.Text:
    if isinstance(part, rows_lib.Image):
        caption = rich.text.Text(f"[{words.image(part)}]", style=MODALITIES[1])
        return rich.text.Text("\n").join([*_picture(part.pixels), caption]) if coloured else caption
    assert isinstance(part, rows_lib.Sound)
    loud = part.frames.astype(float).mean(axis=1) / 15
    wave = "".join(_BLOCKS[min(int(x * len(_BLOCKS)), len(_BLOCKS) - 1)] for x in loud)
    return rich.text.Text(f"[{words.sound(part)}] {wave}", style=MODALITIES[2])


def _picture(pixels: np.ndarray) -> list[rich.text.Text]:
    """Two pixels a character: the upper one is ink, the lower one ground. Large images are averaged down."""
    factor = -(-pixels.shape[1] // _WIDEST_IMAGE)
    height, width = (size // factor * factor for size in pixels.shape[:2])
    small = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3).mean(axis=(1, 3)).astype(int)
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        line = rich.text.Text()
        for a, b in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", style=f"rgb({a[0]},{a[1]},{a[2]}) on rgb({b[0]},{b[1]},{b[2]})")
        lines.append(line)
    return lines
