"""Draw line charts as SVG, once here and again in the browser.

The drawing made here is complete: it shows without JavaScript and in print. The script (`script`) draws the same curves again from
the data in the page, so that the chart fits the width it gets (text stays 12 px on a phone) and the abscissa can be changed to
tokens, time or logarithms. To keep the two from drifting apart, the browser decides nothing: ranges, ticks and labels of every
abscissa come from here; it only projects numbers to pixels, with the six lines of arithmetic in `_project`.
"""

import html
import json
import math
from collections.abc import Sequence

import numpy as np

from v4train.cli.html_page import scale
from v4train.cli.report_page import curves, events

NARROW, WIDE, HEIGHT = 560, 1140, 270  # px; the browser replaces the widths
TOP, RIGHT, BOTTOM, LEFT = 12, 22, 40, 58  # margins, px
STYLES = 8  # colours in the palette
MARKERS = (  # one a style, drawn from its centre, in an order that also tells neighbours apart without colour
    "m-3.2,0a3.2,3.2 0 1,0 6.4,0a3.2,3.2 0 1,0 -6.4,0z",
    "m-3,-3h6v6h-6z",
    "m0,-4l3.8,6.8h-7.6z",
    "m0,-4.3l4.3,4.3l-4.3,4.3l-4.3,-4.3z",
    "m0,4l3.8,-6.8h-7.6z",
    "m-4,-1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
    "m-4,-2h8v4h-8z",
    "m-2,-4h4v8h-4z",
)
MARKER_GAP = 22  # px between marked points of one curve, at least; the last point is always marked
JOINED = 4  # held-out points, at least, that are joined by dots: a line through two would claim what nobody measured
TIME_UNITS = ((180, 1, "s"), (3 * 3600, 60, "min"), (72 * 3600, 3600, "hours"), (math.inf, 86400, "days"))


def axes(abscissas: list[curves.Abscissa]) -> dict[str, dict]:
    """The choices of the abscissa: clock -> name, scale factor, and range and ticks, linear and logarithmic (None if impossible)."""
    found = {}
    for clock in curves.CLOCKS:
        values = np.concatenate([a.clocks[clock] for a in abscissas]) if abscissas else np.zeros(0)
        values = values[np.isfinite(values)]
        if not values.size or values.max() <= 0:
            continue
        divisor, name = 1.0, {"step": "step", "tokens": "tokens"}.get(clock, "")
        if clock == "seconds":
            divisor, unit = next((divisor, unit) for limit, divisor, unit in TIME_UNITS if values.max() < limit)
            name = f"time, {unit}"
        values = values / divisor
        positive = values[values > 0]
        linear = _axis(min(0.0, values.min()), values.max(), ticks=scale.nice_ticks(0, values.max(), wanted=9))
        log = None
        if positive.min() * 3 < positive.max():
            log = _axis(positive.min(), positive.max(), ticks=scale.log_ticks(positive.min(), positive.max(), wanted=10))
        found[clock] = {"name": name, "divisor": divisor, "linear": linear, "log": log}
    return found


def page_data(
    charts: list[curves.Chart], *, abscissas: list[curves.Abscissa], choices: dict[str, dict], marks: Sequence[events.Mark] = ()
) -> str:
    """What the script needs, as JSON that is safe inside a script element."""
    data = {
        "margins": [TOP, RIGHT, BOTTOM, LEFT],
        "height": HEIGHT,
        "markers": MARKERS,
        "markerGap": MARKER_GAP,
        "joined": JOINED,
        "choices": {clock: {key: value for key, value in choice.items() if key != "divisor"} for clock, choice in choices.items()},
        "abscissas": [_by_clock(a, choices) for a in abscissas],
        "marks": [{"style": mark.style, "label": mark.label, "ends": _by_clock(mark.ends, choices)} for mark in marks],
        "charts": [_chart_data(chart) for chart in charts],
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def figure(
    chart: curves.Chart,
    *,
    number: int,
    abscissas: list[curves.Abscissa],
    choices: dict[str, dict],
    wide: bool,
    marks: Sequence[events.Mark] = (),
) -> str:
    """The chart as a figure element; ``number`` is its place in the list given to `page_data`."""
    title = html.escape(chart.title)
    remark = f'<p class="remark">{html.escape(chart.remark)}</p>' if chart.remark else ""
    return (
        f'<figure class="chart{" wide" if wide else ""}" data-chart="{number}"><figcaption><h3>{title}</h3>'
        f'<span class="unit">{html.escape(chart.unit)}</span></figcaption>{_legend(chart)}'
        f'<div class="plot">{_svg(chart, number=number, abscissas=abscissas, choices=choices, marks=marks, width=WIDE if wide else NARROW)}'
        f'<div class="tip" hidden></div></div>{remark}</figure>'
    )


def swatch(style: int, *, marker: bool = True) -> str:
    """A short piece of the curve of this style, for legends."""
    shape = f'<path class="mark" d="M13,7{MARKERS[style % STYLES]}"/>' if marker else ""
    return f'<svg class="swatch c{style % STYLES}" width="26" height="14" aria-hidden="true"><path class="line" d="M1,7H25"/>{shape}</svg>'


def _axis(low: float, high: float, *, ticks: list[float]) -> dict:
    inside = [tick for tick in ticks if low <= tick <= high * (1 + 1e-9)]
    return {"low": _number(low), "high": _number(high), "ticks": list(map(list, zip(inside, scale.tick_labels(inside), strict=True)))}


def _legend(chart: curves.Chart) -> str:
    keys = {curve.key: curve.style for curve in chart.curves}
    if len(keys) < 2:
        return ""
    marked = {curve.key for curve in chart.curves if curve.role in ("points", "marked")}
    items = (f"<li>{swatch(style, marker=key in marked)}{html.escape(key)}</li>" for key, style in keys.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _describe(chart: curves.Chart) -> str:
    """The chart in a sentence, for those who cannot see it."""
    parts = []
    for curve in chart.curves:
        values = curve.values[np.isfinite(curve.values)]
        if curve.role != "raw":
            parts.append(f"{curve.label} from {scale.plain(values[0])} to {scale.plain(values[-1])}")
    return f"{chart.title}{f' ({chart.unit})' if chart.unit else ''}: {'; '.join(parts)}."


def _svg(
    chart: curves.Chart,
    *,
    number: int,
    abscissas: list[curves.Abscissa],
    choices: dict[str, dict],
    marks: Sequence[events.Mark],
    width: int,
) -> str:
    bottom = HEIGHT - BOTTOM
    x = choices["step"]["linear"] if "step" in choices else {"low": 0, "high": 1, "ticks": []}
    rows = "".join(
        f'<path class="grid" d="M{LEFT},{y:.1f}H{width - RIGHT}"/><text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">{label}</text>'
        for y, label in ((_project(tick, chart.low, chart.high, bottom, TOP, log=chart.log), label) for tick, label in _y_ticks(chart))
    )
    columns = "".join(
        f'<text class="x" x="{_project(tick, x["low"], x["high"], LEFT, width - RIGHT):.1f}" y="{bottom + 18}">{label}</text>'
        for tick, label in x["ticks"]
    )
    lines = "".join(_curve(curve, chart=chart, abscissa=abscissas[curve.abscissa], x=x, width=width) for curve in chart.curves)
    happened = "".join(_mark(mark, x=x, width=width) for mark in marks)
    clip = f'<rect x="{LEFT - 5}" y="{TOP - 5}" width="{width - LEFT - RIGHT + 10}" height="{bottom - TOP + 10}"/>'
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" tabindex="0" aria-label="{html.escape(_describe(chart))}">'
        f'<clipPath id="clip{number}">{clip}</clipPath><g class="rows">{rows}</g>'
        f'<path class="base" d="M{LEFT},{bottom}H{width - RIGHT}"/><g class="columns">{columns}</g>'
        f'<text class="name" x="{(LEFT + width - RIGHT) / 2:.0f}" y="{HEIGHT - 4}">step</text>'
        f'<g class="events">{happened}</g><g class="curves" clip-path="url(#clip{number})">{lines}</g><g class="cross"></g></svg>'
    )


def _mark(mark: events.Mark, *, x: dict, width: int) -> str:
    """A band from its begin to its end, which for a change is a line."""
    left, right = (_project(step, x["low"], x["high"], LEFT, width - RIGHT) for step in mark.ends.clocks["step"])
    band = f"M{left:.1f},{TOP}H{right:.1f}V{HEIGHT - BOTTOM}H{left:.1f}Z"
    return f'<path class="{mark.style}" d="{band}"><title>{html.escape(mark.label)}</title></path>'


def _by_clock(abscissa: curves.Abscissa, choices: dict[str, dict]) -> dict[str, list[float | None]]:
    return {clock: _numbers(abscissa.clocks[clock] / choices[clock]["divisor"]) for clock in choices}


def _y_ticks(chart: curves.Chart) -> list[tuple[float, str]]:
    ticks = scale.log_ticks(chart.low, chart.high, wanted=6) if chart.log else scale.nice_ticks(chart.low, chart.high, wanted=7)
    return list(zip(ticks, scale.tick_labels(ticks), strict=True))


def _curve(curve: curves.Curve, *, chart: curves.Chart, abscissa: curves.Abscissa, x: dict, width: int) -> str:
    pixels = [
        None
        if not math.isfinite(value)
        else (
            _project(step, x["low"], x["high"], LEFT, width - RIGHT),
            _project(value, chart.low, chart.high, HEIGHT - BOTTOM, TOP, log=chart.log),
        )
        for step, value in zip(abscissa.clocks["step"], curve.values, strict=True)
    ]
    colour = f"c{curve.style % STYLES}"
    points = [point for point in pixels if point is not None]
    joined = curve.role != "points" or len(points) >= JOINED
    path = f'<path class="{colour} {curve.role}" d="{_line(pixels)}"/>' if joined else ""
    if curve.role not in ("points", "marked") and len(points) > 1:
        return path
    marks, free = [], math.inf
    for px, py in reversed(points):
        if px <= free:
            marks.append(f"M{px:.1f},{py:.1f}{MARKERS[curve.style % STYLES]}")
            free = px - MARKER_GAP
    return f'{path}<path class="{colour} mark" d="{"".join(marks)}"/>'


def _line(pixels: list[tuple[float, float] | None]) -> str:
    """Path through the points; a gap lifts the pen."""
    parts, pen = [], "M"
    for point in pixels:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.1f},{point[1]:.1f}")
        pen = "L"
    return "".join(parts)


def _project(value: float, low: float, high: float, start: float, end: float, *, log: bool = False) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return start + (value - low) / (high - low) * (end - start)


def _chart_data(chart: curves.Chart) -> dict:
    drawn = [
        {"key": c.key, "label": c.label, "style": c.style % STYLES, "role": c.role, "abscissa": c.abscissa, "values": _numbers(c.values)}
        for c in chart.curves
    ]
    return {"low": chart.low, "high": chart.high, "log": chart.log, "curves": drawn}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) if math.isfinite(value) else None for value in values.tolist()]


def _number(value: float) -> float:
    """As short as a chart needs: whole numbers stay exact, others keep five digits."""
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")
