"""The optimizer of a recipe, whatever its kind."""

from collections.abc import Callable

import jax
import optax

from v4train.core import param
from v4train.optim import hybrid, named
from v4train.optim.config import OptaxConfig, OptimizerConfig


def make(
    config: OptimizerConfig | OptaxConfig,
    declarations: dict,
    *,
    total_steps: int,
    mesh: jax.sharding.Mesh | None = None,
    trainable: Callable[[str, param.Declaration], bool] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of parameters declared as ``declarations``: an `optax.GradientTransformation`, which composes like any other.

    Args:
        config: of one of the kinds.
        declarations: nested dict of trained parameters, as the model declares them.
        total_steps: updates in the whole run, for the schedule.
        mesh: where parameters, gradients and state lie (None: on one device).
        trainable: of a path and its declaration, whether the parameter moves (None: all do).

    Raises:
        ValueError: the schedule does not fit into ``total_steps``, or the config names what optax does not have.
    """
    if isinstance(config, OptaxConfig):
        return named.transformation(config, declarations, total_steps=total_steps, trainable=trainable)
    return hybrid.hybrid(config, declarations, total_steps=total_steps, mesh=mesh, trainable=trainable)


def state_bytes(config: OptaxConfig, declarations: dict) -> int:
    """What the named transforms remember of parameters declared as ``declarations``: bytes on all devices together, copies once."""
    ramps = config.schedule.warmup_steps + config.schedule.decay_steps + config.schedule.final_steps
    params = param.map_declarations(lambda _, d: d.struct, declarations)
    state = jax.eval_shape(make(config, declarations, total_steps=ramps + 1).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
