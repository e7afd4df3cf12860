"""Draws the batches of a run; while routing is anticipated also those of the next steps, and their experts with today's parameters.

Step t then takes the experts that the parameters of step t - lag have chosen for its batch: batches are a pure function of the step, so the
batch is there to be routed ``lag`` steps before it is trained on::

    at step t    read batch t + lag, anticipate its experts with the state of step t, put both into the queue
                 take batch t and the experts that were put there at step t - lag

Where the queue is empty, because anticipation begins or the state has gone back, the whole queue is filled with the state of that
step: the lag grows from 0 to ``lag`` over the next steps. A resumed process fills it so, too, and is therefore not bit-equal to one that
went on: the parameters of the steps before are gone.
"""

import collections
from collections.abc import Callable, Iterator

from v4train.data import batch as batch_lib
from v4train.train import build
from v4train.train import state as state_lib


class Draw:
    """The batches from a step on, in their order, on the devices."""

    def __init__(self, parts: build.Parts, program: build.Program, *, start: int, compiled: Callable[[int, float], None]):
        """``compiled`` is told the step and the seconds when anticipation had to be compiled."""
        self._parts, self._program, self._compiled = parts, program, compiled
        self._source: Iterator[batch_lib.Batch] = parts.data.iterate(start)
        self._batches = collections.deque[batch_lib.Batch]()
        self._experts = collections.deque[dict]()

    def plain(self) -> batch_lib.Batch:
        """The next batch, which will be routed as usual."""
        self._experts.clear()
        return self._batches.popleft() if self._batches else self._parts.place(next(self._source))

    def anticipated(self, step: int, state: state_lib.State, *, lag: int) -> tuple[batch_lib.Batch, dict]:
        """Batch ``step`` and its experts. ``state`` is after ``step`` steps; it is read before the next one takes it."""
        last = min(step + lag, self._parts.recipe.train.steps - 1)
        while step + len(self._batches) <= last:
            self._batches.append(self._parts.place(next(self._source)))
        for i in range(len(self._experts), len(self._batches)):
            variant = self._parts.variant_at(step + i)
            seconds = build.add_anticipation(self._program, self._parts, variant)
            if seconds is not None:
                self._compiled(step, seconds)
            self._experts.append(self._program.anticipate(state, self._batches[i], variant=variant))
        return self._batches.popleft(), self._experts.popleft()

    def forget(self) -> None:
        """Drops the experts that a state which was given up has chosen."""
        self._experts.clear()
