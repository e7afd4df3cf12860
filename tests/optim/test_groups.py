"""What a recipe says about roles: declarations, state and steps follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.core import param
from v4train.optim import config as config_lib
from v4train.optim import groups, hybrid, schedule

SCHEDULE = {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay_steps": 3}
TOTAL = 8


def declare(*shape, tag="", **options):
    return param.Declaration(shape, (None,) * len(shape), param.Normal(0.5), tags=frozenset({tag} - {""}), **options)


DECLARATIONS = {
    "gate": declare(8, 4, tag="router_gate"),
    "ape": declare(4, 8, tag="position_table", group="adamw", decay=False),
    "sink": declare(4, tag="sink", group="adamw", decay=False),
    "scale": declare(3, tag="hyper_gate", group="adamw", decay=False),
    "norm": declare(8, tag="norm", group="adamw"),
    "w": declare(8, 8),
    "embed": declare(16, 8, group="adamw"),
    "bias": declare(4, tag="router_bias", group="buffer", decay=False),
}


def optimizer_config(**changes):
    return config_lib.OptimizerConfig(schedule=SCHEDULE, **changes)


def trained():
    return {name: d for name, d in DECLARATIONS.items() if d.trained}


def test_defaults_leave_the_declarations_as_they_are():
    assert groups.assign(optimizer_config(), DECLARATIONS) == DECLARATIONS


@pytest.mark.parametrize(
    "change, name, found",
    [
        ({"router_gates": "adamw"}, "gate", {"group": "adamw"}),
        ({"position_tables": "muon"}, "ape", {"group": "muon"}),
        ({"decays": {"position_tables": True}}, "ape", {"decay": True}),
        ({"decays": {"sinks": True}}, "sink", {"decay": True}),
        ({"decays": {"hyper_gates": True}}, "scale", {"decay": True}),
        ({"decays": {"norms": False}}, "norm", {"decay": False}),
    ],
    ids=str,
)
def test_an_option_changes_its_role_only(change, name, found):
    expected = DECLARATIONS | {name: dataclasses.replace(DECLARATIONS[name], **found)}
    assert groups.assign(optimizer_config(**change), DECLARATIONS) == expected


def test_state_follows_the_groups():
    config = optimizer_config(router_gates="adamw", position_tables="muon")
    state = hybrid.hybrid(config, trained(), total_steps=TOTAL).init(param.initialise(trained(), 0))
    assert set(state.momentum) == {"ape", "w"}
    assert set(state.mu) == set(state.nu) == {"gate", "sink", "scale", "norm", "embed"}


def test_without_muon_every_parameter_takes_the_steps_of_adamw():
    """Two steps of Adam with decoupled decay, in numpy and fp64."""
    config = optimizer_config(muon=None)
    optimizer = hybrid.hybrid(config, trained(), total_steps=TOTAL)
    first = param.initialise(trained(), 0)
    gradients = [param.initialise(trained(), seed) for seed in (1, 2)]
    params, state = first, optimizer.init(first)
    assert state.momentum == {}
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, d in trained().items():
        weight, mean, square = np.asarray(first[name], np.float64), 0.0, 0.0
        for step, gradient in enumerate(np.asarray(g[name], np.float64) for g in gradients):
            rate = float(schedule.learning_rate(config.schedule, step=step, total_steps=TOTAL))
            mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
            direction = mean / (1 - 0.9 ** (step + 1)) / np.sqrt(square / (1 - 0.95 ** (step + 1)))
            weight = weight - rate * (direction + (0.1 * weight if d.decay else 0.0))
        np.testing.assert_allclose(params[name], weight, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("decays", [False, True])
def test_decay_of_sinks_moves_them_by_the_rate(decays):
    config = optimizer_config(decays={"sinks": decays})
    optimizer = hybrid.hybrid(config, trained(), total_steps=TOTAL)
    params = param.initialise(trained(), 0)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    rate = float(schedule.learning_rate(config.schedule, step=0, total_steps=TOTAL))
    np.testing.assert_allclose(updates["sink"], -rate * 0.1 * params["sink"] * decays, rtol=1e-6)
