"""Held-out loss by data source, on the same rows every time."""

from collections.abc import Callable

import jax
import numpy as np

from v4train.data import batch as batch_lib
from v4train.train import build
from v4train.train import stages as stages_lib
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record


class Evaluation:
    """Writes a record of kind ``eval`` before the first step, every so many, and after the last."""

    def __init__(self, parts: build.Parts, program: build.Program, sink: record.Sink, *, done: Callable[[], None]):
        """``done`` is called after each evaluation, so that its time is not taken for a step's."""
        self._parts, self._program, self._sink, self._done = parts, program, sink, done
        self._batches: list[batch_lib.Batch] | None = None
        self._evaluated: int | None = None

    def before(self, step: int, state: state_lib.State) -> None:
        """Evaluates if it is time, by the model of the next step's stage; where a stage changes the model's predictions, also by that of
        the step before, so that the two records differ in nothing else."""
        train, stages = self._parts.recipe.train, self._parts.stages
        ends = step == train.steps
        old, new = (stages.at(max(i, 0)) for i in (step - 1, step - 1 if ends else step))
        changes = old.evaluated != new.evaluated
        due = step == 0 or ends or changes or (train.eval_every is not None and step % train.eval_every == 0)
        if not due or step == self._evaluated or not self._parts.recipe.data.holdout:
            return
        self._evaluated = step
        for stage in dict.fromkeys((old, new) if changes else (new,)):
            named = {} if len(stages.stages) == 1 else {"attention": stage.evaluated.attention}
            tokens = self._parts.data.phases.places_before(step)
            self._sink({"kind": "eval", "step": step, "tokens": tokens, **named, **self.losses(state, stage=stage)})
        self._done()

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""

    def losses(self, state: state_lib.State, *, stage: stages_lib.Stage) -> dict[str, float]:
        """``loss/<source>``: nats per target, over all held-out batches, as the model of a stage predicts them."""
        build.add_evaluation(self._program, self._parts, stage)
        if self._batches is None:
            self._batches = self._read()
        sums = [self._program.evaluate(state, batch, stage=stage) for batch in self._batches]
        nats, targets = (np.sum(jax.device_get(part), axis=0) for part in zip(*sums, strict=True))
        names = self._parts.data.sources
        return {f"loss/{name}": float(n / t) for name, n, t in zip(names, nats, targets, strict=True) if t > 0}

    def _read(self) -> list[batch_lib.Batch]:
        parts, train = self._parts, self._parts.recipe.train
        return [
            parts.place(batch)
            for name in parts.data.sources
            for batch in parts.data.holdout_batches(name, batches=train.eval_batches, batch_rows=train.batch_rows)
        ]
