"""Casts for the forward pass: everything that is declared so, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from tests.model import small
from v4train.core import param
from v4train.numerics import config as config_lib
from v4train.numerics import policy
from v4train.train import loss

CONFIG = small.config()


def test_bf16_compute_casts_what_is_declared_and_leaves_the_rest():
    params, declared = small.parameters(CONFIG), small.declarations(CONFIG)
    cast = policy.cast_for_compute(params, declarations=declared, config=config_lib.NumericsConfig(compute="bfloat16"))
    flat = dict(zip(param.flatten(declared), zip(jax.tree.leaves(params), jax.tree.leaves(cast), strict=True), strict=True))
    kept = []
    for path, d in param.flatten(declared).items():
        before, after = flat[path]
        if d.precision == "fp32":
            assert after is before, path
            kept.append(path)
        else:
            assert after.dtype == jnp.bfloat16, path
    names = ("ape", "sink", "router/gate", "router/bias", "router/table", "_mix/fn", "_mix/scale", "_mix/base", "q_norm", "moe_norm")
    for name in names:
        assert any(path.endswith(name) for path in kept), name


def test_fp32_compute_changes_nothing():
    params = small.parameters(CONFIG)
    cast = policy.cast_for_compute(params, declarations=small.declarations(CONFIG), config=config_lib.NumericsConfig(compute="float32"))
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(cast), strict=True))


def test_activations_are_bf16_and_losses_fp32():
    """By shapes alone: nothing in the model silently returns to fp32 between layers, nor the loss to bf16."""
    numerics = config_lib.NumericsConfig()
    assert policy.compute_dtype(numerics) == jnp.bfloat16
    rows = small.batch([[(20, 0, "tttia")]], length=24)

    def run(params):
        cast = policy.cast_for_compute(params, declarations=small.declarations(CONFIG), config=numerics)
        total, sums = small.mean_loss(CONFIG)(cast, rows)
        return total, sums, small.forward(CONFIG).__wrapped__(cast, rows)

    total, sums, found = jax.eval_shape(run, small.parameters(CONFIG))
    assert found["hidden"].dtype == found["mtp_hidden"].dtype == jnp.bfloat16
    assert {x.dtype for x in (total, sums.text, sums.mtp, sums.balance, sums.indexer, found["loss"])} == {np.dtype("float32")}
    gradients = jax.eval_shape(jax.grad(lambda p: run(p)[0], allow_int=True), small.parameters(CONFIG))
    declared = param.flatten(small.declarations(CONFIG))
    for path, x in zip(declared, jax.tree.leaves(gradients), strict=True):
        assert not declared[path].trained or x.dtype == jnp.float32, f"{path}: gradients arrive at the fp32 master weights"


def test_the_bf16_model_stays_near_the_fp32_one():
    """With a router whose choices are fixed by its bias, so that rounding flips no expert."""
    config = small.config("window", "hca", image=None, audio=None, mtp=None, moe={"experts": 4, "top_k": 4})
    params, rows = small.parameters(config), small.batch([[(24, 0, "t")]], length=24)
    cast = policy.cast_for_compute(params, declarations=small.declarations(config), config=config_lib.NumericsConfig())
    run = small.forward(config)
    exact, rounded = run(params, rows)["loss"], run(cast, rows)["loss"]
    assert np.abs(exact - rounded).max() < 0.15
    assert abs(float(jnp.mean(exact - rounded))) < 0.03
    assert loss.targets(rows, ahead=1)[1].sum() == 23


def test_an_unknown_format_is_refused():
    with pytest.raises(pydantic.ValidationError, match="compute"):
        config_lib.NumericsConfig(compute="float16")
