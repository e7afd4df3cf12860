"""Clipping by the global norm, against numpy in fp64."""

import jax.numpy as jnp
import numpy as np
import pytest

from v4train.optim import clip

rng = np.random.default_rng(0)
GRADIENTS = {"a": {"w": rng.normal(size=(4, 3)).astype(np.float32)}, "b": rng.normal(size=5).astype(np.float32)}
NORM = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in (GRADIENTS["a"]["w"], GRADIENTS["b"])))


def test_scales_all_leaves_by_one_factor():
    clipped, norm = clip.clip_by_global_norm(GRADIENTS, 0.5)
    np.testing.assert_allclose(norm, NORM, rtol=1e-6)
    np.testing.assert_allclose(clipped["a"]["w"], GRADIENTS["a"]["w"] * (0.5 / NORM), rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], GRADIENTS["b"] * (0.5 / NORM), rtol=1e-6)
    np.testing.assert_allclose(clip.global_norm(clipped), 0.5, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [None, NORM * 1.01])
def test_gradients_within_the_norm_are_untouched(max_norm):
    clipped, norm = clip.clip_by_global_norm(GRADIENTS, max_norm)
    np.testing.assert_array_equal(clipped["a"]["w"], GRADIENTS["a"]["w"])
    np.testing.assert_array_equal(clipped["b"], GRADIENTS["b"])
    np.testing.assert_allclose(norm, NORM, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_shows_in_the_norm(bad):
    assert not np.isfinite(clip.clip_by_global_norm({"a": jnp.array([1.0, bad])}, 1.0).norm)


def test_bfloat16_gradients_keep_their_dtype_and_are_summed_in_fp32():
    clipped, norm = clip.clip_by_global_norm({"a": jnp.ones(4097, jnp.bfloat16)}, 1.0)
    np.testing.assert_allclose(norm, np.sqrt(4097), rtol=1e-6)
    assert clipped["a"].dtype == jnp.bfloat16


def test_zero_gradients_stay_zero():
    clipped, norm = clip.clip_by_global_norm({"a": jnp.zeros(3)}, 1.0)
    assert norm == 0
    np.testing.assert_array_equal(clipped["a"], np.zeros(3))
