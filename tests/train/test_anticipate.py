"""Anticipatory routing against a loop written out by hand, in which the old parameters are kept and asked when they are needed."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from tests.model import small
from tests.train import compiled, tiny
from v4train.sharding import constrain
from v4train.train import build, config, guard, loop
from v4train.train import step as step_lib

MODEL = {"hidden": 16, "layers": [{"pattern": ["window", "csa"]}]}


@dataclasses.dataclass
class Compiled:
    """The functions of a small recipe, nothing donated, and a loop over them."""

    case: compiled.Case
    given: object
    anticipate: object

    def batch(self, i):
        return self.case.parts.place(self.case.batch(i))

    def loop(self, *, steps, lag, state=None, start=0, judge=None, **anticipate):
        """The real loop with the real guard; returns the state after it."""
        parts = self.case.parts
        variant = parts.variant_at(0)
        always = build.anticipated(variant)
        program = build.Program({variant: self.case.step, always: self.given}, {}, 0.0, {always: self.anticipate})
        watched = guard.Guard(config.GuardConfig(anticipate={"lag": lag, **anticipate}, snapshot_every=4))
        if judge is not None:
            watched.judge = judge(watched)
        train = parts.recipe.train.model_copy(update={"steps": steps})
        short = dataclasses.replace(parts, recipe=parts.recipe.model_copy(update={"train": train}))
        state = self.case.state if state is None else state
        return loop.run(short, program, state, start=start, hooks=(), stop=lambda done: False, guard=watched)[0]


@pytest.fixture(scope="module")
def quick(data):
    case = compiled.case(data, model=tiny.values(data, data)["model"] | MODEL)
    step, anticipate = functions(case.parts)
    mesh = case.parts.mesh
    return Compiled(case, on(mesh, small.jit(step)), on(mesh, small.jit(anticipate)))


def functions(parts):
    r = parts.recipe
    numbers = len(parts.data.sources), r.train.microbatches, r.optimizer.clip_norm
    step = step_lib.Step(parts.model, parts.declarations, parts.optimizer, r.numerics, *numbers)
    return step, step_lib.Anticipate(parts.model, parts.declarations, r.numerics)


def on(mesh, call):
    def run(*args):
        with constrain.on_mesh(mesh):
            return call(*args)

    return run


def same_bits(a, b):
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def by_hand(quick, *, steps, lag, first=0):
    """Steps whose routing is that of the state ``lag`` steps ago, or of the oldest that there is."""
    states = [quick.case.state]
    for t in range(steps):
        old = states[max(t - lag, first)]
        states.append(quick.given(states[t], quick.batch(t), quick.anticipate(old, quick.batch(t)))[0])
    return states[-1]


def usual(quick, steps, state=None):
    state = quick.case.state if state is None else state
    for t in range(steps):
        state = quick.case.step(state, quick.batch(t))[0]
    return state


def test_routing_by_the_current_parameters_is_the_usual_step(quick):
    state, batch = usual(quick, 1), quick.batch(1)
    usual_state, usual_report = quick.case.step(state, batch)
    state, report = quick.given(state, batch, quick.anticipate(state, batch))
    jax.tree.map(np.testing.assert_array_equal, report, usual_report)
    assert same_bits(state, usual_state)


def test_the_loop_with_lag_0_is_the_usual_one(quick):
    assert same_bits(quick.loop(steps=3, lag=0, always=True), usual(quick, 3))


@pytest.mark.parametrize("lag", [1, 2])
def test_the_loop_is_the_one_by_hand(quick, lag):
    wanted = by_hand(quick, steps=5, lag=lag)
    assert same_bits(quick.loop(steps=5, lag=lag, always=True), wanted)
    assert not same_bits(wanted, usual(quick, 5)), "the routing of old parameters must differ, or this shows nothing"


def test_after_a_rollback_the_queue_is_that_of_the_restored_state_and_ends_when_calm(quick):
    """The spike of step 3 is known after step 4: back to the first state, anticipated for two steps, then as usual."""

    def judge(watched, original=guard.Guard.judge):
        def run(step, report, state, *, started):
            seen = types.SimpleNamespace(loss=np.nan if step == 3 else report.loss, grad_norm=report.grad_norm, finite=True)
            return original(watched, step, seen, state, started=started)

        return run

    found = quick.loop(steps=8, lag=1, calm_steps=2, judge=judge)
    first = quick.case.state
    state = first._replace(step=first.step + 4, optimizer=first.optimizer._replace(count=first.optimizer.count + 4))
    chosen = [quick.anticipate(first, quick.batch(t)) for t in (4, 5)]
    for t, given in zip((4, 5), chosen, strict=True):
        state = quick.given(state, quick.batch(t), given)[0]
    for t in (6, 7):
        state = quick.case.step(state, quick.batch(t))[0]
    assert same_bits(found, state)


def test_microbatches_get_their_rows_of_the_experts(data, quick):
    train = {**tiny.values(data, data)["train"], "microbatches": 4}
    case = compiled.case(data, model=tiny.values(data, data)["model"] | MODEL, train=train)
    step, _ = functions(case.parts)
    state, batch = usual(quick, 1), quick.batch(2)
    given = quick.anticipate(by_hand(quick, steps=2, lag=1), batch)
    shuffled = jax.tree.map(lambda x: (x + 3) % 8, given)  # experts that no router would choose: those of another row would show
    _, whole = quick.given(state, batch, shuffled)
    _, parts = on(case.parts.mesh, small.jit(step))(state, batch, shuffled)
    np.testing.assert_array_equal(parts.load, whole.load)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(parts.grad_norm, whole.grad_norm, rtol=1e-4)


@pytest.mark.slow
def test_on_a_mesh_it_is_compiled_with_the_shardings_that_the_loop_needs(data):
    """The trainer's own compiled functions on 8 devices: the queue's arrays go from one into the other."""
    recipe = tiny.recipe(data, model=tiny.values(data, data)["model"] | MODEL, mesh={"expert": 2, "fsdp": 2, "context": 2})
    parts = build.parts(recipe)
    variant = parts.variant_at(0)
    program = build.Program({}, {}, 0.0)
    assert build.add_anticipation(program, parts, variant) is not None
    assert build.add_anticipation(program, parts, variant) is None
    build.add_step(program, parts, variant)
    batch = parts.place(parts.data.batch(0))
    given = program.anticipate(build.first_state(parts), batch, variant=variant)
    _, report = program.step(build.first_state(parts), batch, variant=variant, given=given)
    _, usual_report = program.step(build.first_state(parts), batch, variant=variant)
    np.testing.assert_array_equal(report.load, usual_report.load)
    np.testing.assert_allclose(report.loss, usual_report.loss, rtol=1e-6)
    np.testing.assert_allclose(report.grad_norm, usual_report.grad_norm, rtol=1e-5)
