"""Which source global row i comes from, and how many rows of each source came before it.

Rows, not documents, are mixed: every row has the same length, so the weights are shares of tokens. The rows are dealt out by a *nested
floor split*: of the first i rows, the first source has ``c1 = floor(i w1 / W)``, the second ``floor((i - c1) w2 / (W - w1))`` of what is
left, and so on; the last takes the rest. Each count grows by 0 or 1 when i does, and exactly one grows, so row i belongs to the source
whose count grows. That makes the schedule a closed form in integers: no state, no drift (every count stays within a few rows of
its share), nothing to search for on resume. The obvious cumulative rounding ``round(i w_k)`` is only consistent for two sources, and
sampling by a random number would leave the shares, and the resume, to chance.
"""

import dataclasses
import fractions
import math
from typing import NamedTuple


class SourceRow(NamedTuple):
    """Row ``row`` of source number ``source``."""

    source: int
    row: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the sources, in the smallest integers."""

    parts: tuple[int, ...]

    @classmethod
    def of(cls, weights: tuple[float, ...]) -> "Mixture":
        """From positive weights, which need not add up to 1.

        Raises:
            ValueError: no weight, or one that is not positive.
        """
        if not weights or min(weights) <= 0:
            raise ValueError(
                f"weights of the data sources must be positive, got {list(weights)}: remove a source instead of weighting it 0"
            )
        exact = [fractions.Fraction(repr(float(weight))) for weight in weights]  # 0.1 as it is written, not as it is stored
        whole = math.lcm(*(part.denominator for part in exact))
        parts = [int(part * whole) for part in exact]
        return cls(tuple(part // math.gcd(*parts) for part in parts))

    @property
    def shares(self) -> tuple[float, ...]:
        """Fractions of the rows; they add up to 1."""
        return tuple(part / sum(self.parts) for part in self.parts)

    def rows_before(self, i: int) -> tuple[int, ...]:
        """Rows of each source among the global rows ``0..i-1``."""
        left, weight, counts = i, sum(self.parts), []
        for part in self.parts:
            count = left * part // weight
            counts.append(count)
            left, weight = left - count, weight - part
        return tuple(counts)

    def source_and_row(self, i: int) -> SourceRow:
        """The source of global row ``i`` and the number of that row within the source."""
        for source, (before, after) in enumerate(zip(self.rows_before(i), self.rows_before(i + 1), strict=True)):
            if after > before:
                return SourceRow(source, before)
        raise AssertionError("one count grows with every row")
