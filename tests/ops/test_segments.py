"""Document bounds and totals against loops; gathers against indexing, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.ops import gather, segments, select

IDS = np.array([[1, 1, 1, 2, 2, 0, 0, 3], [1, 2, 3, 3, 0, 4, 4, 4]], np.int32)


def test_bounds_and_totals_of_every_run():
    x = np.random.default_rng(0).integers(0, 5, (2, 8, 3)).astype(np.float32)
    first, last = segments.bounds(jnp.asarray(IDS))
    totals = segments.totals(jnp.asarray(x), jnp.asarray(IDS))
    for b in range(2):
        for t in range(8):
            start = t
            while start and IDS[b, start - 1] == IDS[b, t]:
                start -= 1
            end = t
            while end < 7 and IDS[b, end + 1] == IDS[b, t]:
                end += 1
            assert (first[b, t], last[b, t]) == (start, end)
            np.testing.assert_array_equal(totals[b, t], x[b, start : end + 1].sum(axis=0))


@pytest.mark.parametrize("way", ["compared", "scattered"])
def test_gradients_of_rows_are_summed_in_fp32(way):
    """256 times 1 + 2^-7 into one row: in bf16 the sum would stop growing long before."""
    at, gradient = jnp.zeros((1, 32, 8), jnp.int32), jnp.full((1, 32, 8, 1), 1 + 2**-7, jnp.bfloat16)
    with select.using("summed_rows", implementation=way):
        _, pull = jax.vjp(lambda x: gather.take_rows(x, at), jnp.ones((1, 3, 1), jnp.bfloat16))
    np.testing.assert_array_equal(pull(gradient)[0][0, :, 0].astype(np.float32), [258, 0, 0])


@pytest.mark.parametrize(("table", "way"), [(7, "compared"), (7, "scattered"), (gather.LARGEST_TABLE + 1, "compared")])
def test_gathers_and_their_gradients(table, way):
    rng = np.random.default_rng(1)
    rows, at = rng.normal(size=(2, table, 3)).astype(np.float32), rng.integers(0, table, (2, 5, 4)).astype(np.int32)
    weight = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    with select.using("summed_rows", implementation=way):
        out, pull = jax.vjp(lambda x: gather.take_rows(x, jnp.asarray(at)), jnp.asarray(rows))
    expected = np.zeros_like(rows)
    for b in range(2):
        np.testing.assert_array_equal(out[b], rows[b][at[b]])
        np.add.at(expected[b], at[b], weight[b])
    np.testing.assert_allclose(pull(jnp.asarray(weight))[0], expected, atol=1e-5)

    scores, places = rng.normal(size=(5, table)).astype(np.float32), at[0]
    out, pull = jax.vjp(lambda x: gather.take_elements(x, jnp.asarray(places)), jnp.asarray(scores))
    np.testing.assert_array_equal(out, np.take_along_axis(scores, places, -1))
    expected = np.zeros_like(scores)
    for i in range(5):
        np.add.at(expected[i], places[i], weight[0, i, :, 0])
    np.testing.assert_allclose(pull(jnp.asarray(weight[0, ..., 0]))[0], expected, atol=1e-5)
