"""Plain residuals and sigmoid routing: the parts of the classic mixture-of-experts transformer that V4 replaced, written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import block as block_lib
from v4train.model import config as config_lib
from v4train.model import context, count, flops, transformer
from v4train.train import loss

RESIDUAL = {"kind": "residual"}
MODEL = small.config("window", "window", hyper=RESIDUAL, attention={"window": 24}, moe={"hash_layers": 0, "affinity": "sigmoid"})


@pytest.fixture(scope="module")
def rows():
    return small.batch([[(9, 0, "ttiia"), (11, 3, "t")], [(17, 0, "ita")]], length=24)


def normed(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def test_a_layer_adds_each_sublayer_to_its_input(rows):
    layer = block_lib.Block(MODEL, block_lib.LayerSpec("window", hashed=False))
    params = small.draw(param.declarations(layer))
    bound, inputs = param.bind(layer, params), loss.model_inputs(rows, config=MODEL)
    seen = context.make(inputs, config=MODEL)
    x = np.random.default_rng(0).standard_normal((2, 24, 32)).astype(np.float32)
    out, _ = bound(jnp.asarray(x)[:, :, None], seen)
    attended = bound.attention(jnp.asarray(normed(x, params["attention_norm"], MODEL.norm_eps), jnp.float32), seen).out
    middle = x + np.asarray(attended)
    mixed = bound.moe(jnp.asarray(normed(middle, params["moe_norm"], MODEL.norm_eps), jnp.float32), inputs).out
    assert out.shape == (2, 24, 1, 32)
    assert np.abs(attended).max() > 0.1
    assert np.abs(mixed).max() > 0.1
    np.testing.assert_allclose(out[:, :, 0], middle + np.asarray(mixed), rtol=1e-4, atol=1e-4)


def test_the_head_and_mtp_read_the_only_stream():
    abstract = transformer.Transformer(MODEL)
    params = small.parameters(MODEL)
    bound = param.bind(abstract, params)
    x = np.random.default_rng(1).standard_normal((2, 5, 1, 32)).astype(np.float32)
    np.testing.assert_allclose(bound.hidden(jnp.asarray(x)), normed(x[:, :, 0], params["norm"], MODEL.norm_eps), rtol=1e-4, atol=1e-5)
    assert bound.mtp is not None
    expected = normed(x[:, :, 0], params["mtp"]["norm"], MODEL.norm_eps)
    np.testing.assert_allclose(bound.mtp.hidden(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    assert bound.spread(jnp.zeros((2, 5, 32))).shape == (2, 5, 1, 32)


def test_no_parameter_and_no_flop_of_hyper_connections_is_left():
    declared = param.declarations(transformer.Transformer(MODEL))
    assert not [path for path in param.flatten(declared) if "mix" in path or "collapse" in path]
    mixed = MODEL.model_copy(update={"hyper": config_lib.HyperConnectionConfig(streams=4)})
    whole = count.parameters(param.declarations(transformer.Transformer(mixed)), top_k=2)
    plain = count.parameters(declared, top_k=2)
    sites = 2 * MODEL.depth
    assert whole.total - plain.total == sites * (4 * 32 * 24 + 24 + 3) + 4 * 32 * 4 + 4 + 1
    more = flops.forward(mixed, length=24).linear - flops.forward(MODEL, length=24).linear
    assert more == 2 * (sites * 4 * 32 * 24 + 4 * 32 * 4)


def test_a_window_as_long_as_the_row_is_full_causal_attention():
    assert flops.forward(MODEL, length=24).window == pytest.approx(flops.dense_attention(MODEL, length=24), rel=1e-12)
    assert flops.forward(MODEL, length=25).window < flops.dense_attention(MODEL, length=25)


def test_hyper_without_a_kind_is_what_it_always_was():
    values = MODEL.model_dump(mode="json")
    old = config_lib.ModelConfig.model_validate(values | {"hyper": {"streams": 2, "iterations": 3}})
    assert old.hyper == config_lib.HyperConnectionConfig(streams=2, iterations=3)
    del values["hyper"]
    assert config_lib.ModelConfig.model_validate(values).hyper == config_lib.HyperConnectionConfig()
    with pytest.raises(pydantic.ValidationError, match="streams"):
        config_lib.ModelConfig.model_validate(values | {"hyper": RESIDUAL | {"streams": 2}})
