"""Held-out loss on the same rows every time, and what else a recipe asks the model (`train.evals`)."""

import time
from collections.abc import Callable

import jax

from v4train.core import tree
from v4train.data import batch as batch_lib
from v4train.train import build
from v4train.train import stages as stages_lib
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.evals import heldout, probes
from v4train.train.hooks import record


def prepare(parts: build.Parts) -> probes.Probes:
    """Reads the files of `train.evals`.

    Raises:
        ValueError: one is missing or is not what it should be, or a question or a needle does not fit into a row.
    """
    train, data = parts.recipe.train, parts.data
    return probes.Probes(
        train.evals,
        tokenizer=data.tokenizer,
        numerics=parts.recipe.numerics,
        mesh=parts.mesh,
        rows=max(train.batch_rows // train.microbatches, 1),
        length=parts.recipe.data.sequence_length,
        hay=lambda tokens: probes.held_out(data, tokens=tokens),
    )


class Evaluation:
    """Writes a record of kind ``eval`` before the first step, every so many, and after the last."""

    def __init__(
        self, parts: build.Parts, program: build.Program, sink: record.Sink, *, asked: probes.Probes, done: Callable[[float], None]
    ):
        """Args:
        parts: of the run.
        program: of the run; it gets an evaluation for each stage that is evaluated.
        sink: where records go.
        asked: what `train.evals` says (`prepare`).
        done: told the seconds of each evaluation, so that they are not taken for a step's.
        """
        self._parts, self._program, self._sink, self._done = parts, program, sink, done
        self._batches: list[batch_lib.Batch] | None = None
        self._evaluated: int | None = None
        self._probes = asked

    def before(self, step: int, state: state_lib.State) -> None:
        """Evaluates if it is time, by the model of the next step's stage; where a stage changes the model's predictions, also by that of
        the step before, so that the two records differ in nothing else."""
        stages = self._parts.stages
        old, new = self._around(step)
        loss_is_due, asked = self._due_at(step)
        if not self.is_due(step):
            return
        self._evaluated = step
        jax.block_until_ready(state)  # the step before is still at work: its time is its own
        started = time.perf_counter()
        for stage in dict.fromkeys((old, new) if old.evaluated != new.evaluated and loss_is_due else (new,)):
            named = {} if len(stages.stages) == 1 else {"attention": stage.evaluated.attention}
            fields = self.losses(state, stage=stage) if loss_is_due else {}
            fields |= self._answers(state, asked, stage=stage) if stage == new else {}
            self._sink({"kind": "eval", "step": step, "tokens": self._parts.data.phases.places_before(step), **named, **fields})
        self._done(time.perf_counter() - started)

    def is_due(self, step: int) -> bool:
        """Whether the state after so many steps is evaluated, and was not yet."""
        loss_is_due, asked = self._due_at(step)
        return step != self._evaluated and (loss_is_due or bool(asked))

    def _due_at(self, step: int) -> tuple[bool, list[probes.Probe]]:
        """Whether the held-out loss is due, and which other evaluations are."""
        train = self._parts.recipe.train
        old, new = self._around(step)
        loss_is_due = self._parts.recipe.data.holdout > 0 and (old.evaluated != new.evaluated or self._due(step, train.eval_every))
        asked = zip(self._probes.probes, train.evals, strict=True)
        return loss_is_due, [probe for probe, each in asked if self._due(step, each.every or train.eval_every)]

    def _around(self, step: int) -> tuple[stages_lib.Stage, stages_lib.Stage]:
        """The stages of the step before and of the next, if there is one."""
        after = step - 1 if step == self._parts.recipe.train.steps else step
        return self._parts.stages.at(max(step - 1, 0)), self._parts.stages.at(max(after, 0))

    def _due(self, step: int, every: int | None) -> bool:
        return step in (0, self._parts.recipe.train.steps) or (every is not None and step % every == 0)

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""

    def losses(self, state: state_lib.State, *, stage: stages_lib.Stage) -> dict[str, float]:
        """Over all held-out batches, as the model of a stage predicts them: see `heldout.fields`."""
        build.add_evaluation(self._program, self._parts, stage)
        if self._batches is None:
            self._batches = self._read()
        sums = [self._program.evaluate(state, batch, stage=stage) for batch in self._batches]
        return heldout.fields(jax.device_get(sums), sources=self._parts.data.sources)

    def _answers(self, state: state_lib.State, asked: list[probes.Probe], *, stage: stages_lib.Stage) -> dict[str, float]:
        model, params = stage.evaluated.model(self._parts.recipe.model), tree.merge(state.params, state.buffers)
        return {name: value for probe in asked for name, value in self._probes.ask(probe, model=model, params=params).fields.items()}

    def _read(self) -> list[batch_lib.Batch]:
        parts, train = self._parts, self._parts.recipe.train
        return [
            parts.place(batch)
            for name in parts.data.sources
            for batch in parts.data.holdout_batches(name, batches=train.eval_batches, batch_rows=train.batch_rows)
        ]
