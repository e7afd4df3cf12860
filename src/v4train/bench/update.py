"""The optimizer's part of a training step: its FLOPs in closed form, and the seconds of its update, compiled and run alone.

The update is what the trainer's step does after the gradients are there: clipping, the optimizer, the new parameters. It does not depend
on the batch, so its share says how large a batch must be for Muon to be cheap.
"""

import statistics
import time
from typing import Any

import jax
import optax

from v4train.core import compiler
from v4train.model import flops
from v4train.optim import clip
from v4train.optim import flops as optim_flops
from v4train.sharding import constrain
from v4train.train import build
from v4train.train import state as state_lib


def measure(parts: build.Parts, state: state_lib.State, *, repeats: int, step_seconds: float) -> dict[str, Any]:
    """FLOPs and seconds of one update, and their shares of a step.

    Args:
        parts: of the recipe.
        state: is consumed: its buffers are given to the update.
        repeats: updates that are measured, after one that is not.
        step_seconds: of a whole training step.

    Returns:
        Ready for `json.dumps`. ``flops_share`` is of model FLOPs (sparse count, without recomputation) and the update's together.
    """
    recipe = parts.recipe
    counted = optim_flops.update(recipe.optimizer, parts.declarations)
    credited = flops.training(recipe.model, length=recipe.data.sequence_length).total * parts.data.tokens_per_step
    seconds = _seconds(parts, state, repeats=repeats)
    median = statistics.median(seconds)
    return {
        "newton_schulz_flops": counted.newton_schulz,
        "elementwise_flops": counted.elementwise,
        "flops_share": counted.total / (counted.total + credited),
        "update_seconds": {"median": round(median, 6), "min": round(min(seconds), 6), "max": round(max(seconds), 6)},
        "seconds_share": round(median / step_seconds, 4),
    }


def _seconds(parts: build.Parts, state: state_lib.State, *, repeats: int) -> list[float]:
    limit = parts.recipe.optimizer.clip_norm

    def update(gradients: dict, moments: Any, params: dict) -> tuple[Any, Any]:
        clipped = clip.clip_by_global_norm(gradients, limit).gradients
        updates, moments = parts.optimizer.update(clipped, moments, params)
        return optax.apply_updates(params, updates), moments

    gradients = jax.tree.map(lambda x: x * 1e-3, state.params)
    places = jax.tree.map(lambda x: x.sharding, (state.params, state.optimizer))
    with constrain.on_mesh(parts.mesh):
        lowered = jax.jit(update, donate_argnums=(1, 2), out_shardings=places).lower(gradients, state.optimizer, state.params)
    run = lowered.compile(compiler.options())
    params, moments, found = state.params, state.optimizer, []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        params, moments = jax.block_until_ready(run(gradients, moments, params))
        found.append(time.perf_counter() - started)
    return found[1:]
