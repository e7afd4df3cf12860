"""Sinkhorn against the steps written out in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import jaxprs
from v4train.ops import sinkhorn

EPS = 1e-6


def _normalised(logits, *, iterations, eps):
    """The op, with rows and columns as the last two axes."""
    out = sinkhorn.doubly_stochastic(jnp.moveaxis(logits, (-2, -1), (0, 1)), iterations=iterations, eps=eps)
    return jnp.moveaxis(out, (0, 1), (-2, -1))


def _logits(*shape, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _steps(logits, iterations, eps=EPS):
    x = np.asarray(logits, np.float64)
    x = np.exp(x - x.max(-1, keepdims=True))
    x = x / x.sum(-1, keepdims=True) + eps
    x = x / (x.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        x = x / (x.sum(-1, keepdims=True) + eps)
        x = x / (x.sum(-2, keepdims=True) + eps)
    return x


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [EPS, 1e-2], ids=["eps of V4", "large eps"])
def test_agrees_with_the_steps_written_out(iterations, eps):
    """The large eps shows where it is added."""
    logits = _logits(2, 3, 4, 4)
    out = _normalised(logits, iterations=iterations, eps=eps)
    np.testing.assert_allclose(out, _steps(logits, iterations, eps), rtol=1e-5, atol=1e-7)


def test_ends_on_columns_and_is_not_symmetric():
    out = np.asarray(_normalised(_logits(64, 4, 4), iterations=20, eps=EPS))
    np.testing.assert_allclose(out.sum(-2), 1, atol=5e-6)
    rows = np.abs(out.sum(-1) - 1)
    assert 1e-5 < rows.max() < 0.1
    assert np.abs(out - out.swapaxes(-1, -2)).max() > 0.1


def test_is_fp32_whatever_comes_in():
    logits = jnp.asarray(_logits(5, 4, 4), jnp.bfloat16)
    out = _normalised(logits, iterations=20, eps=EPS)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, _steps(np.asarray(logits, np.float64), 20), rtol=1e-5, atol=1e-7)


def test_gradient_agrees_with_finite_differences():
    logits, ct = _logits(4, 4), _logits(4, 4, seed=1)
    gradient = jax.grad(lambda x: (_normalised(x, iterations=20, eps=EPS) * ct).sum())(logits)
    for seed in range(3):
        direction = np.random.default_rng(seed + 5).normal(size=(4, 4))
        slope = ((_steps(logits + 1e-5 * direction, 20) - _steps(logits - 1e-5 * direction, 20)) * ct).sum() / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-5)


def test_extreme_logits_stay_finite():
    logits = np.array([[80.0, -80.0], [-80.0, 80.0]], np.float32)
    out, pull = jax.vjp(lambda x: _normalised(x, iterations=20, eps=EPS), logits)
    assert np.isfinite(out).all()
    assert np.isfinite(pull(np.ones_like(out))[0]).all()


def test_the_program_does_not_grow_with_the_iterations():
    def size(iterations):
        traced = jax.make_jaxpr(jax.grad(lambda x: _normalised(x, iterations=iterations, eps=EPS)[0, 0]))
        return len(list(jaxprs.equations(traced(_logits(4, 4)))))

    assert size(2) == size(20)
