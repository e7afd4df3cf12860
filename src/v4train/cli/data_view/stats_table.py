"""The columns of the mixture's table, and the table in the terminal."""

import rich.console
import rich.table
import rich.text

from v4train.cli.html_page import scale
from v4train.data.inspection import statistics

STORED = ("documents", "text", "image", "audio", "held out", "store")
LENGTHS = ("mean", "median", "longest")
DRAWN = ("asked", "rows", "of rows", "epochs", "fill", "packing")
_BLOCKS = " ▁▂▃▄▅▆▇█"


def cells(source: statistics.Source, *, measured: statistics.Statistics) -> dict[str, str]:
    """Head -> what the column says about a source."""
    stored = [
        f"{source.documents:,}",
        *(scale.count(n) if n else "–" for n in source.tokens.values()),
        f"{source.held_out_share:.1%}",
        source.fingerprint[:8],
    ]
    lengths = [f"{source.lengths.mean:,.0f}", f"{source.lengths.median:,.0f}", f"{source.lengths.longest:,}"]
    drawn = [
        f"{source.asked:.2%}",
        f"{source.rows:,}",
        f"{source.rows / max(1, measured.rows):.2%}",
        f"{source.epochs:.3g}",
        f"{source.fill:.1%}",
        source.packing,
    ]
    return dict(zip((*STORED, *LENGTHS, *DRAWN), (*stored, *lengths, *drawn), strict=True))


def drawn_title(measured: statistics.Statistics) -> str:
    """What the figures of `DRAWN` are of."""
    return f"Drawn in {measured.steps:,} steps: {measured.rows:,} rows with {scale.count(measured.places)} places"


def show(measured: statistics.Statistics, *, console: rich.console.Console, heading: str) -> None:
    """Prints a mixture: what is stored, how long documents are, what training draws; narrow tables, for 80 columns."""
    console.print(rich.text.Text(heading, style="bold"), soft_wrap=not console.is_terminal)
    parts = (("Stored, in tokens, without what is held out", STORED), ("Tokens of a document", LENGTHS), (drawn_title(measured), DRAWN))
    for title, heads in parts:
        grid = rich.table.Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        grid.add_column("source")
        for head in heads:
            grid.add_column(head, justify="left" if head == "packing" else "right")
        if heads is LENGTHS:
            grid.add_column("by powers of two")
        for source in measured.sources:
            found = cells(source, measured=measured)
            texts = [source.name, *(found[head] for head in heads), *([_lengths(source)] if heads is LENGTHS else [])]
            grid.add_row(*(rich.text.Text(text) for text in texts))
        console.print()
        console.print(grid)


def _lengths(source: statistics.Source) -> str:
    """``1 ▁▃█▂ 4,096``: a block for each power of two, from the shortest documents to the longest."""
    counts = source.lengths.documents
    first = next(power for power, n in enumerate(counts) if n)
    top = max(counts)
    blocks = "".join(_BLOCKS[-(-n * (len(_BLOCKS) - 1) // top)] for n in counts[first:])
    return f"{2**first:,} {blocks} {2 ** len(counts):,}"
