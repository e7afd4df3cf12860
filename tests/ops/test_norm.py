"""Norms against their definitions in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.ops import norm


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _rms(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_divides_by_the_root_mean_square(shape, weighted):
    x, scale = 3 * _draw(*shape), _draw(16, seed=1) if weighted else None
    np.testing.assert_allclose(norm.rms_norm(x, scale, eps=1e-6), _rms(x, 1 if scale is None else scale, 1e-6), rtol=1e-5, atol=1e-6)


def test_eps_is_added_to_the_mean_square():
    x = np.array([[1e-3, -1e-3]], np.float32)
    np.testing.assert_allclose(norm.rms_norm(x, eps=1e-6), x / np.sqrt(2e-6), rtol=1e-5)
    gradient = jax.grad(lambda x: norm.rms_norm(x, eps=1e-6)[0])(jnp.zeros(4))
    np.testing.assert_allclose(gradient, [1e3, 0, 0, 0], rtol=1e-5)


def test_gradients_agree_with_finite_differences():
    x, scale, ct = _draw(3, 8), _draw(8, seed=1), _draw(3, 8, seed=2)
    for place, (inputs, direction) in enumerate([((x, scale), _draw(3, 8, seed=3)), ((x, scale), _draw(8, seed=4))]):
        gradient = jax.grad(lambda x, s: (norm.rms_norm(x, s, eps=1e-6) * ct).sum(), argnums=place)(*inputs)
        high, low = ([np.float64(a) + (h * direction if i == place else 0) for i, a in enumerate(inputs)] for h in (1e-5, -1e-5))
        slope = ((_rms(*high, 1e-6) - _rms(*low, 1e-6)) * ct).sum() / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4)


@pytest.mark.parametrize("function", [norm.rms_norm, norm.layer_norm])
def test_statistics_of_bf16_are_fp32(function):
    """A bf16 sum of 4,096 terms stops growing at 256; here only the result is rounded, once."""
    x = jnp.asarray(1 + _draw(2, 4096), jnp.bfloat16)
    out = function(x, eps=1e-6)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = _rms(exact - (exact.mean(-1, keepdims=True) if function is norm.layer_norm else 0), 1, 1e-6)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2.0**-8, atol=1e-6)


def test_an_fp32_weight_does_not_raise_the_dtype():
    assert norm.rms_norm(jnp.ones((2, 4), jnp.bfloat16), jnp.ones(4), eps=1e-6).dtype == jnp.bfloat16


def test_layer_norm_has_zero_mean_and_unit_variance():
    x = 5 + 3 * _draw(3, 64)
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    np.testing.assert_allclose(norm.layer_norm(x, eps=1e-6), exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6), atol=1e-5)
    np.testing.assert_array_equal(norm.layer_norm(jnp.full((2, 8), 0.25), eps=1e-6), np.zeros((2, 8)))
