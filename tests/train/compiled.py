"""The training step of the tiny recipe, compiled in half the trainer's time: what runs here is too small to need fast code."""

import dataclasses
from collections.abc import Callable

import jax

from tests.model import small
from tests.train import tiny
from v4train.sharding import constrain
from v4train.train import build
from v4train.train import state as state_lib
from v4train.train import step as step_lib


@dataclasses.dataclass
class Case:
    """A recipe's parts, its compiled step (nothing donated), a first state and batches."""

    parts: build.Parts
    step: Callable
    state: state_lib.State

    def batch(self, i=0):
        return self.parts.data.batch(i)

    def run(self, state, batch):
        return self.step(state, self.parts.place(batch))


def case(data, /, **changes) -> Case:
    """Of the recipe with these changes (see `tiny.values`)."""
    parts = build.parts(tiny.recipe(data, **changes))
    r = parts.recipe
    step = step_lib.Step(
        parts.model, parts.declarations, parts.optimizer, r.numerics, len(parts.data.sources), r.train.microbatches, r.optimizer.clip_norm
    )

    def run(state, batch):
        with constrain.on_mesh(parts.mesh):
            return jitted(state, batch)

    jitted = small.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, parts.state), None))
    return Case(parts, run, build.first_state(parts))
