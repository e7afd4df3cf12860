"""Rotation against complex numbers in fp64: layout, direction, YaRN's ramp, and precision at a million tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.ops import rope

FREQS = rope.frequencies(8, theta=10_000.0)
V4 = {"theta": 160_000.0, "factor": 16.0, "original_positions": 65_536, "beta_fast": 32.0, "beta_slow": 1.0}


def _draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _turned(x, positions, freqs, sign=1):
    """Channel pairs (2 k, 2 k + 1) of the tail are complex numbers, multiplied by ``exp(i p f_k)``."""
    x, tail = np.asarray(x, np.float64).copy(), 2 * len(freqs)
    pairs = x[..., -tail::2] + 1j * x[..., -tail + 1 :: 2]
    angles = np.asarray(positions, np.float64)[..., None] * np.asarray(freqs, np.float64)
    pairs *= np.exp(sign * 1j * angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), -1))
    x[..., -tail::2], x[..., -tail + 1 :: 2] = pairs.real, pairs.imag
    return x


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 5, 3, 12)], ids=["no heads", "heads"])
@pytest.mark.parametrize("inverse", [False, True])
def test_multiplies_trailing_interleaved_pairs_by_a_complex_number(shape, inverse):
    x, positions = _draw(*shape), np.array([[0, 1, 2, 3, 4], [7, 8, 0, 90, 11]])
    out = rope.rotate(x, positions, freqs=FREQS, inverse=inverse)
    np.testing.assert_allclose(out, _turned(x, positions, FREQS, -1 if inverse else 1), atol=1e-5)
    np.testing.assert_array_equal(out[..., :4], x[..., :4])


def test_all_channels_may_turn():
    x, positions = _draw(1, 3, 8), np.array([[5, 6, 7]])
    np.testing.assert_allclose(rope.rotate(x, positions, freqs=FREQS), _turned(x, positions, FREQS), atol=1e-5)


def test_the_inverse_undoes_and_the_gradient_is_the_inverse():
    x, positions = _draw(2, 5, 3, 12), np.arange(10).reshape(2, 5) * 1_000
    out, pull = jax.vjp(lambda x: rope.rotate(x, positions, freqs=FREQS), x)
    np.testing.assert_allclose(rope.rotate(out, positions, freqs=FREQS, inverse=True), x, atol=1e-5)
    ct = _draw(2, 5, 3, 12, seed=1)
    np.testing.assert_allclose(pull(ct)[0], rope.rotate(ct, positions, freqs=FREQS, inverse=True), atol=1e-5)


def test_what_a_query_reads_depends_on_relative_positions_only():
    """Scores, and values that carry their position's rotation and are turned back by the query's."""
    query, key = _draw(1, 1, 8), _draw(1, 1, 8, seed=1)

    def read(p, t):
        turned = rope.rotate(key, np.array([[p]]), freqs=FREQS)
        score = (rope.rotate(query, np.array([[t]]), freqs=FREQS) * turned).sum()
        return score, rope.rotate(turned, np.array([[t]]), freqs=FREQS, inverse=True)

    near, far, other = read(3, 10), read(503, 510), read(3, 11)
    np.testing.assert_allclose(near[0], far[0], atol=1e-4)
    np.testing.assert_allclose(near[1], far[1], atol=1e-4)
    assert np.abs(near[1] - other[1]).max() > 0.1


def test_plain_frequencies():
    np.testing.assert_allclose(FREQS, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_array_equal(FREQS, rope.frequencies(8, theta=10_000.0, factor=1.0, original_positions=64))


def test_yarn_ramps_from_pair_15_to_25_and_divides_all_slower_ones():
    plain, scaled = rope.frequencies(64, theta=160_000.0), rope.frequencies(64, **V4)
    np.testing.assert_array_equal(scaled[:16], plain[:16])
    np.testing.assert_allclose(scaled[25:], plain[25:] / 16, rtol=1e-6)
    np.testing.assert_allclose((1 - scaled[15:26] / plain[15:26]) * 16 / 15, np.arange(11) / 10, atol=1e-6)


def test_there_is_no_attention_temperature():
    x, positions = _draw(1, 4, 96), np.array([[0, 1, 70_000, 1_000_000]])
    out = rope.rotate(x, positions, freqs=rope.frequencies(64, **V4))
    np.testing.assert_allclose(np.linalg.norm(out[..., 32:], axis=-1), np.linalg.norm(x[..., 32:], axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_angles_are_exact_to_fp32_at_a_million_tokens(dtype):
    """Rounding frequency and angle may each cost half a unit in the last place: 2^-23 of the angle. A bf16 position is off by thousands."""
    positions = np.array([[1_048_575, 1_000_001, 777_777, 65_537, 4_097]], np.int32)
    pair = np.arange(32)
    exact = 160_000.0 ** (-pair / 32) * (1 - np.clip((pair - 15) / 10, 0, 1) * 15 / 16)
    ones = np.tile(np.array([1.0, 0.0]), (1, 5, 32))
    out = np.asarray(rope.rotate(jnp.asarray(ones, dtype), positions, freqs=rope.frequencies(64, **V4)), np.float64)
    angles = positions[..., None] * exact
    error = np.abs((out[..., ::2] + 1j * out[..., 1::2]) - np.exp(1j * angles))
    assert (error <= angles * 2.0**-23 + (2.0**-8 if dtype == "bfloat16" else 1e-6)).all()


def test_the_result_has_the_input_dtype():
    assert rope.rotate(jnp.ones((1, 2, 8), jnp.bfloat16), np.zeros((1, 2), int), freqs=FREQS).dtype == jnp.bfloat16
