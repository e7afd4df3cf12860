"""The detector against its definition, on made-up losses."""

import json
import math

import numpy as np
import pytest

from v4train.train import config, spikes

CONFIG = config.GuardConfig(window=32, least=8)


def judged(detector, losses, *, gradient=1.0, first=1, level="a"):
    """The spikes of a sequence of losses."""
    found = [detector.judge(first + i, loss=x, gradient=gradient, finite=True, level=level) for i, x in enumerate(losses)]
    return [spike for spike in found if spike is not None]


def noisy(n, *, mean=3.0, sigma=0.02, seed=0):
    return list(mean + sigma * np.random.default_rng(seed).standard_normal(n))


def test_a_loss_is_a_spike_above_deviations_and_margin_of_the_median():
    losses = noisy(200)
    window = np.asarray(losses[-32:])
    median = float(np.median(window))
    sigma = 1.4826 * float(np.median(np.abs(window - median)))
    for deviations, margin in ((6.0, 0.0), (6.0, 0.1), (20.0, 0.1)):
        limit = median + max(deviations * sigma, margin * median)
        for loss, wanted in ((limit * (1 - 1e-9), None), (limit * (1 + 1e-9), "loss")):
            detector = spikes.Detector(config.GuardConfig(window=32, least=8, loss_deviations=deviations, loss_margin=margin))
            assert not judged(detector, losses)
            spike = detector.judge(201, loss=loss, gradient=1.0, finite=True, level="a")
            assert (spike and spike.reason) == wanted
            if spike is not None:
                assert (spike.step, spike.value, spike.limit, spike.median) == (201, loss, pytest.approx(limit), pytest.approx(median))


def test_a_gradient_is_a_spike_above_a_multiple_of_the_median():
    detector = spikes.Detector(CONFIG)
    for step, gradient in enumerate([1.0, 9.0] * 10, 1):
        assert detector.judge(step, loss=3.0, gradient=gradient, finite=True, level="a") is None
    assert detector.judge(21, loss=3.0, gradient=50.0, finite=True, level="a") is None
    spike = detector.judge(22, loss=3.0, gradient=90.1, finite=True, level="a")
    assert spike == spikes.Spike(22, "gradient", 90.1, 90.0, 9.0)
    assert str(spike) == "step 22: the gradient norm is 90.1, above 90 (median 9)"


@pytest.mark.parametrize("values", [(math.nan, 1.0, True), (3.0, math.inf, True), (3.0, 1.0, False)])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(values):
    loss, gradient, finite = values
    spike = spikes.Detector(CONFIG).judge(1, loss=loss, gradient=gradient, finite=finite, level="a")
    assert spike == spikes.Spike(1, "not_finite", None)


def test_nothing_else_is_one_before_there_is_a_history():
    detector = spikes.Detector(CONFIG)
    assert not judged(detector, noisy(7))
    assert not judged(detector, [1e6], first=8)
    assert [s.step for s in judged(detector, [3.0, 1e7], first=9)] == [10]


def test_spikes_do_not_enter_the_history_and_many_do_not_hide_the_next():
    detector = spikes.Detector(CONFIG)
    losses = noisy(60)
    for i in range(20, 60, 3):
        losses[i] = 9.0
    assert [s.step for s in judged(detector, losses)] == [i + 1 for i in range(20, 60, 3)]
    assert max(loss for _, loss, _ in detector.state()["accepted"]) < 4


def test_falling_and_slowly_rising_losses_are_none():
    falling = list(8 * np.exp(-np.arange(400) / 60) + 2 + 0.02 * np.random.default_rng(1).standard_normal(400))
    assert not judged(spikes.Detector(CONFIG), falling)
    assert not judged(spikes.Detector(CONFIG), list(np.linspace(2, 2.2, 300)))


def test_another_level_starts_anew():
    detector = spikes.Detector(CONFIG)
    assert not judged(detector, noisy(50))
    assert not judged(detector, noisy(50, mean=9.0), first=51, level="b")
    assert [s.step for s in judged(detector, [30.0], first=101, level="b")] == [101]
    assert not judged(detector, [30.0], first=102, level="c")


def test_a_restored_detector_goes_on_as_if_nothing_had_been():
    losses = noisy(150)
    losses[120] = 5.0
    straight = spikes.Detector(CONFIG)
    wanted = judged(straight, losses)
    assert [s.step for s in wanted] == [121]
    first, second = spikes.Detector(CONFIG), spikes.Detector(CONFIG)
    judged(first, losses[:70])
    second.restore(json.loads(json.dumps(first.state())))
    assert judged(second, losses[70:], first=71) == wanted
    assert second.state() == straight.state()
