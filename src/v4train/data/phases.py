"""The phases of a run: from which step on which weights and which shape of batch hold.

A recipe says what changes (`config.PhaseConfig`); here it becomes a list of *phases*, on each of which everything is constant, with the
steps, rows and tokens before each. A ramp of weights is a phase for every 64th part of it, with the weights in its middle; a ramp of rows
is a phase for every stair. All of it is integers and
fractions, so everything about the data at step k is a closed form in k, and depends on nothing that the recipe says about later
steps: a run may be resumed with another future.
"""

import bisect
import dataclasses
import fractions
from typing import TYPE_CHECKING, NamedTuple

from v4train.data import mixture

if TYPE_CHECKING:
    from v4train.data import config as config_lib

_RAMP_PIECES = 64


RowShape = tuple[int, int, int]
"""S, P and A of a row."""


class Shape(NamedTuple):
    """Of a global batch: rows B, tokens of a row S, and the row's budgets P and A."""

    rows: int
    sequence_length: int
    max_patches: int
    max_audio_frames: int

    @property
    def row(self) -> RowShape:
        """S, P and A."""
        return self[1:]

    @property
    def places(self) -> int:
        """Tokens of a batch, padding included."""
        return self.rows * self.sequence_length


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps with the same weights and shape.

    Attributes:
        first_step: where it begins.
        first_row: rows of all steps before it.
        first_place: their tokens, padding included.
        shape: of its batches.
        weights: of the sources, in their order.
    """

    first_step: int
    first_row: int
    first_place: int
    shape: Shape
    weights: tuple[fractions.Fraction, ...]

    def rows_before(self, step: int) -> int:
        """Global rows of the steps before one that is not before this phase."""
        return self.first_row + (step - self.first_step) * self.shape.rows

    def places_before(self, step: int) -> int:
        """Tokens, padding included, of the steps before one that is not before this phase."""
        return self.first_place + (step - self.first_step) * self.shape.places


@dataclasses.dataclass(frozen=True)
class Phases:
    """All phases; the last has no end."""

    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, config: "config_lib.DataConfig", *, batch_rows: int) -> "Phases":
        """From what the recipe says.

        Args:
            config: the sources, and the phases that it names.
            batch_rows: of the first phase.

        Raises:
            ValueError: phases out of order, a source that is not there, or weights that are all 0.
        """
        weights = {source.name: mixture.as_written(source.weight) for source in config.sources}
        shape = Shape(batch_rows, config.sequence_length, config.max_patches, config.max_audio_frames)
        found = [Phase(0, 0, 0, shape, _shares(weights, where="data.sources"))]
        for i, change in enumerate(config.phases):
            where = f"data.phases[{i}]"
            first = _first_step(change, after=found[-1])
            if first <= (last := found[-1].first_step):
                message = f"{where} begins at step {first}, but the phase before it begins, or ends its ramp, at step {last}"
                raise ValueError(f"{message}: move it behind")
            unknown = sorted(change.weights.keys() - weights.keys())
            if unknown:
                raise ValueError(
                    f"{where}.weights names {unknown[0]!r}, but the sources are {', '.join(weights)}: correct it or add the source"
                )
            weights |= {name: mixture.as_written(weight) for name, weight in change.weights.items()}
            changes = {"rows": change.batch_rows} | {name: getattr(change, name) for name in Shape._fields[1:]}
            shape = shape._replace(**{name: value for name, value in changes.items() if value is not None})
            before, after = found[-1].weights, _shares(weights, where=where)
            found += _climb(found[-1], first, shape, after, change=change, where=where)
            pieces = min(change.ramp_steps, _RAMP_PIECES)
            for j in range(pieces):
                way = fractions.Fraction(2 * j + 1, 2 * pieces)
                ramp = tuple(a + (b - a) * way for a, b in zip(before, after, strict=True))
                found.append(_next(found[-1], first + change.ramp_steps * j // pieces, shape, ramp))
            if change.ramp_steps or change.rows_stairs == 1:
                found.append(_next(found[-1], first + change.ramp_steps, shape, after))
        return cls(tuple(found))

    def at(self, step: int) -> Phase:
        """The one that a step is in."""
        return self.phases[bisect.bisect_right(self.phases, step, key=lambda phase: phase.first_step) - 1]

    def rows_before(self, step: int) -> int:
        """Global rows of the steps before ``step``."""
        return self.at(step).rows_before(step)

    def places_before(self, step: int) -> int:
        """Tokens, padding included, of the steps before ``step``."""
        return self.at(step).places_before(step)

    def first_step_after(self, places: int) -> int:
        """The first step with at least so many tokens, padding included, before it: where `from_tokens` begins."""
        after = self.phases[bisect.bisect_right(self.phases, places, key=lambda phase: phase.first_place) - 1]
        return _first_step_after(places, of=after)

    @property
    def mixture(self) -> mixture.Mixture:
        """The weights, by rows."""
        return mixture.Mixture.scheduled([(phase.first_row, phase.weights) for phase in self.phases])


def _climb(
    last: Phase, first: int, shape: Shape, weights: tuple[fractions.Fraction, ...], *, change: "config_lib.PhaseConfig", where: str
) -> list[Phase]:
    """The stairs of a ramp of rows, the last one included; none if there is no ramp.

    Stair j of n has j/n of the way from the old rows to the new ones; it begins with the first step that has at least (j-1)/(n-1) of
    the ramp's tokens between the beginning of the phase and itself.
    """
    stairs, before, found = change.rows_stairs, last.shape.rows, []
    if stairs == 1:
        return found
    climbed = shape.rows - before
    if not climbed:
        raise ValueError(f"{where}: a ramp from {before} to {shape.rows} rows is none: remove rows_stairs and rows_ramp_tokens")
    if climbed % stairs:
        message = f"{where}: {before} to {shape.rows} rows in {stairs} equal stairs (rows_stairs) is {climbed / stairs:g} rows a stair"
        raise ValueError(f"{message}: take a number that divides {abs(climbed)}")
    for j in range(stairs):
        step = first
        if found:
            through = -(-change.rows_ramp_tokens * j // (stairs - 1))
            step = _first_step_after(found[0].first_place + through, of=found[-1])
            if step <= found[-1].first_step:
                each = f"{change.rows_ramp_tokens / (stairs - 1):,.0f} tokens"
                message = f"{where}: a stair of {each} is shorter than a step of {found[-1].shape.places:,}"
                raise ValueError(f"{message}: take fewer rows_stairs or more rows_ramp_tokens")
        rows = before + climbed * (j + 1) // stairs
        found.append(_next(found[-1] if found else last, step, shape._replace(rows=rows), weights))
    return found


def _first_step(change: "config_lib.PhaseConfig", *, after: Phase) -> int:
    """Where a phase begins: at its step, or at the first step with that many tokens before it."""
    if change.from_step is not None:
        return change.from_step
    assert change.from_tokens is not None
    return _first_step_after(change.from_tokens, of=after)


def _first_step_after(places: int, *, of: Phase) -> int:
    return of.first_step + max(0, -(-(places - of.first_place) // of.shape.places))


def _next(before: Phase, first_step: int, shape: Shape, weights: tuple[fractions.Fraction, ...]) -> Phase:
    return Phase(first_step, before.rows_before(first_step), before.places_before(first_step), shape, weights)


def _shares(weights: dict[str, fractions.Fraction], *, where: str) -> tuple[fractions.Fraction, ...]:
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"{where}: the weights of all sources ({', '.join(weights)}) are 0: give one of them a weight")
    return tuple(weight / total for weight in weights.values())
