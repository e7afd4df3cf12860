"""The layers: the only file that knows scan and remat.

Equal layers are compiled once. The sequence of layers is factored into runs ``pattern x repeat`` with as few distinct bodies as
possible; V4-Flash (2 window, then CSA and HCA in turn, the first 3 hash-routed) becomes ``[window#] x 2, [csa#] x 1, [hca csa] x
20``. Parameters of a run are stacked along a leading "layers" axis and scanned. So a 61-layer model compiles in about the time of a
4-layer one.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4train.core import param
from v4train.model import block as block_lib
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.sharding import constrain

_LONGEST_PATTERN = 4
_POLICIES = {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Run(NamedTuple):
    """``pattern``, ``repeat`` times."""

    pattern: tuple[block_lib.LayerSpec, ...]
    repeat: int


def layer_specs(config: config_lib.ModelConfig) -> tuple[block_lib.LayerSpec, ...]:
    """Kind and routing of every layer."""
    return tuple(block_lib.LayerSpec(kind, i < config.moe.hash_layers) for i, kind in enumerate(config.layer_kinds))


def factor(specs: Sequence[block_lib.LayerSpec]) -> tuple[Run, ...]:
    """The runs with the fewest bodies to compile; among those, the fewest runs."""

    @functools.cache
    def best(start: int) -> tuple[int, int, tuple[Run, ...]]:
        if start == len(specs):
            return 0, 0, ()
        options = []
        for size in range(1, min(_LONGEST_PATTERN, len(specs) - start) + 1):
            pattern, repeat = tuple(specs[start : start + size]), 1
            while True:
                cost, runs, rest = best(start + size * repeat)
                options.append((cost + size, runs + 1, (Run(pattern, repeat), *rest)))
                after = start + size * repeat
                if tuple(specs[after : after + size]) != pattern:
                    break
                repeat += 1
        return min(options, key=lambda option: option[:2])

    return best(0)[2]


class Group(nnx.Module):
    """The layers of one pattern."""

    def __init__(self, config: config_lib.ModelConfig, pattern: Sequence[block_lib.LayerSpec]):
        self.size, self.remat = len(pattern), config.remat
        for i, spec in enumerate(pattern):
            setattr(self, f"layer_{i}", block_lib.Block(config, spec))

    def __call__(
        self, streams: Array, context: context_lib.Context, given: dict[str, Array] | None, keep_experts: bool
    ) -> tuple[Array, dict[str, block_lib.LayerStats]]:
        stats = {}
        for i in range(self.size):
            name = f"layer_{i}"
            layer = remember(getattr(self, name), policy=self.remat, keep_experts=keep_experts)
            streams, stats[name] = layer(streams, context, None if given is None else given[name])
        return streams, stats


def remember(block: block_lib.Block, *, policy: str, keep_experts: bool = False):
    """The block's call ``(streams, context, given=None)``, keeping for the backward pass only what the policy says.

    The block gathers its parameters inside: the backward pass gathers them again, and what is kept between is never whole.
    """
    graph, state = nnx.split(block)

    def call(state, streams, context, given=None):
        return nnx.merge(graph, unshard(state))(streams, context, given, keep_experts=keep_experts)

    if policy == "none":
        return functools.partial(call, state)
    remembered = jax.checkpoint(call, policy=_POLICIES[policy])
    return lambda streams, context, given=None: remembered(*_one_layer_at_a_time(state, streams), context, given)


@jax.custom_vjp
def _one_layer_at_a_time(state: nnx.State, streams: Array) -> tuple[nnx.State, Array]:
    """Its inputs. In the backward pass the layer's parameter gradients are finished before the layer below begins.

    Nothing else needs them before the optimizer does, so a scheduler may put them off, and all that they are computed from, which is
    everything that the layer recomputes, stays alive: in all layers at once.
    """
    return state, streams


def _forward(state: nnx.State, streams: Array) -> tuple[tuple[nnx.State, Array], None]:
    return (state, streams), None


def _backward(_, gradients: tuple[nnx.State, Array]) -> tuple[nnx.State, Array]:
    leaves, structure = jax.tree.flatten(gradients)
    real = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]
    for i, leaf in zip(real, jax.lax.optimization_barrier([leaves[i] for i in real]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


_one_layer_at_a_time.defvjp(_forward, _backward)


class Stack(nnx.Module):
    """All layers of the decoder."""

    def __init__(self, config: config_lib.ModelConfig):
        self.runs = factor(layer_specs(config))
        for i, run in enumerate(self.runs):
            setattr(self, f"run_{i}", param.stack(Group(config, run.pattern), run.repeat))

    def __call__(
        self,
        streams: Float[Array, "b s n d"],
        context: context_lib.Context,
        given: dict[str, dict[str, Any]] | None = None,
        *,
        keep_experts: bool = False,
    ) -> tuple[Float[Array, "b s n d"], dict[str, dict[str, block_lib.LayerStats]]]:
        """Streams after the last layer, and statistics per run and place in its pattern, stacked over its repetitions.

        Args:
            streams: before the first layer.
            context: what all layers look at.
            given: experts that replace the routers' choices, i32 ``{run: {place: [repeat, b, s, k]}}``; None: the routers choose.
            keep_experts: report where tokens went, in that same form.
        """
        stats = {}
        for i, run in enumerate(self.runs):
            name = f"run_{i}"
            graph, state = nnx.split(getattr(self, name))
            body = functools.partial(_scanned, graph, context, keep_experts)
            xs = state, None if given is None else given[name]
            if run.repeat == 1:
                streams, one = body(streams, jax.tree.map(lambda x: x[0], xs))
                stats[name] = jax.tree.map(lambda x: x[None], one)
            else:
                streams, stats[name] = jax.lax.scan(body, streams, xs)
        return streams, stats


def _scanned(graph, context, keep_experts, streams, xs):
    state, given = xs
    return nnx.merge(graph, state)(streams, context, given, keep_experts)


def unshard(state: nnx.State) -> nnx.State:
    """Gathers the parameters of one layer, so that only one layer's are whole at a time.

    Not those that are gathered where they are used (experts), or never (the token table).
    """

    def gather(variable: nnx.Variable) -> nnx.Variable:
        x = variable.get_value()
        declaration = variable.get_metadata()["declaration"]
        if declaration.tags & {"routed_expert", "looked_up"}:
            return variable
        return variable.replace(constrain.unshard(x, declaration.axes[len(declaration.axes) - x.ndim :]))

    return jax.tree.map(gather, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def in_layer_order(stats: dict[str, dict[str, Array]]) -> Array:
    """Joins per-run statistics, ``{run: {place: [repeat, ...]}}``, to ``[L, ...]`` in the order of the layers."""
    runs = []
    for i in range(len(stats)):
        places = stats[f"run_{i}"]
        stacked = jnp.stack([places[f"layer_{j}"] for j in range(len(places))], axis=1)
        runs.append(stacked.reshape(-1, *stacked.shape[2:]))
    return jnp.concatenate(runs)
