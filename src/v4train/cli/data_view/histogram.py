"""Pictures of a mixture: how long documents are, and what the places of rows hold. Static drawings with their values in titles."""

import html

from v4train.cli.html_page import scale
from v4train.data.inspection import statistics

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 190, 44, 8, 12, 42  # px
_LABEL, _FIGURE, _BAR, _GAP = 130, 60, 20, 10  # px
RULES = """
rect.documents{fill:var(--c0);opacity:.75}
path.tokens{fill:none;stroke:var(--c1);stroke-width:2}
circle.tokens{fill:var(--c1)}
path.row-length{stroke:var(--ink);stroke-dasharray:4 3;fill:none}
text.row-length{fill:var(--ink)}
rect.part{fill:var(--c)}
rect.padding{fill:var(--panel);stroke:var(--rule)}
text.source-name{fill:var(--ink);text-anchor:end;font-size:13px}
"""


def lengths(source: statistics.Source, *, bins: range, rows: tuple[int, ...]) -> str:
    """Lengths of a source's documents: bars are shares of the documents, the line shares of the tokens.

    Args:
        source: of the documents.
        bins: powers of two that the axis covers, the same for all sources that are compared.
        rows: lengths of rows, drawn as upright lines.
    """
    found = source.lengths
    documents, tokens = (_shares(counts, bins) for counts in (found.documents, found.tokens))
    top = max(*documents, *tokens)
    step = (_WIDTH - _LEFT - _RIGHT) / len(bins)

    def x(power: float) -> float:
        return _LEFT + (power - bins.start) * step

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _BOTTOM - _TOP)

    bars, points = [], []
    for power, a, b in zip(bins, documents, tokens, strict=True):
        span = f"{2**power:,}–{2 ** (power + 1) - 1:,} tokens"
        bars.append(
            f'<rect class="documents" x="{x(power) + 1:.1f}" y="{y(a):.1f}" width="{step - 2:.1f}" height="{y(0) - y(a):.1f}">'
            f"<title>{span}: {a:.1%} of the documents</title></rect>"
        )
        points.append((x(power + 0.5), y(b), f"{span}: {b:.1%} of the tokens"))
    line = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
    dots = "".join(f'<circle class="tokens" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{text}</title></circle>' for px, py, text in points)
    name = html.escape(source.name)
    label = f"{name}: documents of {found.median:,.0f} tokens in the median, {found.mean:,.0f} in the mean, {found.longest:,} at most"
    return (
        f'<figure><figcaption><h3>{name}</h3><span class="unit">median {found.median:,.0f}, mean {found.mean:,.0f}, '
        f"longest {found.longest:,} tokens</span></figcaption>"
        f'<div class="plot"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{_axes(bins, top, x=x, y=y)}'
        f'{"".join(bars)}<path class="tokens" d="{line}"/>{dots}{_row_lengths(rows, bins, x=x)}</svg></div></figure>'
    )


def _shares(counts: tuple[int, ...], bins: range) -> list[float]:
    total = max(1, sum(counts))
    return [counts[power] / total if power < len(counts) else 0.0 for power in bins]


def _axes(bins: range, top: float, *, x, y) -> str:
    ticks = scale.nice_ticks(0, top, wanted=4)
    lines = "".join(f'<path class="grid" d="M{_LEFT},{y(tick):.1f}H{_WIDTH - _RIGHT}"/>' for tick in ticks if tick)
    labels = "".join(f'<text class="y" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:.0%}</text>' for tick in ticks)
    stride = -(-len(bins) // 9)
    powers = [power for power in range(bins.start, bins.stop + 1) if (power - bins.start) % stride == 0]
    below = "".join(f'<text class="x" x="{x(power):.1f}" y="{_HEIGHT - _BOTTOM + 16}">{_power(power)}</text>' for power in powers)
    name = f'<text class="name" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}">tokens of a document, logarithmic</text>'
    return f'{lines}<path class="base" d="M{_LEFT},{y(0):.1f}H{_WIDTH - _RIGHT}"/>{labels}{below}{name}'


def _power(power: int) -> str:
    """``2^power`` in binary thousands, which are what lengths of rows are said in."""
    for exponent, suffix in ((30, "G"), (20, "M"), (10, "K")):
        if power >= exponent:
            return f"{2 ** (power - exponent)}{suffix}"
    return str(2**power)


def _row_lengths(rows: tuple[int, ...], bins: range, *, x) -> str:
    drawn = []
    for i, length in enumerate(rows):
        power = length.bit_length() - 1
        at = x(power + length / 2**power - 1)
        if bins.start <= power < bins.stop:
            side, anchor = (-5, "end") if at > _WIDTH * 0.7 else (5, "start")
            drawn.append(
                f'<path class="row-length" d="M{at:.1f},{_TOP}V{_HEIGHT - _BOTTOM}"/>'
                f'<text class="row-length" x="{at + side:.1f}" y="{_TOP + 9 + 13 * i}" text-anchor="{anchor}">row of {length:,}</text>'
            )
    return "".join(drawn)


def places(sources: tuple[statistics.Source, ...]) -> str:
    """What the places of each source's rows hold: tokens by modality, and padding; a bar a source."""
    width = _WIDTH * 2
    room = width - _LABEL - _FIGURE - _RIGHT
    bars = []
    for i, source in enumerate(sources):
        y, at = i * (_BAR + _GAP), float(_LABEL)
        total = max(1, sum(source.tokens.values()))
        parts = [(name, f"part c{j}", n / total * source.fill) for j, (name, n) in enumerate(source.tokens.items())]
        cells = []
        for name, kind, share in [*parts, ("padding", "padding", 1 - source.fill)]:
            if share > 0:
                cells.append(f'<rect class="{kind}" x="{at:.1f}" y="{y}" width="{share * room:.1f}" height="{_BAR}">')
                cells.append(f"<title>{html.escape(source.name)}: {name} {share:.1%} of the places</title></rect>")
                at += share * room
        bars.append(
            f'<text class="source-name" x="{_LABEL - 10}" y="{y + 15}">{html.escape(source.name)}</text>{"".join(cells)}'
            f'<text x="{_LABEL + room + 8}" y="{y + 15}">{source.fill:.1%}</text>'
        )
    label = "; ".join(f"{source.name} {source.fill:.1%}" for source in sources)
    keys = [*((f"c{i}", name) for i, name in enumerate(("text", "image", "audio"))), ("pad", "padding")]
    legend = "".join(f'<span><i class="{hue}"></i>{name}</span>' for hue, name in keys)
    return (
        f'<figure><figcaption><h3>What rows hold</h3><span class="unit">share of the places; the figure is the fill</span></figcaption>'
        f'<p class="bar-key">{legend}</p><div class="plot"><svg viewBox="0 0 {width} {len(sources) * (_BAR + _GAP)}" role="img" '
        f'aria-label="Fill: {html.escape(label)}">{"".join(bars)}</svg></div></figure>'
    )
