"""From numbers to axis ticks and to words.

Ticks sit at 1, 2 or 5 times a power of ten ("nice numbers"): of all such steps, the smallest that gives no more than the wanted
number of ticks. A logarithmic axis over less than a decade and a half gets the same ticks as a linear one, because 1-2-5 ticks would
be too few; over more it gets 1-2-5 or whole decades, whichever fits.
"""

import itertools
import math

import numpy as np


def nice_step(span: float, *, wanted: int) -> float:
    """The smallest step of the form {1, 2, 5} x 10^k that divides ``span`` > 0 into at most ``wanted`` parts."""
    assert span > 0, span
    power = 10.0 ** math.floor(math.log10(span / wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * wanted >= span * (1 - 1e-9))


def nice_ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Multiples of a nice step within [low, high]."""
    step = nice_step(high - low, wanted=wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def nice_bounds(low: float, high: float, *, wanted: int = 5) -> tuple[float, float]:
    """The interval, widened to whole nice steps; an interval of no length is widened around its value."""
    if high <= low:
        margin = abs(low) * 0.5 or 0.5
        low, high = low - margin, high + margin
    step = nice_step(high - low, wanted=wanted)
    return float(f"{math.floor(low / step + 1e-9) * step:.12g}"), float(f"{math.ceil(high / step - 1e-9) * step:.12g}")


def log_ticks(low: float, high: float, *, wanted: int = 8) -> list[float]:
    """Ticks for a logarithmic axis over [low, high], 0 < low < high."""
    assert 0 < low < high, (low, high)
    if high / low < 30:
        return [tick for tick in nice_ticks(low, high, wanted=wanted) if tick > 0]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        candidates = (float(f"{factor}e{power}") for power in powers if power % stride == 0 for factor in factors)
        ticks = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= wanted:
            break
    return ticks


def tick_labels(ticks: list[float]) -> list[str]:
    """Labels of one axis, all in one notation: decimals as the spacing needs, K/M/B/T from 10,000, exponents below 0.001."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    gaps = [abs(b - a) for a, b in itertools.pairwise(ticks)] or [largest or 1.0]
    if largest >= 10_000:
        return [_suffixed(tick, digits=4) for tick in ticks]
    if 0 < largest < 0.01:
        return ["0" if tick == 0 else _exponent(tick) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    if max(gaps) > 5 * min(gaps):
        return [f"{tick:g}" for tick in ticks]
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def count(value: float | None) -> str:
    """A large number in three digits and a suffix: 123, 49.2K, 1.20M; a dash if unknown."""
    if value is None or unknown(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else _suffixed(value, digits=3, trim=False)


def plain(value: float | None, *, digits: int = 4) -> str:
    """A number in so many significant digits; a dash if unknown."""
    if value is None or unknown(value):
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter: ``7.3 s``, ``3 min 05 s``, ``2 h 14 min``, ``3 d 4 h``."""
    if seconds is None or unknown(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(number_of_bytes: float | None) -> str:
    """Bytes in binary units, three digits."""
    if number_of_bytes is None or unknown(number_of_bytes):
        return "–"
    value, units = float(number_of_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def unknown(value: object) -> bool:
    """Whether a figure from a file is missing, of another type or not finite."""
    return isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value)


def _suffixed(value: float, *, digits: int, trim: bool = True) -> str:
    if value == 0:
        return "0"
    powers = ((12, "T"), (9, "B"), (6, "M"), (3, "K"), (0, ""))
    power, suffix = next((power, suffix) for power, suffix in powers if abs(value) >= 10.0**power * 0.9995 or power == 0)
    scaled = value / 10.0**power
    text = f"{scaled:.{max(0, digits - 1 - math.floor(math.log10(abs(scaled)) + 1e-4))}f}"
    return (text.rstrip("0").rstrip(".") if trim and "." in text else text) + suffix


def _exponent(value: float) -> str:
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
