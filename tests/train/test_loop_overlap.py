"""The next batch is on its way to the devices while they still work on the last step."""

import itertools
import types

import numpy as np

from v4train.train import loop


class Report:
    """A value on a device: fetching it waits for the step that makes it."""

    def __init__(self, step, log):
        self._step, self._log = step, log

    def __array__(self, dtype=None, copy=None):
        self._log.append(f"wait for step {self._step}")
        return np.zeros(())


def test_a_batch_is_placed_before_the_loop_waits_for_the_step_in_flight():
    log, numbers = [], itertools.count(1)

    def place(batch):
        log.append(f"place {batch}")
        return batch

    def step(state, batch, *, variant):
        log.append(f"start step {batch}")
        return state, Report(batch, log)

    recipe = types.SimpleNamespace(train=types.SimpleNamespace(steps=4))
    data = types.SimpleNamespace(iterate=lambda start: numbers)
    parts = types.SimpleNamespace(recipe=recipe, data=data, place=place, variant_at=lambda step: None)
    loop.run(parts, types.SimpleNamespace(step=step), None, start=0, hooks=(), stop=lambda done: False)
    for k in range(1, 4):
        assert log.index(f"start step {k}") < log.index(f"place {k + 1}") < log.index(f"start step {k + 1}")
        assert log.index(f"start step {k + 1}") < log.index(f"wait for step {k}"), (
            "the transfer of a batch must not wait for the step before"
        )
    assert log[-1] == "wait for step 4"
