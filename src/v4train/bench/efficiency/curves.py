"""The curves as an SVG picture: held-out loss against training compute."""

import math
import statistics
from typing import Any

from v4train.bench.efficiency import arms

_WIDTH, _HEIGHT = 900, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 380, 24, 50
_COLORS = ("#1f6feb", "#24292f", "#d1242f", "#8250df", "#bf8700", "#1a7f37", "#6e7781")


def picture(result: dict[str, Any]) -> str:
    """Curves of all arms, means over their seeds; dots are ends of V4's shorter runs, the dashed line is the baseline's final loss."""
    curves = {arm: _mean(result, arm, result["steps"]) for arm in arms.ARMS if arm in result["arms"]}
    ends = [_mean(result, "v4", length)[-1] for length in sorted({r["steps"] for r in result["runs"] if r["arm"] == "v4"})]
    points = [point for curve in curves.values() for point in curve]
    most = max(x for x, _ in points)
    low = min(y for _, y in points)
    high = min(max(y for _, y in points), low + 1.0)
    plane = _Plane(most, low - 0.05, high)
    parts = [*plane.frame()]
    for i, (arm, curve) in enumerate(curves.items()):
        seen = [(x, y) for x, y in curve if y <= high]
        dash = "" if arm in ("v4", "baseline") else ' stroke-dasharray="5 3"'
        width = 2.4 if arm in ("v4", "baseline") else 1.4
        path = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in seen)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLORS[i]}" stroke-width="{width}"{dash}/>')
        y = _TOP + 14 + 20 * i
        left = _WIDTH - _RIGHT + 14
        parts.append(f'<line x1="{left}" y1="{y - 4}" x2="{left + 22}" y2="{y - 4}" stroke="{_COLORS[i]}" stroke-width="{width}"{dash}/>')
        parts.append(f'<text x="{left + 28}" y="{y}">{arms.ARMS[arm]}{_fewer(result, arm)}</text>')
    parts += [f'<circle cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="4" fill="{_COLORS[0]}"/>' for x, y in ends]
    if "goal" in result:
        y = plane.y(result["goal"])
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#24292f" stroke-dasharray="2 4"/>')
    parts += _marks(len(curves))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>', *parts, "</svg>", ""])


def _fewer(result: dict[str, Any], arm: str) -> str:
    """Says of a curve over fewer seeds than the others that it is one: runs of different seeds lie further apart than some recipes."""
    count, most = len(result["arms"][arm]["losses"]), max(len(row["losses"]) for row in result["arms"].values())
    return f" ({count} of {most} seeds)" if count < most else ""


def _marks(rows: int) -> list[str]:
    """What dots and the dotted line are, below the names of the curves."""
    left, y = _WIDTH - _RIGHT + 14, _TOP + 24 + 20 * rows
    return [
        f'<circle cx="{left + 11}" cy="{y - 4}" r="4" fill="{_COLORS[0]}"/>',
        f'<text x="{left + 28}" y="{y}">end of a whole run of V4</text>',
        f'<line x1="{left}" y1="{y + 16}" x2="{left + 22}" y2="{y + 16}" stroke="#24292f" stroke-dasharray="2 4"/>',
        f'<text x="{left + 28}" y="{y + 20}">final loss of the baseline</text>',
    ]


class _Plane:
    """Where values lie in the picture: teraFLOPs to the right, nats upwards."""

    def __init__(self, most: float, low: float, high: float):
        self._most, self._low, self._high = most, low, high

    def x(self, value: float) -> float:
        return _LEFT + value / self._most * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _TOP + (self._high - value) / (self._high - self._low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self) -> list[str]:
        """Grid lines with their values, and the names of the axes."""
        parts, bottom, right = [], _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        for value in _round_values(self._low, self._high):
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#d0d7de"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in _round_values(0, self._most):
            parts.append(f'<text x="{self.x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">training compute, teraFLOPs</text>')
        parts.append(
            f'<text transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">held-out loss, nats a byte</text>'
        )
        return parts


def _mean(result: dict[str, Any], arm: str, steps: int) -> list[tuple[float, float]]:
    """(teraFLOPs, mean held-out loss over the seeds) where every seed was evaluated."""
    each = result["arms"][arm]["cost"]["total"] / 1e12
    curves = [dict(run["curve"]) for run in result["runs"] if (run["arm"], run["steps"]) == (arm, steps)]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(tokens * each, statistics.mean(curve[tokens] for curve in curves)) for tokens in common]


def _round_values(low: float, high: float) -> list[float]:
    """Four to eight values of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
