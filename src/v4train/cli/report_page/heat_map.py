"""Expert load as a heat map: one row a layer, one column an expert, colour by the multiple of the uniform load.

The scale is logarithmic and centred at 1: an expert with half its share is as far from the centre as one with twice its share, and a
linear scale could not show both an idle and a fourfold expert. It is diverging (blue below, orange above), which readers with any of
the usual colour deficiencies can tell apart, and cut into 25 steps, so that a cell carries a class name and not a colour: the
same cells serve the light page, the dark page and print. An expert that no token chose has a class of its own.

Rows of very many experts are folded: neighbours share a cell, which shows the busiest of them. That keeps the page small (61 layers
of 384 experts are 23,424 experts) and hides no hot spot; cold ones are counted in the caption.
"""

import html
import json
import math

import numpy as np

from v4train.cli.report_page import runs as runs_lib

STEPS = 25  # classes h0 .. h24; h12 is the uniform share
EXTREME = 2.0  # binary orders of magnitude at either end of the scale: 1/4 and 4 times the uniform load
MOST_COLUMNS = 128
SWATCH = 9  # px
LEGEND_MARGIN = 14  # px, half the width of the labels at its ends
WIDTH, TOP, BOTTOM, ROW_MARGIN = 1140, 8, 38, 70  # px
CHARACTER = 6.9  # px, width of a letter of a row's label


def cell_class(load: float) -> str:
    """``h0``..``h24``, ``never`` for 0, ``gap`` for NaN."""
    if not math.isfinite(load):
        return "gap"
    if load <= 0:
        return "never"
    place = max(-1.0, min(1.0, math.log2(load) / EXTREME))
    return f"h{round((place + 1) / 2 * (STEPS - 1))}"


def figure(run: runs_lib.Run, *, title: str, number: int) -> str:
    """The heat map of the run's last expert line as a figure element; "" if it has none.

    All modalities travel in the page; the script changes the cells when another one is chosen.
    """
    if not run.experts:
        return ""
    newest = run.experts[-1]
    names = sorted(newest.load, key=lambda name: (name != "all", _rank(name)))
    folded = {name: _fold(newest.load[name]) for name in names}
    first = newest.load[names[0]]
    group = math.ceil(first.shape[1] / MOST_COLUMNS)
    choice = _choice(names, number=number) if len(names) > 1 else ""
    only = "" if choice else f", {names[0]} tokens"
    never = any((table == 0).any() for table in folded.values())
    captions = {name: _caption(newest.load[name], layers=newest.layers) for name in names}
    folding = f" Each cell is the busiest of {group} neighbouring experts." if group > 1 else ""
    return (
        f'<figure class="heat" data-heat><figcaption><h3>{html.escape(title)}</h3>'
        f'<span class="unit">step {newest.step:,}, multiple of the uniform load{html.escape(only)}</span></figcaption>'
        f'<div class="heat-head">{choice}{_legend(never)}</div>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{html.escape(title)}">'
        f"{_svg(folded[names[0]], layers=newest.layers, group=group, experts=first.shape[1], name=names[0])}</div>"
        f'<p class="remark"><span class="heat-caption">{html.escape(captions[names[0]])}</span>{folding}</p>'
        f'<script type="application/json">{_data(folded, captions=captions)}</script></figure>'
    )


def _choice(names: list[str], *, number: int) -> str:
    items = "".join(
        f'<label><input type="radio" name="heat{number}" value="{html.escape(name)}"{" checked" if i == 0 else ""}>'
        f"<span>{html.escape(name)}</span></label>"
        for i, name in enumerate(names)
    )
    return f'<div class="choice heat-choice" role="radiogroup" aria-label="Modality" hidden>{items}</div>'


def _data(folded: dict[str, np.ndarray], *, captions: dict[str, str]) -> str:
    """What the script needs to show another modality, as JSON that is safe inside a script element."""
    data = {
        "classes": {name: [[cell_class(value) for value in row] for row in table.tolist()] for name, table in folded.items()},
        "load": {name: [[None if math.isnan(v) else round(v, 2) for v in row] for row in table.tolist()] for name, table in folded.items()},
        "captions": captions,
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _rank(name: str) -> int:
    return runs_lib.MODALITIES.index(name) if name in runs_lib.MODALITIES else len(runs_lib.MODALITIES)


def _fold(load: np.ndarray) -> np.ndarray:
    """f64[L, E] -> f64[L, at most MOST_COLUMNS]: the maximum of each group of neighbours."""
    group = math.ceil(load.shape[1] / MOST_COLUMNS)
    return np.fmax.reduceat(load, np.arange(0, load.shape[1], group), axis=1)


def _caption(load: np.ndarray, *, layers: tuple[str, ...]) -> str:
    if not np.isfinite(load).any():
        return "No load was logged."
    layer, expert = np.unravel_index(np.nanargmax(load), load.shape)
    idle, low = int((load == 0).sum()), int(((load > 0) & (load < 0.25)).sum())
    total = int(np.isfinite(load).sum())
    text = f"Busiest: layer {layers[layer]}, expert {expert}, at {load[layer, expert]:.2f} times the uniform load."
    if low:
        text += f" Below a quarter of it: {low:,} of {total:,} experts."
    if idle:
        text += f" Never chosen: {idle:,} of {total:,} experts."
    return text


def _legend(with_never: bool) -> str:
    swatches = "".join(f'<rect class="h{i}" x="{LEGEND_MARGIN + i * SWATCH}" width="{SWATCH}" height="12"/>' for i in range(STEPS))
    places = ((0.0, "≤ ¼"), (0.25, "½"), (0.5, "1"), (0.75, "2"), (1.0, "≥ 4"))
    texts = "".join(
        f'<text x="{LEGEND_MARGIN + SWATCH / 2 + place * (STEPS - 1) * SWATCH:.0f}" y="25">{label}</text>' for place, label in places
    )
    label = "Colour scale from a quarter of the uniform load, blue, over 1 to four times, orange"
    picture = f'<svg width="{STEPS * SWATCH + 2 * LEGEND_MARGIN}" height="30" role="img" aria-label="{label}">{swatches}{texts}</svg>'
    square = '<svg width="14" height="12" aria-hidden="true"><rect class="never" width="14" height="12"/></svg>'
    never = f'<span class="never-key">{square}never chosen</span>' if with_never else ""
    return f'<div class="heat-legend">{picture}{never}</div>'


def _svg(load: np.ndarray, *, layers: tuple[str, ...], group: int, experts: int, name: str) -> str:
    rows, columns = load.shape
    pitch = max(9, min(26, 640 // rows))
    left = min(240.0, 20 + CHARACTER * max(map(len, layers)))
    width = (WIDTH - left - ROW_MARGIN) / columns
    bottom = TOP + rows * pitch
    stride = math.ceil(11 / pitch)
    parts = [f'<text class="max-head" x="{WIDTH - 8}" y="{bottom + 17}">busiest</text>']
    for i, (label, values) in enumerate(zip(layers, load.tolist(), strict=True)):
        y = TOP + i * pitch
        if i % stride == 0:
            shown, middle = label if len(label) <= 32 else f"{label[:31]}…", y + pitch / 2 + 4
            busiest = max((value for value in values if not math.isnan(value)), default=math.nan)
            parts.append(f'<text class="row-name" x="{left - 8:.0f}" y="{middle:.0f}">{html.escape(shown)}</text>')
            parts.append(f'<text class="row-max" data-row="{i}" x="{WIDTH - 8}" y="{middle:.0f}">{_times(busiest)}</text>')
        names = [f"{label}, {_experts(j, group=group, experts=experts)}" for j in range(columns)]
        parts.append(f'<g class="cells">{_cells(values, names=names, left=left, y=y, width=width, pitch=pitch)}</g>')
    step = next(2**power for power in range(32) if experts / 2**power <= 17)
    for expert in range(0, experts, step):
        parts.append(f'<text class="x" x="{left + (expert // group + 0.5) * width:.1f}" y="{bottom + 17}">{expert}</text>')
    parts.append(f'<text class="name" x="{left + columns * width / 2:.0f}" y="{bottom + BOTTOM - 4}">expert</text>')
    spoken = html.escape(f"Load of {experts} experts in {rows} layers, {name} tokens")
    return f'<svg class="cells-of" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'


def _cells(values: list[float], *, names: list[str], left: float, y: int, width: float, pitch: int) -> str:
    gap = 1 if min(width, pitch) > 6 else 0
    return "".join(
        f'<rect class="{cell_class(value)}" x="{left + j * width:.1f}" y="{y}" width="{width - gap:.1f}" height="{pitch - gap}">'
        f"<title>{html.escape(name)}: {_times(value)}</title></rect>"
        for j, (value, name) in enumerate(zip(values, names, strict=True))
    )


def _experts(column: int, *, group: int, experts: int) -> str:
    if group == 1:
        return f"expert {column}"
    return f"experts {column * group} to {min(experts, (column + 1) * group) - 1}, busiest"


def _times(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}×"
