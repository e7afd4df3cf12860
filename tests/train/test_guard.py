"""The guard in the real loop, over a model that only remembers which batches it was trained on: what is left out is then plain to see."""

import json
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4train.train import config, guard, loop, snapshots
from v4train.train import state as state_lib

STEPS = 64
EVERY = 8


class Moments(NamedTuple):
    """An optimizer's state as optax has it."""

    count: jax.Array
    mu: jax.Array


class Report(NamedTuple):
    """What the guard reads of a report."""

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


@jax.jit
def _report(loss, gradient):
    return Report(loss, gradient, jnp.isfinite(loss))


class Program:
    """``trained[i]`` counts how often the parameters have seen batch i; the state is donated, as by the real step."""

    def __init__(self, spikes):
        """``spikes`` is batch -> (loss, gradient norm)."""
        self._spikes, self._seen = spikes, []
        self._move = jax.jit(self._moved, donate_argnums=0)

    @staticmethod
    def _moved(state, batch):
        params = {"trained": state.params["trained"].at[batch].add(1)}
        moments, other = state.optimizer
        optimizer = Moments(moments.count + 1, moments.mu + 1.0), {"count": other["count"] + 1, "counted": other["counted"] + 1}
        return state._replace(step=state.step + 1, params=params, buffers={"b": state.buffers["b"] * 0.5}, optimizer=optimizer)

    def step(self, state, batch, *, variant):
        assert int(batch) not in self._seen, "a batch was trained on twice"
        self._seen.append(int(batch))
        loss, gradient = self._spikes.get(batch, (3.0 + 0.01 * (batch % 3), 1.0))
        return self._move(state, batch), _report(loss, gradient)


def first_state(sharding=None):
    zero = jnp.zeros((), jnp.int32)
    params = {"trained": jnp.zeros(STEPS, jnp.int32)}
    state = state_lib.State(
        zero, params, {"b": jnp.ones(4)}, (Moments(zero.copy(), jnp.zeros(8)), {"count": zero.copy(), "counted": zero.copy()}), zero.copy()
    )
    if sharding is None:
        return state
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, sharding if x.shape == (STEPS,) else whole), state)


def settings(**changes):
    return config.GuardConfig(**({"window": 16, "least": 4, "snapshot_every": EVERY, "rollback_window": 40} | changes))


class Ran:
    """A run over the batches from ``start`` on."""

    def __init__(self, spikes, *, start=0, state=None, before=None, hooks=(), reads=lambda step: False, until=STEPS, **changes):
        self.records, self.lines = [], []
        self.guard = guard.Guard(settings(**changes), reads=reads, sink=self.records.append, say=self.lines.append)
        if before is not None:
            self.guard.restore(json.loads(json.dumps(before)))
        parts = types.SimpleNamespace(
            recipe=types.SimpleNamespace(train=types.SimpleNamespace(steps=STEPS)),
            data=types.SimpleNamespace(iterate=lambda start: iter(np.arange(start, STEPS + 99))),
            place=lambda batch: batch,
            variant_at=lambda step: None,
        )
        stop = lambda done: done >= until or self.guard.exceeded is not None  # noqa: E731
        self.state, self.done = loop.run(
            parts, Program(spikes), state or first_state(), start=start, hooks=hooks, stop=stop, guard=self.guard
        )

    @property
    def left_out(self):
        """Batches that the parameters have not seen."""
        trained = np.asarray(self.state.params["trained"])[: self.done]
        assert set(trained) <= {0, 1}
        return list(np.flatnonzero(trained == 0))


NAN, LOSS, GRADIENT = (np.nan, 1.0), (9.0, 1.0), (3.0, 1e4)


def test_without_a_spike_nothing_happens():
    ran = Ran({})
    assert (ran.left_out, ran.records, ran.lines, ran.done) == ([], [], [], STEPS)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("values", "reason"), [(NAN, "not_finite"), (LOSS, "loss"), (GRADIENT, "gradient")])
def test_the_run_goes_back_to_before_the_spike_and_on_after_it(values, reason, where):
    ran = Ran({20: values}, snapshots=where)
    # Batch 20 is step 21; step 22 was started when its report was read. Snapshot 16 is older than the update before it.
    assert ran.left_out == [16, 17, 18, 19, 20, 21]
    moments, other = ran.state.optimizer
    assert (int(ran.state.step), int(moments.count), int(other["count"])) == (STEPS, STEPS, STEPS)
    assert int(other["counted"]) == STEPS - 6
    np.testing.assert_array_equal(moments.mu, STEPS - 6.0)
    np.testing.assert_array_equal(ran.state.buffers["b"], 0.5 ** (STEPS - 6))
    (told,) = ran.records
    assert told == ran.guard.rollbacks[0]
    wanted = {"kind": "rollback", "step": 22, "spike": 21, "reason": reason, "snapshot": 16, "first_batch": 16, "last_batch": 21}
    assert wanted.items() <= told.items()
    assert guard.skipped_batches(ran.guard.rollbacks) == 6
    assert "back to the state of step 16, without batches 16 to 21" in ran.lines[0]


@pytest.mark.parametrize("batch", range(8, 33))
def test_detection_is_one_step_late_at_most_and_the_update_before_the_spike_is_undone(batch):
    (told,) = Ran({batch: LOSS}).records
    assert told["spike"] == batch + 1
    assert told["last_batch"] in (batch, batch + 1)
    newest = (batch - 1) // EVERY * EVERY
    assert told["snapshot"] == newest <= batch - 1


@pytest.mark.parametrize("batch", range(14, 22))
def test_a_state_that_is_read_was_judged(batch):
    """A hook that saves and one that evaluates, every 5 steps: neither ever sees a state that batch has gone into."""
    seen = []

    class Reads:
        def before(self, step, state):
            if step % 5 == 0 or step == STEPS:
                seen.append((step, np.asarray(state.params["trained"])[batch], int(state.step)))

        def after(self, step, report):
            pass

    Ran({batch: GRADIENT}, hooks=[Reads()], reads=lambda step: step % 5 == 0)
    assert len(seen) == STEPS // 5 + 2
    assert all(trained == 0 and step == position for step, trained, position in seen)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_spike_in_the_first_steps_goes_back_to_the_first_state(batch):
    ran = Ran({batch: NAN})
    assert ran.records[0]["snapshot"] == 0
    assert ran.left_out == list(range(batch + 2))
    assert Ran({batch: LOSS}).left_out == []  # too early to know what is normal


def test_a_snapshot_that_did_not_help_is_passed_over():
    ran = Ran({20: LOSS, 22: LOSS})
    assert [(told["snapshot"], told["first_batch"], told["last_batch"]) for told in ran.records] == [(16, 16, 21), (8, 8, 23)]
    assert ran.left_out == list(range(8, 24))
    assert guard.skipped_batches(ran.guard.rollbacks) == 16


def test_the_only_snapshot_is_used_again_and_what_was_trained_in_between_is_listed():
    ran = Ran({4: NAN, 7: NAN})
    assert [(told["snapshot"], told["first_batch"], told["last_batch"]) for told in ran.records] == [(0, 0, 5), (0, 6, 7)]
    assert ran.left_out == list(range(8))


def test_the_last_step_is_judged():
    ran = Ran({STEPS - 1: NAN})
    assert (ran.done, ran.records[0]["last_batch"]) == (STEPS, STEPS - 1)
    assert ran.left_out == list(range(56, STEPS))


def test_too_many_rollbacks_end_the_run_with_a_good_state():
    spikes = {10: NAN, 20: NAN, 30: NAN}
    ran = Ran(spikes, max_rollbacks=2)
    assert ran.done == 32
    assert "after 2 rollback(s) in the last 40 steps, and train.guard.max_rollbacks is 2" in ran.guard.exceeded
    assert "step 31: loss or gradient are not finite" in ran.guard.exceeded
    assert "anticipate" in ran.guard.exceeded
    assert not any(np.asarray(ran.state.params["trained"])[list(spikes)])
    assert Ran(spikes, max_rollbacks=3).done == STEPS
    assert Ran({10: NAN, 60: NAN}, max_rollbacks=1, rollback_window=40).done == STEPS, "they are too far apart to count together"
    assert Ran({10: NAN}, max_rollbacks=0).done == 12


def test_who_goes_on_from_a_checkpoint_judges_as_one_who_never_stopped():
    spikes = {10: NAN, 30: LOSS, 50: GRADIENT}
    straight = Ran(spikes)
    first = Ran(spikes, until=24)
    second = Ran(spikes, start=24, state=first.state, before=first.guard.state())
    assert first.records + second.records == straight.records == second.guard.rollbacks
    assert second.guard.state() == straight.guard.state()
    assert second.left_out == straight.left_out
    cut = Ran(spikes, start=first.done, state=Ran(spikes, until=24).state, before=first.guard.state(), max_rollbacks=1)
    assert cut.guard.exceeded is not None, "rollbacks of earlier processes count"


def test_a_spike_right_after_a_resume_goes_back_to_what_was_restored():
    ran = Ran({24: LOSS}, start=24, state=Ran({}, until=24).state, before=Ran({}, until=24).guard.state())
    assert (ran.records[0]["snapshot"], ran.left_out) == (24, [24, 25])


def test_a_guard_without_config_judges_nothing_and_keeps_what_it_knows():
    before = Ran({10: NAN}).guard.state()
    kept = guard.Guard(None)
    kept.restore(before)
    state = first_state()
    assert kept.judge(1, Report(jnp.nan, jnp.nan, jnp.asarray(False)), state, started=1) is state
    assert (kept.state(), kept.must_know(EVERY), kept.anticipates(9)) == (before, False, False)


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_snapshot_survives_the_donation_of_its_state_and_keeps_its_place(where):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    program = Program({})
    state = first_state(sharding)
    taken = snapshots.take(state, step=0, where=where)
    for _ in range(2):  # it can be gone back to again
        for batch in range(5):
            state = program._move(state, batch)
        state = taken.onto(state, done=int(state.step))
        assert not np.asarray(state.params["trained"]).any()
        assert state.params["trained"].sharding == sharding
        assert int(state.optimizer[0].count) == int(state.step)
