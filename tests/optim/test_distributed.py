"""The whole update of a model's parameters on 8 devices, in bf16: one device's results, its arithmetic divided, no expert gathered.

What is counted is read from the program that XLA compiled for one device of eight.
"""

import functools

import jax
import numpy as np
import pytest

from tests.optim.test_stacking import flops as flops_of_program
from tests.plan import small
from v4train.core import param, tree
from v4train.model import transformer
from v4train.optim import config as config_lib
from v4train.optim import flops, groups, optimizer
from v4train.plan import collectives, weights
from v4train.sharding import config as mesh_config
from v4train.sharding import mesh as mesh_lib
from v4train.sharding import rules
from v4train.train import state as state_lib

MESHES = [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "expert": 4}, {"replica": 2, "fsdp": 4}]
CONFIG = config_lib.OptimizerConfig(
    schedule={"peak_lr": 1e-2, "final_lr": 1e-2, "warmup_steps": 0, "decay_steps": 0}, weight_decay=0.0, muon={"ns_dtype": "bfloat16"}
)
LAYERS = 16
"""Of each matrix shape there are at least as many as devices: what padding costs otherwise is `plan`'s to say."""


@pytest.fixture(scope="module", autouse=True)
def _small_parameters_are_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST_SPLIT", 512)
        yield


@functools.cache
def declarations() -> dict:
    model = small.recipe().model
    model = model.model_copy(update={"layers": (model.layers[0].model_copy(update={"repeat": LAYERS // 2}),)})
    declared = param.declarations(transformer.Transformer(model))
    return tree.select(declared, declarations=declared, keep=lambda d: d.trained)


@functools.cache
def alone() -> dict:
    params, gradients = (param.initialise(declarations(), seed) for seed in (0, 1))
    one = optimizer.make(CONFIG, declarations(), total_steps=4)
    return jax.device_get(jax.jit(one.update)(gradients, one.init(params), params)[0])


@pytest.fixture(scope="module", params=MESHES, ids=str)
def compiled(request):
    """The sizes of a mesh, the program on it, and its arguments."""
    sizes = mesh_config.MeshConfig(**request.param).sizes
    mesh = mesh_lib.make(mesh_config.MeshConfig(**request.param))
    one = optimizer.make(CONFIG, declarations(), total_steps=4, mesh=mesh)
    state = state_lib.declared(declarations(), optimizer=one)
    placed = state_lib.shardings(state, declarations=declarations(), mesh=mesh)
    params, gradients = (param.initialise(declarations(), seed, shardings=placed.params) for seed in (0, 1))
    moments = jax.jit(one.init, out_shardings=placed.optimizer)(params)
    run = jax.jit(one.update, out_shardings=(placed.params, placed.optimizer)).lower(gradients, moments, params).compile()
    return sizes, run, (gradients, moments, params)


def test_the_update_is_that_of_one_device(compiled):
    """As near as bf16's 8 bits: sums in another order are rounded otherwise, ten steps long."""
    _, run, arguments = compiled
    for (path, found), expected in zip(jax.tree_util.tree_flatten_with_path(run(*arguments)[0])[0], jax.tree.leaves(alone()), strict=True):
        assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected), param.path_name(path)


def test_the_arithmetic_is_divided(compiled):
    """At most 1.2 times that of computing every matrix once, and as the planner counts it, padding included."""
    sizes, run, _ = compiled
    everywhere = 8 * flops_of_program(run.as_text())
    once = flops.update(CONFIG, declarations()).newton_schulz
    assert once <= everywhere <= 1.2 * once, everywhere / once
    placed = weights.on_mesh(groups.assign(CONFIG, declarations()), mesh=mesh_lib.abstract(mesh_config.MeshConfig(**sizes)))
    stacks = weights.stacks(placed, sizes=sizes)
    assert everywhere == 8 * sum(stack.matrices * flops.newton_schulz(stack.shape, steps=10) for stack in stacks)


def test_nothing_is_gathered_that_is_stored_in_parts(compiled):
    """Parts change places, all to all. What replicas have copies of, each computes a share of, and these come together again."""
    sizes, run, _ = compiled
    found = collectives.read(run.as_text(), mesh=sizes).collectives
    assert found
    assert all((one.kind, one.axes) == ("all-gather", ("replica",)) for one in found if one.kind != "all-to-all")
