"""The mixture deals rows out exactly."""

import numpy as np
import pytest

from v4train.data import mixture


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1), (1e-6, 1.0), (5, 1, 1, 1, 1, 1, 1), tuple(range(1, 35))])
def test_counts_are_exact_and_rows_are_dealt_in_order(weights):
    m = mixture.Mixture.of(weights)
    seen = [0] * len(weights)
    for i in range(4000):
        assert m.rows_before(i) == tuple(seen)
        source, row = m.source_and_row(i)
        assert row == seen[source]
        seen[source] += 1
        share = np.array(weights) / sum(weights) * (i + 1)
        assert np.abs(np.array(seen) - share).max() < 1 + np.log(len(weights)) + 1e-3
    assert sum(m.shares) == pytest.approx(1)


def test_weights_mean_what_is_written():
    assert mixture.Mixture.of((0.7, 0.2, 0.1)).parts == (7, 2, 1)
    assert mixture.Mixture.of((1.0, 2.0)).rows_before(480) == (160, 320)


def test_far_rows_are_exact():
    m, far = mixture.Mixture.of((0.7, 0.2, 0.1)), 10**15
    counts = m.rows_before(far)
    assert counts == (7 * 10**14, 2 * 10**14, 10**14)
    source, row = m.source_and_row(far)
    assert row == counts[source]
    assert m.rows_before(far + 1)[source] == row + 1


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        mixture.Mixture.of((1.0, 0.0))
