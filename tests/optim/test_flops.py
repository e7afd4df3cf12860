"""The closed form of an update's FLOPs against the products of the traced program, and the figures of the released models."""

import math

import jax
import pytest

from v4train.core import param
from v4train.optim import config as config_lib
from v4train.optim import flops, hybrid

SCHEDULE = {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 1, "decay_steps": 1}


def declare(*shape, **options):
    return param.Declaration(shape, (None,) * len(shape), param.Normal(0.5), **options)


DECLARATIONS = {
    "embed": declare(16, 8, group="adamw"),
    "experts": declare(2, 4, 6, 10),
    "down": declare(2, 4, 10, 6),
    "square": declare(8, 8),
    "gate": declare(8, 4, tags=frozenset({"router_gate"})),
    "norm": declare(8, group="adamw"),
}


def products(jaxpr) -> float:
    """FLOPs of all matrix products of a trace, those of a loop as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        times = equation.params.get("length", 1)
        for inner in _inner(equation.params):
            total += times * products(inner)
    return total


def _inner(parameters):
    for value in parameters.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr


CHANGES = [{}, {"router_gates": "adamw"}, {"muon": {"coefficients": [[2.0, -1.5, 0.5]] * 5}}, {"muon": None}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_newton_schulz_is_what_the_update_multiplies(change):
    config = config_lib.OptimizerConfig(schedule=SCHEDULE, **change)
    optimizer = hybrid.hybrid(config, DECLARATIONS, total_steps=4)
    params = param.map_declarations(lambda _, d: d.struct, DECLARATIONS)
    traced = jax.make_jaxpr(optimizer.update)(params, jax.eval_shape(optimizer.init, params), params)
    counted = flops.update(config, DECLARATIONS)
    assert counted.newton_schulz == products(traced.jaxpr)
    assert (counted.newton_schulz == 0) == (config.muon is None)
    assert counted.total > counted.newton_schulz


def test_buffers_cost_nothing():
    config = config_lib.OptimizerConfig(schedule=SCHEDULE)
    buffer = declare(100, 100, group="buffer", decay=False)
    assert flops.update(config, DECLARATIONS | {"table": buffer}) == flops.update(config, DECLARATIONS)


def test_experts_of_v4_flash_cost_as_much_as_their_step_at_728_thousand_tokens():
    """The reference's figure, computed from 6 FLOPs per parameter and token."""
    update = 256 * flops.newton_schulz((2048, 4096), steps=10)
    assert update / (6 * 6 * 2048 * 4096) == pytest.approx(728e3, rel=1e-3)
