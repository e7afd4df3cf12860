"""Tables and tiles, as HTML."""

import html
import math


def table(head: list[str], rows: list[list[str]], *, caption: str, text: bool = False) -> str:
    """A table that scrolls by itself.

    Args:
        head: HTML of the column heads; "" heads a column of bars.
        rows: HTML of whole cells, ``<th>`` or ``<td>`` included.
        caption: as text.
        text: the cells are words, not numbers.
    """
    heads = "".join(f'<th scope="col">{name}</th>' if name else '<td class="bar"></td>' for name in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll table{" texts" if text else ""}" tabindex="0" role="group" aria-label="{html.escape(caption)}">'
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def head(text: str) -> str:
    """The cell that names a row."""
    return f'<th scope="row">{html.escape(text)}</th>'


def cell(text: str) -> str:
    """A cell of text."""
    return f"<td>{html.escape(text)}</td>"


def tiles(figures: list[tuple[str, str, str]]) -> str:
    """A row of large figures: name, value and remark each, as text."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}{f'<small>{html.escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in figures
    )
    columns = math.ceil(len(figures) / math.ceil(len(figures) / 7))
    return f'<dl class="tiles" style="--columns:{columns}">{cells}</dl>'
