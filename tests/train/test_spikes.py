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


def changed(detector, losses, *, first, level, objective="text"):
    judge = lambda i, x: detector.judge(first + i, loss=x, gradient=1.0, finite=True, level=level, objective=objective)  # noqa: E731
    return [spike for i, x in enumerate(losses) if (spike := judge(i, x)) is not None]


def test_after_a_change_of_shape_few_steps_are_enough_at_twice_the_width():
    losses = noisy(40)
    window = np.asarray(losses[-32:])
    spread = 1.4826 * float(np.median(np.abs(window - np.median(window)))) / float(np.median(window))
    for deviations, share in ((6.0, 2 * 0.1), (40.0, 2 * 40 * spread)):  # of the median of the new level, 4
        for loss, wanted in ((4 * (1 + share) - 1e-6, []), (4 * (1 + share) + 1e-6, [45])):
            detector = spikes.Detector(config.GuardConfig(window=32, least=8, loss_deviations=deviations))
            assert not changed(detector, losses, first=1, level="short")
            assert not changed(detector, [4.0, 4.0, 30.0, 4.0], first=41, level="long"), "no change is a spike by itself"
            assert [s.step for s in changed(detector, [loss], first=45, level="long")] == wanted
    spike = detector.judge(46, loss=4.0, gradient=20.1, finite=True, level="long", objective="text")
    assert (spike.reason, spike.limit) == ("gradient", 20.0)
    assert not changed(detector, [4.0] * 4, first=47, level="long")
    assert [s.limit for s in changed(detector, [4.5], first=51, level="long")] == [pytest.approx(4.4)], "8 steps: the usual limits"


def test_a_ramp_of_short_phases_is_not_blind_and_another_loss_is():
    detector = spikes.Detector(CONFIG)
    changed(detector, noisy(40), first=1, level="0")
    for phase in range(1, 5):  # of 6 steps each, fewer than `least`
        assert not changed(detector, noisy(5, seed=phase), first=40 + 6 * phase, level=str(phase))
        assert [s.step for s in changed(detector, [9.0], first=45 + 6 * phase, level=str(phase))] == [45 + 6 * phase]
    assert not changed(detector, [0.1] * 7 + [5.0], first=100, level="warmup", objective="indexer")
    again = spikes.Detector(CONFIG)
    assert not changed(again, noisy(7), first=1, level="a")
    assert not changed(again, [*noisy(5), 9.0], first=8, level="b"), "there was no window to carry anything from"


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
