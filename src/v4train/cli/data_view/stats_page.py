"""A mixture as one HTML page: the table, what rows hold, lengths of documents, phases."""

import html

from v4train.cli.data_view import histogram, stats_table, words
from v4train.cli.html_page import frame, scale, style, table
from v4train.data.inspection import statistics

_KEY = '<span><i class="c0"></i>share of the documents</span><span><i class="line c1"></i>share of the tokens</span>'
RULES = (
    histogram.RULES
    + """
.bar-key{margin:0 0 8px;font-size:13px;color:var(--soft)}
.bar-key span{margin-right:18px}
.bar-key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;background:var(--c)}
.bar-key i.pad{background:var(--panel);border:1px solid var(--rule)}
.bar-key i.line{height:3px;border-radius:0;vertical-align:3px;width:16px}
"""
)


def page(measured: statistics.Statistics, *, name: str, heading: str) -> str:
    """The whole document."""
    sources = measured.sources
    bins = histogram_bins(sources)
    rows = tuple(sorted({phase.shape.sequence_length for phase in measured.phases}))
    drawings = "".join(histogram.lengths(source, bins=bins, rows=rows) for source in sources)
    lengths = f'<p class="bar-key">{_KEY}</p><div class="grid2">{drawings}</div>'
    body = (
        f'<header><h1>{html.escape(name)}: data</h1><p class="sub">{html.escape(words.visible(heading))}. '
        f"Data fingerprint <code>{html.escape(measured.fingerprint[:12])}</code>.</p></header>{_tiles(measured)}"
        f"{frame.section('Sources', _tables(measured))}"
        f"{frame.section('Fill', histogram.places(sources))}"
        f"{frame.section('Lengths of documents', lengths)}"
        f"{frame.section('Phases', _phases(measured))}"
    )
    return frame.document(body, title=f"{name}: data", sheet=style.sheet(RULES))


def histogram_bins(sources: tuple[statistics.Source, ...]) -> range:
    """The powers of two that hold all documents of all sources."""
    used = [power for source in sources for power, n in enumerate(source.lengths.documents) if n]
    return range(min(used), max(used) + 1)


def _tiles(measured: statistics.Statistics) -> str:
    drawn, tokens = sum(source.drawn for source in measured.sources), sum(sum(source.tokens.values()) for source in measured.sources)
    return table.tiles(
        [
            ("Sources", f"{len(measured.sources)}", ""),
            ("Documents", f"{sum(source.documents for source in measured.sources):,}", "without those held out"),
            ("Tokens stored", scale.count(tokens), "trained on"),
            ("Steps", f"{measured.steps:,}", f"{measured.rows:,} rows"),
            ("Tokens drawn", scale.count(drawn), "by the end of training"),
            ("Fill", f"{drawn / max(1, measured.places):.1%}", "over the whole training"),
        ]
    )


def _table(measured: statistics.Statistics, heads: tuple[str, ...], *, caption: str) -> str:
    found = {source.name: stats_table.cells(source, measured=measured) for source in measured.sources}
    rows = [[table.head(name), *(table.cell(cells[head]) for head in heads)] for name, cells in found.items()]
    return table.table(["source", *heads], rows, caption=caption)


def _tables(measured: statistics.Statistics) -> str:
    stored = (*stats_table.STORED[:-1], *stats_table.LENGTHS, stats_table.STORED[-1])
    caption = "Stored, in tokens, without what is held out; mean, median and longest document"
    return _table(measured, stored, caption=caption) + _table(measured, stats_table.DRAWN, caption=stats_table.drawn_title(measured))


def _phases(measured: statistics.Statistics) -> str:
    if len(measured.phases) < 2:
        return ""
    heads = ["from step", "rows", "tokens a row", "patches", "audio frames", *(source.name for source in measured.sources)]
    rows = [
        [
            table.head(f"{phase.first_step:,}"),
            *(table.cell(f"{n:,}") for n in phase.shape),
            *(table.cell(f"{float(w):.2%}") for w in phase.weights),
        ]
        for phase in measured.phases
    ]
    return table.table([html.escape(head) for head in heads], rows, caption="Shape of batches and shares of the sources")
