"""Is this step a spike? A pure judgement of its report by those of the steps before it.

A step is a spike if

- its loss or its gradient norm is not a finite number, or
- its loss is above ``median + loss_deviations * sigma`` *and* above ``median + loss_margin * |median|``, or
- its gradient norm is above ``gradient_factor * median``,

with the median over the last ``window`` accepted steps, and sigma 1.4826 times the median of the distances from it, which is the standard
deviation if losses are normal. Medians, because one spike in the window moves a mean and its deviation by as much as it likes, and hides
the next one; the margin, because late in a run the spread is so small that a deviation of six of them is nothing.

Until ``least`` steps are accepted, only what is not finite is a spike. The window starts anew where the run changes what is computed
(shape of the batch, stage of the model): the level of loss and gradient changes there with good reason. If it is still the same loss (the
attention has not changed), only the level is unknown: from ``FEW`` steps on, limits are those of their median and of the *relative*
spread of the window before, twice as wide as usual. So a batch ramp with short phases is not blind throughout, and since the level of the
new phase is never taken from the old one, no change is a spike by itself.

After a rollback the accepted steps that it gave up stay in the window. They were no spikes, and without them the guard might be blind just
when the next spike is most likely.

Same reports, same judgement: there is no clock and no randomness, and `Detector.state` is all that is remembered.
"""

import collections
import dataclasses
import math
import statistics
from typing import Any, NamedTuple

from v4train.train import config as config_lib

FEW = 4
"""Steps after a change of shape whose median is believed. The median of fewer is a step or two."""
_SIGMA_OF_DISTANCE = 1.4826
"""Standard deviation of a normal variable, in medians of its distance from its median."""


class Accepted(NamedTuple):
    """What is remembered of a step: its number, counted in steps done after it, and its loss and gradient norm."""

    step: int
    loss: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class Spike:
    """Why a step was not accepted.

    Attributes:
        step: steps done after it.
        reason: ``not_finite``, ``loss`` or ``gradient``.
        value: the loss or the gradient norm; None if it is not finite.
        limit: what it should have been below; None for ``not_finite``.
        median: of the accepted steps; None for ``not_finite``.
    """

    step: int
    reason: str
    value: float | None
    limit: float | None = None
    median: float | None = None

    def __str__(self) -> str:
        if self.reason == "not_finite":
            return f"step {self.step}: loss or gradient are not finite"
        name = {"loss": "the loss", "gradient": "the gradient norm"}[self.reason]
        return f"step {self.step}: {name} is {self.value:.4g}, above {self.limit:.4g} (median {self.median:.4g})"


class Detector:
    """Judges the steps of a run in their order."""

    def __init__(self, config: config_lib.GuardConfig):
        self._config = config
        self._level: str | None = None
        self._objective: str | None = None
        self._carried: float | None = None  # spread of the window before the change, as a share of its median
        self._accepted = collections.deque[Accepted](maxlen=config.window)

    def judge(self, step: int, *, loss: float, gradient: float, finite: bool, level: str, objective: str = "") -> Spike | None:
        """The spike that a step is, or None; then it is remembered.

        Args:
            step: steps done after it.
            loss: nats.
            gradient: norm before clipping.
            finite: whether the step itself found both finite.
            level: names what the step computes; another name than that of the step before starts the window anew.
            objective: names what the loss is of; if it stays where the level changes, the window's spread is believed on.
        """
        if level != self._level:
            self._carried = self._spread() if objective == self._objective else None
            self._accepted.clear()
            self._level, self._objective = level, objective
        if not (finite and math.isfinite(loss) and math.isfinite(gradient)):
            return Spike(step, "not_finite", None)
        if len(self._accepted) >= self._config.least or (self._carried is not None and len(self._accepted) >= FEW):
            spike = self._loss(step, loss) or self._gradient(step, gradient)
            if spike is not None:
                return spike
        self._accepted.append(Accepted(step, loss, gradient))
        return None

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON."""
        window = {"level": self._level, "objective": self._objective, "carried": self._carried}
        return {**window, "accepted": [list(known) for known in self._accepted]}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned; a smaller window keeps the newest."""
        self._level, self._objective, self._carried = state["level"], state.get("objective"), state.get("carried")
        self._accepted.clear()
        self._accepted.extend(Accepted(*known) for known in state["accepted"])

    def _spread(self) -> float | None:
        """Of the losses in the window, sigma as a share of the median; what was carried if they are too few, None if that is nothing."""
        if len(self._accepted) < self._config.least:
            return self._carried
        median, sigma = self._level_of_losses()
        return sigma / abs(median) if median else None

    def _level_of_losses(self) -> tuple[float, float]:
        """Median and sigma."""
        losses = [known.loss for known in self._accepted]
        median = statistics.median(losses)
        return median, _SIGMA_OF_DISTANCE * statistics.median(abs(x - median) for x in losses)

    @property
    def _width(self) -> float:
        """By how much limits are wider than usual: twice while the level of a new shape is known from few steps."""
        return 1.0 if len(self._accepted) >= self._config.least else 2.0

    def _loss(self, step: int, loss: float) -> Spike | None:
        median, sigma = self._level_of_losses()
        if len(self._accepted) < self._config.least and self._carried is not None:
            sigma = max(sigma, self._carried * abs(median))
        room = max(self._config.loss_deviations * sigma, self._config.loss_margin * abs(median))
        limit = median + self._width * room
        return Spike(step, "loss", loss, limit, median) if loss > limit else None

    def _gradient(self, step: int, gradient: float) -> Spike | None:
        median = statistics.median(known.gradient for known in self._accepted)
        limit = self._width * self._config.gradient_factor * median
        return Spike(step, "gradient", gradient, limit, median) if gradient > limit else None
