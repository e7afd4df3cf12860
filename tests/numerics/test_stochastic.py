"""Random rounding: its expectation, by counting all random numbers; its sums; and that it is a function of the key."""

import jax
import jax.numpy as jnp
import numpy as np

from v4train.numerics import stochastic

ALL = np.arange(2**16, dtype=np.uint16)


def test_the_mean_over_all_random_numbers_is_the_value():
    """Exactly: every one of the 2^16 numbers once, summed in fp64."""
    for x in np.float32([1.0, -1.00001, 3.1415927, 1e-20, -65504.123, 257.3]):
        rounded = np.asarray(stochastic.round_up_or_down(jnp.full(ALL.shape, x), jnp.asarray(ALL))).astype(np.float64)
        assert len(np.unique(rounded)) == (1 if x == 1.0 else 2)
        assert rounded.mean() == np.float64(x)


def test_what_is_not_finite_stays_what_it_is():
    x = jnp.asarray([np.inf, -np.inf, np.nan])
    got = np.asarray(stochastic.round_up_or_down(x, jnp.full(3, 2**16 - 1, jnp.uint16))).astype(np.float32)
    np.testing.assert_array_equal(got, x)


def test_long_sums_are_right_on_average_where_rounding_to_nearest_stands_still():
    """1 + 1,000 x 0.001: to nearest, bf16 never leaves 1. 4,096 sums, each within the spread of 1,000 roundings of at most 2^-8."""

    @jax.jit
    def total(key):
        def add(sum, i):
            return stochastic.add({"x": sum}, {"x": jnp.full(4096, 0.001)}, key=jax.random.fold_in(key, i))["x"], None

        return jax.lax.scan(add, jnp.ones(4096, jnp.bfloat16), jnp.arange(1000))[0]

    sums = np.asarray(total(jax.random.key(0))).astype(np.float64)
    one = 2.0**-7 / 2  # the deviation of a rounding between neighbours 2^-7 apart is at most half of that
    spread = one * np.sqrt(1000)
    assert np.abs(sums - 2.0).max() < 6 * spread
    assert abs(sums.mean() - 2.0) < 5 * spread / np.sqrt(4096)
    assert sums.std() > 0
    nearest = np.ones((), jnp.bfloat16)
    for _ in range(1000):
        nearest = (nearest + jnp.bfloat16(0.001)).astype(jnp.bfloat16)
    assert nearest == 1


def test_the_key_decides_and_leaves_have_numbers_of_their_own():
    total = {"a": jnp.zeros(512, jnp.bfloat16), "b": jnp.zeros(512, jnp.bfloat16)}
    x = {"a": jnp.full(512, 1.003), "b": jnp.full(512, 1.003)}
    first, again, other = (stochastic.add(total, x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert first["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(first["a"], again["a"])
    assert (first["a"] != other["a"]).any()
    assert (first["a"] != first["b"]).any()
