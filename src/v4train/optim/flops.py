"""FLOPs of one update of the optimizer, in closed form: Newton-Schulz per matrix, and a few operations per element.

A step of Newton-Schulz on an n x m matrix, n <= m, is three products: X X^T (2 n^2 m), its square (2 n^3), and that times X (2 n^2 m).
Nothing of it depends on the batch. So its share of a training step falls with the tokens of the step, and it is dear where many parameters
see few tokens: forward and backward pass cost a routed matrix 6 n m for each token that visits it, the update 10 (4 n^2 m + 2 n^3) once.
V4-Flash's experts (2048 x 4096, 6 of 256 a token) cost as much at 728,000 tokens a step, and one percent of that at the paper's 75M.

What is counted is the whole update on all devices together, each matrix once; the padding of stacks (`stacking`) is not in it. An optimizer
of optax's transforms has no closed form: its update is traced, and products and results of arithmetic are counted (`traced`).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from v4train.core import param, tree
from v4train.optim import groups, named
from v4train.optim.config import OptaxConfig, OptimizerConfig

MUON_ELEMENT = 15
"""Per element of a matrix outside of the iteration: momentum 2, look-ahead 2, norm 3, scale 1, decay 2, rate 1, addition 1, clipping 3."""
ADAMW_ELEMENT = 19
"""Per element of another parameter: moments 7, bias corrections 2, direction 3, decay 2, rate 1, addition 1, clipping 3."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one update. `total` is their sum."""

    newton_schulz: float
    """Products of the iteration; of named transforms, all their products."""
    elementwise: float
    """Momentum, moments, decay, clipping: limited by memory, not by arithmetic."""

    @property
    def total(self) -> float:
        return self.newton_schulz + self.elementwise


def newton_schulz(shape: tuple[int, int], *, steps: int) -> float:
    """Of one matrix, with one ``(a, b, c)`` per step."""
    n, m = sorted(shape)
    return float(steps * (4 * n * n * m + 2 * n**3))


def update(config: OptimizerConfig | OptaxConfig, declarations: dict) -> Flops:
    """Of one update of all trained parameters.

    Args:
        config: of the optimizer.
        declarations: nested dict, as the model declares them; buffers do not count.

    Raises:
        ValueError: the config names what optax does not have.
    """
    if isinstance(config, OptaxConfig):
        return _named(config, tree.select(declarations, declarations=declarations, keep=lambda d: d.trained))
    trained = [d for d in param.flatten(groups.assign(config, declarations)).values() if d.trained]
    matrices = [d for d in trained if d.group == "muon"]
    steps = len(config.muon.coefficients) if config.muon else 0
    return Flops(
        newton_schulz=sum(d.matrices * newton_schulz(d.matrix, steps=steps) for d in matrices),
        elementwise=float(sum(d.size * (MUON_ELEMENT if d.group == "muon" else ADAMW_ELEMENT) for d in trained)),
    )


def _named(config: OptaxConfig, declarations: dict) -> Flops:
    ramps = config.schedule.warmup_steps + config.schedule.decay_steps + config.schedule.final_steps
    optimizer = named.transformation(config, declarations, total_steps=ramps + 1)
    params = param.map_declarations(lambda _, d: d.struct, declarations)
    counted = traced(jax.make_jaxpr(optimizer.update)(params, jax.eval_shape(optimizer.init, params), params).jaxpr)
    return dataclasses.replace(counted, elementwise=counted.elementwise + 3 * sum(d.size for d in param.flatten(declarations).values()))


_MOVES = frozenset({"reshape", "transpose", "broadcast_in_dim", "convert_element_type", "squeeze", "slice", "concatenate", "copy", "pad"})


def traced(jaxpr: Any) -> Flops:
    """Of a traced function: two for each product and addition of a matrix product, one for each element of every other result that is not
    only moved. A loop counts as often as it runs; one whose number of turns is not known when it is traced counts once."""
    products, elementwise = 0.0, 0.0
    for equation in jaxpr.eqns:
        inside = [traced(inner) for inner in _inner(equation.params)]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        products += times * sum(one.newton_schulz for one in inside)
        elementwise += times * sum(one.elementwise for one in inside)
        sizes = [math.prod(out.aval.shape) for out in equation.outvars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            products += 2 * sizes[0] * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name.startswith("reduce_"):
            elementwise += math.prod(equation.invars[0].aval.shape)
        elif not inside and equation.primitive.name not in _MOVES:
            elementwise += sum(sizes)
    return Flops(products, elementwise)


def _inner(parameters: Mapping[str, Any]) -> Iterator[Any]:
    """The traced functions that an operation calls."""
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            found = getattr(one, "jaxpr", one)
            if hasattr(found, "eqns"):
                yield found
