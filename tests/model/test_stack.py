"""Factoring layers into runs, and that neither scanning nor recomputing them changes anything."""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import block, stack

WINDOW, CSA, HCA = (block.LayerSpec(kind, hashed=False) for kind in ("window", "csa", "hca"))


def hashed(spec: block.LayerSpec) -> block.LayerSpec:
    return spec._replace(hashed=True)


def layers_of(runs) -> list[block.LayerSpec]:
    return [spec for run in runs for _ in range(run.repeat) for spec in run.pattern]


def bodies(runs) -> int:
    return sum(len(run.pattern) for run in runs)


def fewest_bodies(specs: tuple) -> int:
    """By trying every way to cut the layers into runs of patterns of at most 4, the plain way."""

    @functools.cache
    def best(rest: tuple) -> int:
        if not rest:
            return 0
        found = []
        for size, repeat in itertools.product(range(1, 5), range(1, len(rest) + 1)):
            if rest[: size * repeat] == rest[:size] * repeat and size * repeat <= len(rest):
                found.append(size + best(rest[size * repeat :]))
        return min(found)

    return best(specs)


def test_the_released_layouts():
    flash = (hashed(WINDOW),) * 2 + (hashed(CSA),) + (HCA, CSA) * 20
    runs = stack.factor(flash)
    assert [(run.pattern, run.repeat) for run in runs] == [((hashed(WINDOW),), 2), ((hashed(CSA),), 1), ((HCA, CSA), 20)]
    pro = (hashed(HCA), hashed(HCA), hashed(CSA), *(HCA, CSA) * 29)
    assert [(run.pattern, run.repeat) for run in stack.factor(pro)] == [((hashed(HCA),), 2), ((hashed(CSA),), 1), ((HCA, CSA), 29)]


def test_the_released_layouts_from_their_configs():
    flash = small.config(
        layers=[{"pattern": ["window"], "repeat": 2}, {"pattern": ["csa", "hca"], "repeat": 20}, {"pattern": ["csa"]}],
        moe={"hash_layers": 3},
    )
    assert flash.compress_ratios == (0, 0, *(4, 8) * 20, 4, 0), "one for each layer, and a 0 for the MTP block"
    specs = stack.layer_specs(flash)
    assert [spec.hashed for spec in specs] == [True] * 3 + [False] * 40
    assert bodies(stack.factor(specs)) == 4


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts_come_back_in_order_with_the_fewest_bodies(seed):
    rng = np.random.default_rng(seed)
    specs: list[block.LayerSpec] = []
    while len(specs) < rng.integers(1, 14):
        pattern = [[WINDOW, CSA, HCA, hashed(WINDOW)][i] for i in rng.integers(0, 4, rng.integers(1, 5))]
        specs += pattern * int(rng.integers(1, 4))
    specs = specs[:14]
    runs = stack.factor(specs)
    assert layers_of(runs) == specs
    assert bodies(runs) == fewest_bodies(tuple(specs))


def test_statistics_come_in_the_order_of_the_layers():
    runs = {
        "run_0": {"layer_0": np.asarray([[0], [1]])},
        "run_1": {"layer_0": np.asarray([[2], [4], [6]]), "layer_1": np.asarray([[3], [5], [7]])},
    }
    np.testing.assert_array_equal(stack.in_layer_order(runs), np.arange(8)[:, None])


# One stack: window hca window hca, scanned as [window hca] x 2; and one CSA layer for what recomputing does. All are hash-routed, so
# that the token ids have to come through the scan and the recomputation.


def text_config(*layers: str, **changes):
    return small.config(*layers, moe={"hash_layers": len(layers)}, image=None, audio=None, mtp=None, **changes)


def scanned_config(**changes):
    return text_config("window", "hca", "window", "hca", **changes)


@pytest.fixture(scope="module")
def rows():
    return small.batch([[(13, 0, "t"), (11, 5, "t")]], length=24)


def value_and_gradients(config, params, rows):
    run = small.jit(jax.value_and_grad(small.mean_loss(config), has_aux=True, allow_int=True))
    (value, sums), gradients = run(params, rows)
    return (
        float(value),
        sums,
        jax.tree.map(lambda g, x: np.zeros(x.shape) if g.dtype == jax.dtypes.float0 else np.asarray(g), gradients, params),
    )


@pytest.fixture(scope="module")
def scanned(rows):
    config = scanned_config()
    params = small.parameters(config)
    return params, value_and_gradients(config, params, rows)


def one_run_per_layer(params: dict) -> dict:
    """Parameters ``run_0/layer_j [2, ...]`` of a scanned stack as ``run_i/layer_0 [1, ...]`` of an unrolled one."""
    run = params["stack"]["run_0"]
    layers = [jax.tree.map(lambda x, i=i: x[i : i + 1], run[f"layer_{j}"]) for i in range(2) for j in range(2)]
    return params | {"stack": {f"run_{i}": {"layer_0": layer} for i, layer in enumerate(layers)}}


def test_scanned_layers_equal_unrolled_ones(monkeypatch, scanned, rows):
    params, (value, sums, gradients) = scanned
    assert set(params["stack"]) == {"run_0"}
    monkeypatch.setattr(stack, "factor", lambda specs: tuple(stack.Run((spec,), 1) for spec in specs))
    config = scanned_config(norm_eps=1.0000001e-6)  # another config, so that nothing cached is found again
    unrolled = value_and_gradients(config, one_run_per_layer(params), rows)
    assert value == pytest.approx(unrolled[0], rel=1e-6)
    np.testing.assert_array_equal(stack.in_layer_order(sums.loads["stack"]), stack.in_layer_order(unrolled[1].loads["stack"]))
    assert float(sums.text[0]) == pytest.approx(float(unrolled[1].text[0]), rel=1e-6)
    loads = stack.in_layer_order(sums.loads["stack"])
    for layer in range(4):
        table = np.asarray(params["stack"]["run_0"][f"layer_{layer % 2}"]["moe"]["router"]["table"])[layer // 2]
        np.testing.assert_array_equal(loads[layer, 0], np.bincount(table[rows.tokens].ravel(), minlength=8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), one_run_per_layer(gradients), unrolled[2])


@pytest.fixture(scope="module")
def remembered(rows):
    """Loss and gradients of a CSA layer that keeps everything for its backward pass."""
    config = text_config("csa")
    params = small.parameters(config)
    return params, value_and_gradients(config, params, rows)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_recomputing_changes_neither_loss_nor_gradients(remembered, rows, policy):
    params, (value, sums, gradients) = remembered
    assert "table" in params["stack"]["run_0"]["layer_0"]["moe"]["router"]
    again = value_and_gradients(text_config("csa", remat=policy), params, rows)
    assert value == pytest.approx(again[0], rel=1e-6)
    assert float(sums.indexer) == pytest.approx(float(again[1].indexer), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradients, again[2])
    assert any(np.asarray(x).any() for x in jax.tree.leaves(gradients["stack"]))


def test_the_policies_keep_different_things(rows):
    """What a backward pass needs from the forward pass: all, the results of matrix products, or the input alone."""

    def kept(policy: str) -> int:
        config = text_config("csa", remat=policy)
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: small.mean_loss(config)(p, rows)[0], p), small.parameters(config))
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept("none") > kept("dots") > kept("full")


def test_stacked_parameters_name_their_axis():
    declared = param.flatten(small.declarations(scanned_config()))
    for path, d in declared.items():
        assert (d.axes[0] == "layers") == path.startswith("stack/"), path
        assert d.shape[0] == 2 or d.axes[0] != "layers", path
