"""Head-wise Muon: each head's own orthogonal factor, on one device and on meshes that split heads, rows, or parts of a head."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4train.core import param
from v4train.optim import config as config_lib
from v4train.optim import flops, heads, hybrid, schedule
from v4train.sharding import config as mesh_config
from v4train.sharding import mesh as mesh_lib
from v4train.sharding import rules

CONFIG = config_lib.OptimizerConfig(
    schedule={"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay_steps": 3}, weight_decay=0.0, muon={"head_wise": True}
)
WHOLE = CONFIG.model_copy(update={"muon": config_lib.MuonConfig()})
TOTAL = 8


def declare(shape, axes, heads):
    return param.Declaration(shape, axes, param.Normal(0.5), heads=heads)


DECLARATIONS = {
    "eight": declare((2, 16, 8 * 6), ("layers", "rank", "heads"), 8),
    "six": declare((10, 6 * 4), (None, "heads"), 6),
    "one": declare((16, 24), ("rank", "heads"), 1),
}
MESHES = [{"tensor": 8}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"replica": 2, "tensor": 2, "context": 2}]


@pytest.fixture(autouse=True)
def _small_parameters_are_split(monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SPLIT", 8)


def first_update(config, **options):
    optimizer = hybrid.hybrid(config, DECLARATIONS, total_steps=TOTAL, **options)
    params = param.initialise(DECLARATIONS, 0)
    return optimizer.update(param.initialise(DECLARATIONS, 1), optimizer.init(params), params)[0]


def test_each_head_takes_its_own_orthogonal_factor():
    """Against the singular value decomposition of each head, in fp64."""
    rate = float(schedule.learning_rate(CONFIG.schedule, step=0, total_steps=TOTAL))
    gradients, found = param.initialise(DECLARATIONS, 1), first_update(CONFIG)
    for name, d in DECLARATIONS.items():
        for gradient, update in zip(*(np.asarray(x[name], np.float64).reshape(-1, *d.shape[-2:]) for x in (gradients, found)), strict=True):
            for part, step in zip(*(np.split(x, d.heads, axis=1) for x in (gradient, update)), strict=True):
                u, _, v = np.linalg.svd(part, full_matrices=False)
                np.testing.assert_allclose(step, -rate * 0.18 * max(part.shape) ** 0.5 * u @ v, atol=rate * 0.02)


def test_heads_are_one_matrix_unless_the_recipe_says_so():
    split, whole = first_update(CONFIG), first_update(WHOLE)
    np.testing.assert_array_equal(split["one"], whole["one"])
    assert np.abs(split["eight"] - whole["eight"]).max() > 1e-4
    once = flops.update(WHOLE, DECLARATIONS).newton_schulz
    by_hand = 10 * (2 * (4 * 16**2 * 48 + 2 * 16**3) + (4 * 10**2 * 24 + 2 * 10**3) + (4 * 16**2 * 24 + 2 * 16**3))
    assert once == by_hand
    assert flops.update(CONFIG, DECLARATIONS).newton_schulz < once


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_result_does_not_depend_on_the_mesh(sizes):
    mesh = mesh_lib.make(mesh_config.MeshConfig(**sizes))
    found = first_update(CONFIG, mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, first_update(CONFIG))


@pytest.mark.parametrize(
    "stored, count, sizes, expected",
    [
        (P(None, "fsdp", "tensor"), 8, {"fsdp": 4, "tensor": 2}, P(None, ("tensor",), "fsdp", None)),
        (P(None, None, ("tensor", "fsdp")), 8, {"fsdp": 4, "tensor": 2}, P(None, ("tensor", "fsdp"), None, None)),
        (P(None, None, ("tensor", "fsdp")), 2, {"fsdp": 4, "tensor": 2}, P(None, ("tensor",), None, ("fsdp",))),
        (P(None, None, ("tensor", "fsdp")), 4, {"fsdp": 4, "tensor": 2}, P(None, ("tensor",), None, None)),
        (P(None, None, "tensor"), 6, {"fsdp": 1, "tensor": 4}, P(None, None, None, None)),
        (P(), 8, {"fsdp": 4, "tensor": 2}, P(None, None, None, None)),
    ],
    ids=["whole heads", "two axes of heads", "parts of a head", "a part and a whole", "no match", "copies"],
)
def test_heads_are_split_where_devices_hold_whole_ones_or_parts_of_one(stored, count, sizes, expected):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    assert heads.spec(stored, dimensions=3, heads=count, mesh=mesh) == expected
    assert heads.spec(stored, dimensions=3, heads=1, mesh=mesh) == stored


def test_devices_that_hold_whole_heads_exchange_nothing():
    declarations = {"eight": DECLARATIONS["eight"]}
    mesh = mesh_lib.make(mesh_config.MeshConfig(tensor=8))
    optimizer = hybrid.hybrid(CONFIG, declarations, total_steps=TOTAL, mesh=mesh)
    d = declarations["eight"]
    given = {"eight": jax.ShapeDtypeStruct(d.shape, d.dtype, sharding=rules.parameter_sharding(d.axes, shape=d.shape, mesh=mesh))}
    state = jax.eval_shape(optimizer.init, given)
    placed = {"eight": NamedSharding(mesh, given["eight"].sharding.spec)}
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        hybrid.state_like(placed, declarations=declarations, count=NamedSharding(mesh, P())),
    )
    text = jax.jit(optimizer.update).lower(given, state, given).compile().as_text()
    assert " dot(" in text
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)
