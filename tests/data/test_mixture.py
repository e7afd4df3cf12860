"""The mixture deals rows out exactly."""

import fractions
import math

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


def test_weights_that_leave_no_source_are_refused():
    for weights in ((), (0.0, 0.0), (1.0, -0.5)):
        with pytest.raises(ValueError, match="must not be negative and not all 0"):
            mixture.Mixture.of(weights)


def nested_floor(stretches, rows):
    """Counts after each row, from the definition, in fractions: what each source is due of what those before it have left."""
    sources = len(stretches[0][1])
    due, counts, found = [fractions.Fraction(0)] * sources, [0] * sources, [(0,) * sources]
    for i in range(rows):
        parts = next(parts for first, parts in reversed(stretches) if i >= first)
        comes = 1  # the row, as long as no source has taken it
        for s in range(sources):
            if comes and parts[s]:
                due[s] += fractions.Fraction(parts[s], sum(parts[s:]))
            grown = math.floor(due[s]) - counts[s]
            assert grown in ((0, 1) if comes else (0,))
            counts[s] += grown
            comes -= grown
        assert comes == 0
        found.append(tuple(counts))
    return found


@pytest.mark.parametrize(
    "stretches",
    [
        [(0, (3, 2, 1)), (7, (1, 2, 3)), (8, (5, 1, 7))],
        [(0, (0, 1, 0)), (11, (1, 0, 2)), (50, (1, 1, 1)), (53, (1, 0, 0)), (60, (0, 0, 1))],
        [(i * 3, (64 - i, 40, i)) for i in range(64)],
    ],
)
def test_stretches_carry_what_is_due(stretches):
    m, expected = mixture.Mixture.scheduled(stretches), nested_floor(stretches, 400)
    for i in range(400):
        assert m.rows_before(i) == expected[i]
        source, row = m.source_and_row(i)
        assert (row, row + 1) == (expected[i][source], expected[i + 1][source])


def test_a_ramp_of_short_stretches_is_exact():
    """8 rows a stretch, the first source at 5 to 10 %: rounding anew on each stretch would never draw it."""
    weights = [(8 * i, (fractions.Fraction(64 + i, 1280), fractions.Fraction(1216 - i, 1280))) for i in range(64)]
    due = sum(8 * float(shares[0]) for _, shares in weights)
    assert mixture.Mixture.scheduled(weights).rows_before(512)[0] == pytest.approx(due, abs=1)


def test_the_past_does_not_know_the_future():
    """A stretch that is cut in two, sources of weight 0 that are put between the others, and later changes: the same rows."""
    one = mixture.Mixture.scheduled([(0, (3, 2, 1)), (100, (1, 1, 5))])
    cut = mixture.Mixture.scheduled([(0, (3, 2, 1)), (37, (6, 4, 2)), (100, (1, 1, 5)), (101, (1, 1, 5)), (300, (1, 0, 0))])
    more = mixture.Mixture.scheduled([(0, (0, 3, 0, 2, 1, 0)), (100, (0, 1, 0, 1, 5, 0)), (301, (1, 1, 1, 1, 1, 1))])
    for i in range(300):
        assert cut.source_and_row(i) == one.source_and_row(i)
        source, row = more.source_and_row(i)
        assert ((1, 3, 4).index(source), row) == one.source_and_row(i)
