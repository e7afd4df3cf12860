"""The learning rate, against the closed form in fp64 and exactly at its edges."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.optim import config as config_lib
from v4train.optim import schedule

CONFIG = config_lib.ScheduleConfig(peak_lr=2.7e-4, final_lr=2.7e-5, warmup_steps=4, decay_steps=6)
TOTAL = 20
PEAK, FINAL = np.float32(2.7e-4), np.float32(2.7e-5)


def rate(step, config=CONFIG, total=TOTAL):
    return np.asarray(schedule.learning_rate(config, step=step, total_steps=total))


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, PEAK / 4),
        (1, PEAK / 2),
        (3, PEAK),
        (4, PEAK),
        (12, PEAK),
        (13, PEAK),
        (16, (PEAK + FINAL) / 2),
        (19, FINAL),
        (20, FINAL),
        (99, FINAL),
    ],
)
def test_edges_are_exact(step, expected):
    np.testing.assert_array_max_ulp(rate(step), np.float32(expected), maxulp=1 if step == 16 else 0)


def test_first_step_of_the_decay_is_below_the_peak():
    assert rate(14) < PEAK


def test_whole_curve_matches_the_closed_form_under_jit():
    def closed(step):
        done = step + 1
        if done <= 4:
            return 2.7e-4 * done / 4
        if done <= TOTAL - 6:
            return 2.7e-4
        return 2.7e-5 + (2.7e-4 - 2.7e-5) * (1 + math.cos(math.pi * (done - TOTAL + 6) / 6)) / 2

    curve = jax.jit(jax.vmap(lambda step: schedule.learning_rate(CONFIG, step=step, total_steps=TOTAL)))(jnp.arange(TOTAL))
    assert curve.dtype == jnp.float32
    np.testing.assert_allclose(curve, [closed(step) for step in range(TOTAL)], rtol=1e-6)


SHAPES = {"cosine": lambda u: (1 + math.cos(math.pi * u)) / 2, "linear": lambda u: 1 - u, "sqrt": lambda u: 1 - math.sqrt(u)}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_decay_and_the_flat_end(shape):
    config = CONFIG.model_copy(update={"decay_shape": shape, "final_steps": 3})

    def closed(step):
        if step < 4:
            return 2.7e-4 * (step + 1) / 4
        into = step + 1 - (TOTAL - 3 - 6)
        return 2.7e-5 + (2.7e-4 - 2.7e-5) * SHAPES[shape](min(max(into / 6, 0), 1))

    curve = jax.jit(jax.vmap(lambda step: schedule.learning_rate(config, step=step, total_steps=TOTAL)))(jnp.arange(TOTAL))
    np.testing.assert_allclose(curve, [closed(step) for step in range(TOTAL)], rtol=2e-6)
    assert (curve[10], curve[11] < PEAK) == (PEAK, True)
    assert [rate(step, config) for step in (16, 17, 18, 19, 99)] == [FINAL] * 5
    assert rate(15, config) > FINAL


def test_the_shapes_are_ordered_and_cosine_is_the_default():
    halfway = {shape: float(rate(13, CONFIG.model_copy(update={"decay_shape": shape, "final_steps": 3}))) for shape in SHAPES}
    assert halfway["sqrt"] < halfway["linear"] == pytest.approx(halfway["cosine"], rel=1e-6)
    assert CONFIG.decay_shape == "cosine"
    assert CONFIG.final_steps == 0


def test_ramps_may_be_absent():
    flat = config_lib.ScheduleConfig(peak_lr=1e-3, final_lr=0.0, warmup_steps=0, decay_steps=0)
    assert {float(rate(step, flat, 3)) for step in range(4)} == {float(np.float32(1e-3))}


def test_edges_are_exact_at_large_step_numbers():
    long = config_lib.ScheduleConfig(peak_lr=1e-3, final_lr=1e-4, warmup_steps=2000, decay_steps=1)
    total = 2**30
    assert rate(total - 2, long, total) == np.float32(1e-3)
    assert rate(total - 1, long, total) == np.float32(1e-4)


def test_ramps_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="do not fit into a run of 9 steps"):
        rate(0, total=9)


def test_a_flat_end_counts_and_needs_a_decay():
    with pytest.raises(ValueError, match="warmup_steps 4 \\+ decay_steps 6 \\+ final_steps 3 = 13 do not fit into a run of 12 steps"):
        rate(0, CONFIG.model_copy(update={"final_steps": 3}), total=12)
    with pytest.raises(ValueError, match="final_steps 3 need a decay before them; set decay_steps"):
        config_lib.ScheduleConfig(peak_lr=1e-3, final_lr=0.0, warmup_steps=0, decay_steps=0, final_steps=3)
