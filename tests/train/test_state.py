"""Where the state of any optimizer lies: like the parameters whose paths it carries, however deep optax nests it."""

import jax
import numpy as np
import optax
import pytest

from v4train.checkpoint import arrays
from v4train.core import param
from v4train.optim import config as config_lib
from v4train.optim import optimizer
from v4train.sharding import config as mesh_config
from v4train.sharding import mesh as mesh_lib
from v4train.sharding import rules
from v4train.train import state as state_lib

SCHEDULE = {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay_steps": 3}
DECLARATIONS = {
    "embed": param.Declaration((32, 16), ("vocab", "embed"), param.Normal(0.5), group="adamw"),
    "layers": {"w": param.Declaration((2, 16, 24), ("layers", "embed", None), param.Normal(0.5))},
    "flat": param.Declaration((16, 24), ("embed", None), param.Normal(0.5)),
}
OPTIMIZERS = {
    "hybrid": {"kind": "hybrid"},
    "adamw": {"kind": "optax", "transforms": [{"name": "adamw"}]},
    "nested": {"kind": "optax", "transforms": [{"name": "clip_by_block_rms", "args": {"threshold": 1.0}}, {"name": "muon"}]},
}


def make(values, mesh=None):
    config = config_lib.OptaxConfig if values["kind"] == "optax" else config_lib.OptimizerConfig
    return optimizer.make(config(schedule=SCHEDULE, **values), DECLARATIONS, total_steps=8, mesh=mesh)


def train(transformation, params, state, steps=3):
    update = jax.jit(transformation.update)
    for step in range(steps):
        gradients = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), param.initialise(DECLARATIONS, 100 + step), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_like_their_parameters_and_the_steps_are_those_of_one_device(name, monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SPLIT", 64)
    mesh = mesh_lib.make(mesh_config.MeshConfig(fsdp=4, expert=2))
    transformation = make(OPTIMIZERS[name], mesh)
    state = state_lib.declared(DECLARATIONS, optimizer=transformation)
    placed = state_lib.shardings(state, declarations=DECLARATIONS, mesh=mesh)
    shapes = {d.shape for d in param.flatten(DECLARATIONS).values()}
    moments = [
        (x, s) for x, s in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(placed.optimizer), strict=True) if x.shape in shapes
    ]
    assert len(moments) >= 3
    assert all(s.num_devices == 8 and s.shard_shape(x.shape) != x.shape for x, s in moments)
    params = jax.device_put(param.initialise(DECLARATIONS, 0), placed.params)
    started = jax.jit(transformation.init, out_shardings=placed.optimizer)(params)
    found = train(transformation, params, started)
    alone = param.initialise(DECLARATIONS, 0)
    expected = train(make(OPTIMIZERS[name]), alone, make(OPTIMIZERS[name]).init(alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_array_of_the_state_has_a_name_of_its_own_in_a_checkpoint(name):
    transformation = make(OPTIMIZERS[name])
    state = transformation.init(param.initialise(DECLARATIONS, 0))
    named = arrays.flatten({"optimizer": state})
    assert len(named) == len(jax.tree.leaves(state))
    again = jax.tree.unflatten(jax.tree.structure(state), list(named.values()))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert sum(key.endswith("layers/w") for key in named) == (2 if name == "adamw" else 1)
