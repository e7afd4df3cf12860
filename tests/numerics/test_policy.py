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


LINEAR = {"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3"}


@pytest.mark.parametrize("experts", ["compute", "fp8", "mxfp4"])
@pytest.mark.parametrize("linear", ["compute", "fp8"])
def test_few_bits_are_for_projections_and_experts_alone(linear, experts):
    """Indexer, compressors, router, hyper-connections, embedding, head and the joints of MTP keep theirs, by what the model declares."""
    params, declared = small.parameters(CONFIG), small.declarations(CONFIG)
    numerics = config_lib.NumericsConfig(compute="float32", linear=linear, experts=experts)
    cast = policy.cast_for_compute(params, declarations=declared, config=numerics)
    for (path, d), before, after in zip(param.flatten(declared).items(), jax.tree.leaves(params), jax.tree.leaves(cast), strict=True):
        parent, name = ("", *path.split("/"))[-2:]
        form = "compute"
        if parent in ("projections", "shared") and name in LINEAR:
            form = linear
        if parent == "experts":
            form = experts
        assert policy.format_of(d, config=numerics) == form, path
        wanted = before if form == "compute" else policy.straight_through(before, form)
        np.testing.assert_array_equal(after, wanted, err_msg=path)
        assert form == "compute" or (np.asarray(after) != before).any(), path


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_gradients_go_straight_through_to_the_master(form):
    weight, seen = jnp.linspace(-3, 5, 64 * 32).reshape(64, 32), jnp.sin(jnp.arange(64 * 32.0)).reshape(64, 32)
    got = jax.grad(lambda w: jnp.sum(policy.straight_through(w, form) * seen))(weight)
    np.testing.assert_array_equal(got, seen)


def test_fp4_expands_to_fp8_without_loss_while_scales_are_near():
    """Groups of 32 whose scales lie a factor of 2^14 apart in one block of 128 x 128: all codes of E2M1 survive. At 2^15 some do not."""
    codes = np.resize([0.5, 1, 1.5, 2, 3, 4, 6, -6], (32, 128)).astype(np.float32)
    for octaves, lossless in ((14, True), (15, False)):
        weight = np.concatenate([codes, codes * 2.0**-octaves, codes * 2.0**-3, codes * 2.0**-octaves])
        assert bool((np.asarray(policy.straight_through(jnp.asarray(weight), "mxfp4")) == weight).all()) == lossless


def test_mxfp4_groups_lie_along_the_input():
    weight = np.ones((64, 4), np.float32)
    weight[:32] *= 2.0**-20
    weight[5, 0] = 0.3 * 2.0**-20
    got = np.asarray(policy.straight_through(jnp.asarray(weight[:32]), "mxfp4"))
    assert got[5, 0] == 0.25 * 2.0**-20
    assert got[5, 1] == 2.0**-20


def test_counts_of_weights_are_those_of_their_own_format():
    params, declared = small.parameters(CONFIG), small.declarations(CONFIG)
    numerics = config_lib.NumericsConfig(linear="fp8", experts="mxfp4")
    counts = policy.count_weights(params, declarations=declared, config=numerics)
    sizes = {"linear": 0, "experts": 0}
    for d in jax.tree.leaves(declared, is_leaf=param.is_declaration):
        if d.product != "high":
            sizes[d.product] += d.size
    assert {role: int(count[0]) for role, count in counts.items()} == sizes
    assert counts["experts"][2] / counts["experts"][0] > 0.02, "E2M1 has zero for what is below a quarter of its scale"
    assert counts["linear"][2] / counts["linear"][0] < 0.01
    assert policy.count_weights(params, declarations=declared, config=config_lib.NumericsConfig()) == {}


def test_an_unknown_format_is_refused():
    with pytest.raises(pydantic.ValidationError, match="compute"):
        config_lib.NumericsConfig(compute="float16")
