"""Which source global row i comes from, and how many rows of each source came before it.

Rows, not documents, are mixed: all rows of a step have the same length, so the weights are shares of tokens. The rows are dealt out by a
*nested floor split*: of the first i rows, the first source has ``c1 = floor(i w1 / W)``, the second ``floor((i - c1) w2 / (W - w1))`` of
what is left, and so on; the last takes the rest. Each count grows by 0 or 1 when i does, and exactly one grows, so row i belongs to the
source whose count grows. That makes the mixture a closed form in integers: no state, no drift (every count stays within a few rows of
its share), nothing to search for on resume. The obvious cumulative rounding ``round(i w_k)`` is only consistent for two sources, and
sampling by a random number would leave the shares, and the resume, to chance.

**Weights that change** are constant on *stretches* of rows. Each source's exact share of what the sources before it have left is then a
piecewise linear function of those rows; it never grows faster than they do, so its floor still grows by 0 or 1. The fraction of a
row that a source is due at the end of a stretch is carried over: a ramp of many short stretches is as exact as one long one. (To
begin the split anew on each would cost the first sources half a row each time: a ramp of 64 steps of 8 rows would never draw a source of
weight 0.1.) A source of weight 0 draws nothing and changes nothing for the others: sources can be added later.

Shares are integers in units of 2^-96, rounded up, so that the floor is that of the exact fraction for the first 2^64 rows and more.
"""

import bisect
import dataclasses
import fractions
import math
from collections.abc import Sequence
from typing import NamedTuple

_BITS = 96


class SourceRow(NamedTuple):
    """Row ``row`` of source number ``source``."""

    source: int
    row: int


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Rows with the same weights.

    Attributes:
        first_row: where it begins.
        parts: shares of the sources, in the smallest integers.
        slopes: share of each source in what those before it leave, in 2^-96.
        left: rows that the sources before have left to this one and the later ones, at ``first_row``.
        due: rows due to each source at ``first_row``, in 2^-96.
    """

    first_row: int
    parts: tuple[int, ...]
    slopes: tuple[int, ...]
    left: tuple[int, ...]
    due: tuple[int, ...]

    def counts(self, i: int) -> "_Counts":
        """Of the first ``i`` rows; those before the stretch included."""
        left, lefts, dues, counts = i, [], [], []
        for slope, left_before, due_before in zip(self.slopes, self.left, self.due, strict=True):
            due = due_before + (left - left_before) * slope
            lefts.append(left)
            dues.append(due)
            counts.append(due >> _BITS)
            left -= counts[-1]
        return _Counts(tuple(counts), tuple(lefts), tuple(dues))


class _Counts(NamedTuple):
    rows: tuple[int, ...]
    left: tuple[int, ...]
    due: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Stretches of weights, the first of which begins at row 0 and the last of which has no end."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, weights: Sequence[float | fractions.Fraction]) -> "Mixture":
        """The same weights for all rows; see `scheduled`."""
        return cls.scheduled([(0, weights)])

    @classmethod
    def scheduled(cls, weights: Sequence[tuple[int, Sequence[float | fractions.Fraction]]]) -> "Mixture":
        """From (first row, weights) pairs with growing rows, the first 0. Weights need not add up to 1.

        Raises:
            ValueError: no weight, a negative one, or none above 0.
        """
        stretches: list[Stretch] = []
        for first_row, here in weights:
            parts = smallest_integers(here)
            if stretches and parts == stretches[-1].parts:
                continue
            zero = (0,) * len(parts)
            at = stretches[-1].counts(first_row) if stretches else _Counts(zero, zero, zero)
            slopes, rest = [], sum(parts)
            for part in parts:
                slopes.append(-(-(part << _BITS) // rest) if part else 0)
                rest -= part
            stretches.append(Stretch(first_row, parts, tuple(slopes), at.left, at.due))
        return cls(tuple(stretches))

    def stretch(self, i: int) -> Stretch:
        """The one that row ``i`` is in."""
        return self.stretches[bisect.bisect_right(self.stretches, i, key=lambda stretch: stretch.first_row) - 1]

    @property
    def parts(self) -> tuple[int, ...]:
        """Weights of the first row, in the smallest integers."""
        return self.stretches[0].parts

    @property
    def shares(self) -> tuple[float, ...]:
        """Weights of the first row as fractions; they add up to 1."""
        return tuple(part / sum(self.parts) for part in self.parts)

    def rows_before(self, i: int) -> tuple[int, ...]:
        """Rows of each source among the global rows ``0..i-1``."""
        return self.stretch(i).counts(i).rows

    def source_and_row(self, i: int) -> SourceRow:
        """The source of global row ``i`` and the number of that row within the source."""
        stretch = self.stretch(i)
        for source, (before, after) in enumerate(zip(stretch.counts(i).rows, stretch.counts(i + 1).rows, strict=True)):
            if after > before:
                return SourceRow(source, before)
        raise AssertionError("one count grows with every row")


def smallest_integers(weights: Sequence[float | fractions.Fraction]) -> tuple[int, ...]:
    """Weights of the same ratios without a common divisor.

    Raises:
        ValueError: no weight, a negative one, or none above 0.
    """
    if not weights or min(weights) < 0 or max(weights) <= 0:
        shown = [float(weight) for weight in weights]
        raise ValueError(f"weights of the data sources must not be negative and not all 0, got {shown}: correct them")
    exact = [as_written(weight) for weight in weights]
    whole = math.lcm(*(part.denominator for part in exact))
    parts = [int(part * whole) for part in exact]
    return tuple(part // math.gcd(*parts) for part in parts)


def as_written(weight: float | fractions.Fraction) -> fractions.Fraction:
    """0.1 as it is written, not as it is stored."""
    return weight if isinstance(weight, fractions.Fraction) else fractions.Fraction(repr(float(weight)))
