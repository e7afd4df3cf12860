"""The mHC sites against a plain fp64 computation, with coefficients that are not symmetric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import hyper_connections

CONFIG = small.config(norm_eps=1e-3, hyper={"streams": 4, "iterations": 3, "eps": 1e-2})  # eps large enough to be seen, few iterations


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(params: dict, streams: np.ndarray, *, iterations: int, eps: float, norm_eps: float):
    """pre, post and comb of every token, fp64, written with loops as the report has them."""
    fn, scale, base = (np.asarray(params[name], np.float64) for name in ("fn", "scale", "base"))
    n = streams.shape[2]
    flat = streams.reshape(*streams.shape[:2], -1).astype(np.float64)
    flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + norm_eps)
    raw = flat @ fn
    pre = sigmoid(raw[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(raw[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (raw[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*raw.shape[:2], n, n)
    comb = np.exp(comb - comb.max(-1, keepdims=True))
    comb = comb / comb.sum(-1, keepdims=True) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return pre, post, comb


@pytest.fixture(scope="module")
def site():
    """A site, its parameters, streams and a sublayer's output."""
    layer = hyper_connections.HyperConnection(CONFIG)
    params = small.draw(param.declarations(layer))
    rng = np.random.default_rng(0)
    streams = rng.standard_normal((2, 5, 4, 32)).astype(np.float32) * 3
    return layer, params, streams, rng.standard_normal((2, 5, 32)).astype(np.float32)


def test_a_site_is_what_the_report_says(site):
    layer, params, streams, out = site
    x, mixing = param.bind(layer, params)(streams)
    pre, post, comb = oracle(params, streams, iterations=3, eps=1e-2, norm_eps=1e-3)
    assert np.abs(comb - comb.swapaxes(-1, -2)).max() > 0.1, "a symmetric comb would hide its direction"
    np.testing.assert_allclose(mixing.post, post, rtol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(mixing.comb, (0, 1), (-2, -1)), comb, rtol=1e-4)
    np.testing.assert_allclose(x, np.einsum("bsj,bsjd->bsd", pre, streams), rtol=1e-4, atol=1e-5)
    new = hyper_connections.write_back(streams, out, mixing)
    for k in range(4):
        expected = post[..., k, None] * out + sum(comb[..., j, k, None] * streams[:, :, j] for j in range(4))
        np.testing.assert_allclose(new[:, :, k], expected, rtol=1e-4, atol=1e-4)


def test_the_oracle_would_see_the_wrong_direction_and_the_wrong_order(site):
    layer, params, streams, out = site
    _, mixing = param.bind(layer, params)(streams)
    right = hyper_connections.write_back(streams, out, mixing)
    wrong = hyper_connections.write_back(streams, out, mixing._replace(comb=jnp.swapaxes(mixing.comb, 0, 1)))
    assert np.abs(right - wrong).max() > 0.1
    np.testing.assert_allclose(mixing.comb.sum(0), 1, atol=0.02)  # the last step normalises columns: sums are 1 up to eps
    assert np.abs(mixing.comb.sum(1) - 1).max() > 0.02


def test_with_the_released_constants_comb_is_doubly_stochastic(site):
    _, params, streams, _ = site
    layer = hyper_connections.HyperConnection(small.config())
    _, mixing = param.bind(layer, params)(streams)
    np.testing.assert_allclose(mixing.comb.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(mixing.comb.sum(1), 1, atol=1e-3)
    _, _, comb = oracle(params, streams, iterations=20, eps=1e-6, norm_eps=1e-6)
    np.testing.assert_allclose(jnp.moveaxis(mixing.comb, (0, 1), (-2, -1)), comb, rtol=1e-4)


def test_the_head_collapses_with_learned_gates_not_a_mean(site):
    _, _, streams, _ = site
    layer = hyper_connections.HeadCollapse(CONFIG)
    params = small.draw(param.declarations(layer))
    flat = streams.reshape(2, 5, -1).astype(np.float64)
    flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-3)
    gates = sigmoid(flat @ np.asarray(params["fn"], np.float64) * float(params["scale"][0]) + np.asarray(params["base"])) + 1e-2
    expected = np.einsum("bsn,bsnd->bsd", gates, streams)
    np.testing.assert_allclose(param.bind(layer, params)(streams), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - streams.mean(2)).max() > 0.1


def test_coefficients_stay_fp32_when_activations_are_bf16(site):
    """From bf16 streams come the coefficients of the same numbers in fp32; only what leaves the site is bf16."""
    layer, params, streams, out = site
    rounded = jnp.asarray(streams, jnp.bfloat16)
    x, mixing = param.bind(layer, params)(rounded)
    _, exact = param.bind(layer, params)(rounded.astype(jnp.float32))
    assert x.dtype == jnp.bfloat16
    assert mixing.post.dtype == mixing.comb.dtype == jnp.float32
    np.testing.assert_allclose(mixing.comb, exact.comb, rtol=1e-6)
    np.testing.assert_allclose(mixing.post, exact.post, rtol=1e-6)
    new = hyper_connections.write_back(rounded, out.astype(jnp.bfloat16), mixing)
    assert new.dtype == jnp.bfloat16
    exact = hyper_connections.write_back(rounded.astype(jnp.float32), out.astype(jnp.bfloat16).astype(jnp.float32), mixing)
    np.testing.assert_array_equal(new, exact.astype(jnp.bfloat16))  # the sum is rounded once


def test_every_parameter_of_a_site_learns(site):
    layer, params, streams, out = site

    def value(params):
        x, mixing = param.bind(layer, params)(streams)
        return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.sin(hyper_connections.write_back(streams, out, mixing)))

    gradient = jax.grad(value)(params)
    assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(gradient))


def test_the_first_values_are_as_configured():
    layer = hyper_connections.HyperConnection(small.config(hyper={"scale_init": 0.01}))
    drawn = param.initialise(param.declarations(layer), 0)
    np.testing.assert_array_equal(drawn["scale"], np.full(3, np.float32(0.01)))
    np.testing.assert_array_equal(drawn["base"], np.zeros(24))
    assert np.std(drawn["fn"]) == pytest.approx(0.02, rel=0.05)
