"""The mixture of experts against a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import moe
from v4train.train import loss

CONFIG = small.config(moe={"experts": 6, "top_k": 2, "ffn": 16, "shared": 2, "swiglu_limit": 0.7})  # a limit that many activations reach


@pytest.fixture(scope="module")
def case():
    """A mixture, its parameters, input with padding and media, and a direction for gradients."""
    layer = moe.Moe(CONFIG, hashed=False)
    params = small.draw(param.declarations(layer), experts=6)
    bias = params["router"]["bias"] - 100.0 * (jnp.arange(6) == 4)[None]  # nobody chooses expert 4
    params = params | {"router": params["router"] | {"bias": bias}}
    rng = np.random.default_rng(0)
    inputs = loss.model_inputs(small.batch([[(9, 0, "ttia")], [(4, 2, "t"), (7, 0, "t")]], length=12), config=CONFIG)
    x, direction = (jnp.asarray(rng.standard_normal((2, 12, 32)), jnp.float32) for _ in range(2))
    return layer, params, inputs, x, direction


def swiglu(x, w1, w3, w2):
    gate, up = x @ w1, x @ w3
    gate, up = jnp.minimum(gate, 0.7), jnp.maximum(jnp.minimum(up, 0.7), -0.7)
    return (gate * jax.nn.sigmoid(gate) * up) @ w2


def by_loop(params: dict, x, experts: np.ndarray, weights):
    """Every token through each of its experts, one at a time."""
    routed, shared = params["experts"], params["shared"]
    rows = []
    for row, place in np.ndindex(experts.shape[:2]):
        token = x[row, place]
        out = swiglu(token, shared["w1"], shared["w3"], shared["w2"])
        for slot, expert in enumerate(experts[row, place]):
            if expert < 6:
                out = out + weights[row, place, slot] * swiglu(token, routed["w1"][expert], routed["w3"][expert], routed["w2"][expert])
        rows.append(out)
    return jnp.stack(rows).reshape(x.shape)


def test_output_and_every_gradient_equal_the_loop(case):
    layer, params, inputs, x, direction = case
    routing = param.bind(layer, params)(x, inputs).routing
    experts = np.asarray(routing.experts)
    assert not (experts == 4).any()
    assert (experts == 6).sum() == 2 * (24 - 20), "padding goes nowhere"

    def ours(params, x):
        return jnp.sum(param.bind(layer, params)(x, inputs).out * direction)

    def oracle(params, x):
        affinity = jnp.sqrt(jax.nn.softplus(x @ params["router"]["gate"]))
        chosen = jnp.take_along_axis(affinity, np.minimum(experts, 5), axis=-1)
        return jnp.sum(by_loop(params, x, experts, chosen / chosen.sum(-1, keepdims=True) * 1.5) * direction)

    value, gradients = small.jit(jax.value_and_grad(ours, argnums=(0, 1)))(params, x)
    expected, expected_gradients = small.jit(jax.value_and_grad(oracle, argnums=(0, 1)))(params, x)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        other = expected_gradients
        for key in path:
            other = other[getattr(key, "key", getattr(key, "idx", None))]
        np.testing.assert_allclose(gradient, other, atol=2e-5, rtol=1e-4, err_msg=param.path_name(path))
    routed = np.asarray(gradients[0]["experts"]["w1"])
    assert not routed[4].any(), "an expert without tokens has a gradient of zeros"
    assert all(routed[e].any() for e in (0, 1, 2, 3, 5))
    assert not np.asarray(gradients[0]["router"]["bias"]).any()


def test_the_clamp_is_on_the_shared_path_and_on_the_routed_one(case):
    """Far beyond the limit the output no longer grows with the input projections, on either path."""
    layer, params, inputs, x, _ = case

    def with_scale(name: str, factor: float):
        part = params[name] | {"w1": params[name]["w1"] * factor, "w3": params[name]["w3"] * factor}
        return np.asarray(param.bind(layer, params | {name: part})(x, inputs).out)[0, :9]

    for name in ("experts", "shared"):
        assert np.abs(with_scale(name, 1e8) - with_scale(name, 1e7)).max() < 1e-5
        assert np.abs(with_scale(name, 1e7) - with_scale(name, 1.0)).max() > 0.1


def test_the_shared_expert_may_be_left_uncut():
    config = small.config(moe={"experts": 6, "top_k": 2, "ffn": 16, "swiglu_limit": 0.7, "clamp_shared": False})
    layer = moe.SharedExpert(config)
    params = small.draw(param.declarations(layer), experts=6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)) * 10, jnp.float32)
    gate, up = x @ params["w1"], x @ params["w3"]
    assert (gate > 0.7).any()
    np.testing.assert_allclose(param.bind(layer, params)(x), (gate * jax.nn.sigmoid(gate) * up) @ params["w2"], rtol=1e-5, atol=1e-5)


def test_the_gradient_at_the_clamp():
    """The gate passes gradient below its limit only, the up-projection inside its limits only; beyond them exactly none."""
    gate = jnp.asarray([-50.0, -1.0, 9.99, 10.01, 50.0])
    up = jnp.asarray([0.5, -9.9, 3.0, 3.0, 3.0])
    by_gate, by_up = jax.grad(lambda g, u: jnp.sum(moe.swiglu(g, u, limit=10.0)), argnums=(0, 1))(gate, up)
    sigmoid = 1 / (1 + np.exp(-np.asarray(gate, np.float64)))
    expected = np.where(gate < 10, (sigmoid + np.asarray(gate) * sigmoid * (1 - sigmoid)) * np.asarray(up), 0)
    np.testing.assert_allclose(by_gate, expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(by_up, np.minimum(gate, 10) / (1 + np.exp(-np.minimum(gate, 10))), rtol=1e-5, atol=1e-12)
    outside = jax.grad(lambda u: jnp.sum(moe.swiglu(jnp.ones(4), u, limit=10.0)))(jnp.asarray([-10.01, 10.01, -100.0, 100.0]))
    assert not np.asarray(outside).any()


def test_values_at_the_clamp():
    """``silu(min(gate, 10)) clip(up, -10, 10)``: a very negative gate is not clamped."""
    gate, up = np.asarray([20.0, 10.0, -20.0, 1.0, 1.0]), np.asarray([1.0, 1.0, 1.0, 30.0, -30.0])
    silu = {g: g / (1 + np.exp(-g)) for g in (10.0, -20.0, 1.0)}
    expected = [silu[10.0], silu[10.0], silu[-20.0], 10 * silu[1.0], -10 * silu[1.0]]
    np.testing.assert_allclose(moe.swiglu(jnp.asarray(gate), jnp.asarray(up), limit=10.0), expected, rtol=1e-5)


def test_all_tokens_on_one_set_of_experts_are_not_dropped(case):
    """Skew: every token chooses experts 0 and 5."""
    layer, params, inputs, x, _ = case
    skewed = params | {
        "router": params["router"] | {"bias": params["router"]["bias"] * 0 + 100.0 * jnp.isin(jnp.arange(6), jnp.asarray([0, 5]))[None]}
    }
    mixed = param.bind(layer, skewed)(x, inputs)
    np.testing.assert_array_equal(mixed.routing.load.sum(0), [20, 0, 0, 0, 0, 20])
    np.testing.assert_allclose(mixed.out, by_loop(params, x, np.asarray(mixed.routing.experts), mixed.routing.weights), atol=2e-5)
