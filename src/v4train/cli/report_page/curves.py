"""Curves: what a line chart is made of, before it is drawn.

A run may have a million log lines, a chart has about a thousand pixels, and the page carries its data with it. Train curves are
therefore *thinned*: the lines are cut into buckets, and a bucket keeps its smallest and its largest value, in the order in which
they occurred, at its first and its last line. So no spike is lost (taking every n-th line would lose most of them), and all curves
of a run share one list of abscissas. Two thirds of the cuts are evenly spaced and one third geometrically, so that the first steps
are still there on a logarithmic axis.

Smoothing is a centred moving average, applied three times (nearly a Gaussian), with gaps left out of numerator and denominator. The
usual exponential average was rejected: it lags behind the curve, so a smoothed loss would lie above the held-out points while the
loss falls. For the same reason the window shrinks towards the first line, where a loss is steep; towards the last line, where it is
flat, it is cut in half instead.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from v4train.cli.html_page import scale
from v4train.cli.report_page import runs as runs_lib

BUCKETS = 270  # of a thinned curve, at most: two points each, about one a pixel in a chart of half the page's width
CLOCKS = ("step", "tokens", "seconds")  # what the abscissa may count


@dataclasses.dataclass(frozen=True)
class Abscissa:
    """Where the points of some curves lie: f64[n] per clock, NaN where it was not logged."""

    clocks: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line, or one set of markers.

    Attributes:
        label: what the reader sees when pointing at it.
        key: entry of the legend; curves of one key share colour and marker.
        style: index into the palette and the markers.
        role: ``raw`` (faint, behind), ``line``, ``marked`` (a line with markers), ``points`` (markers; many are joined by dots).
        abscissa: index into the page's list.
        values: f64[n], NaN for gaps.
    """

    label: str
    key: str
    style: int
    role: Literal["raw", "line", "marked", "points"]
    abscissa: int
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chart:
    """A titled set of curves with its ordinate.

    Attributes:
        unit: of the ordinate, in words.
        low, high: range of the ordinate.
        log: the ordinate is logarithmic (then ``low`` > 0).
        remark: what the reader must know to read it, or "".
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    low: float
    high: float
    log: bool = False
    remark: str = ""


def abscissa(run: runs_lib.Run, *, steps: np.ndarray) -> Abscissa:
    """The clocks of a run at the given steps."""
    clocks = {field: runs_lib.clock(run, steps=steps, field=field) for field in CLOCKS[1:]}
    return Abscissa({"step": steps.astype(float), **clocks})


def kept(count: int) -> np.ndarray:
    """Indices of the lines whose abscissa a thinned curve keeps: i64[at most 2 BUCKETS]."""
    if count <= 2 * BUCKETS:
        return np.arange(count)
    edges = _edges(count)
    return np.stack([edges[:-1], edges[1:] - 1], axis=1).reshape(-1)


def thin(values: np.ndarray) -> np.ndarray:
    """f64[n] -> f64[len(kept(n))]: smallest and largest value of each bucket, in order of occurrence."""
    if len(values) <= 2 * BUCKETS:
        return values
    pairs = []
    for start, end in itertools.pairwise(_edges(len(values))):
        bucket = values[start:end][np.isfinite(values[start:end])]
        pair = (bucket.min(), bucket.max()) if bucket.size else (np.nan, np.nan)
        pairs.extend(pair if not bucket.size or bucket.argmin() <= bucket.argmax() else pair[::-1])
    return np.array(pairs)


def half_window(count: int) -> int:
    """Lines on either side that one pass of `smooth` averages for a curve of so many lines; 0 leaves short curves as they are."""
    return min(count // 80, 200)


def smooth(values: np.ndarray, *, half: int) -> np.ndarray:
    """f64[n] -> f64[n]: three centred moving averages of ``2 half + 1`` lines over the finite values; NaN where none is in reach."""
    if half == 0:
        return values
    finite = np.isfinite(values)
    total, weight = np.where(finite, values, 0.0), finite.astype(float)
    for _ in range(3):
        total, weight = _moving_sum(total, half=half), _moving_sum(weight, half=half)
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=_moving_sum(finite.astype(float), half=half) > 0.5)


def chart(title: str, *, unit: str, curves: list[Curve], from_zero: bool = False, may_log: bool = False, remark: str = "") -> Chart | None:
    """A chart with its ordinate, or None if there is no curve to see (fewer than two points everywhere).

    The range is that of everything, unless few raw values stretch it: where it is more than half again as long as the range of the
    lines, markers and all but one in a hundred raw values at either end, it is the latter, since a single spike would flatten the
    rest. What is cut off is said in the remark. With ``may_log``, values that spread over more than a factor of 30 get a
    logarithmic ordinate instead, which cuts nothing.
    """
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if max((int(np.isfinite(curve.values).sum()) for curve in curves), default=0) < 2:
        return None
    finite = [(curve.role, curve.values[np.isfinite(curve.values)]) for curve in curves]
    everything = np.concatenate([values for _, values in finite])
    low, high = float(everything.min()), float(everything.max())
    if may_log and low > 0 and high > 30 * np.median(everything):
        return Chart(title, f"{unit}, logarithmic", tuple(curves), low / 1.1, high * 1.1, True, remark)
    usual = np.concatenate([np.percentile(v, (1, 99)) if role == "raw" and len(v) >= 100 else (v.min(), v.max()) for role, v in finite])
    zero = [0.0] if from_zero else []
    if high - min([low, *zero]) > 1.5 * (usual.max() - min([usual.min(), *zero])):
        low, high = float(usual.min()), float(usual.max())
    low, high = scale.nice_bounds(min([low, *zero]), high, wanted=16)
    cut = int(((everything < low) | (everything > high)).sum())
    if cut:
        remark = f"{remark} {cut} extreme value{'s lie' if cut > 1 else ' lies'} outside the range shown.".strip()
    return Chart(title, unit, tuple(curves), low, high, False, remark)


def _edges(count: int) -> np.ndarray:
    """Where the buckets of so many lines begin, and the end: ascending, i64[at most BUCKETS + 1]."""
    even, geometric = np.linspace(0, count, BUCKETS * 2 // 3 + 1), np.geomspace(1, count, BUCKETS // 3)
    return np.unique(np.round(np.concatenate([even, geometric])).astype(int))


def _moving_sum(values: np.ndarray, *, half: int) -> np.ndarray:
    """Sum of the window around each element; the window shrinks towards the start, and the array is zero beyond its end."""
    running = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(index, half)
    return running[np.minimum(index + reach + 1, len(values))] - running[index - reach]
