"""Muon for matrices, AdamW for the rest, as one `optax.GradientTransformation`.

The groups come from the parameters' declarations (`groups`), so there is no list of name patterns to keep in step with the model. The
update contains the learning rate and the decoupled weight decay::

    update = -lr (direction + weight_decay param)         the second term only where ``declaration.decay``

Contract: ``declarations``, parameters and gradients are nested dicts of one structure, of *trained* parameters only (the caller keeps
its buffers elsewhere). The state holds fp32 arrays in nested dicts with the same paths, each pruned to the leaves that have such a
state: what a checkpoint stores is what exists, and no placeholders stand for the rest.

A phase may freeze parameters (`trainable`): their updates are zero, decay included, and their state stands still, but it stays where
it is, so every phase reads and writes the same checkpoint. There is one count of updates for all. A parameter that thaws after k
updates is therefore bias-corrected as if it had seen k zero gradients; its first AdamW steps are at most half as long.

Rejected: `optax.partition` and masks. Their states contain `MaskedNode` placeholders, they orthogonalise leaf by leaf (one loop per
parameter to compile), and they count per group.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from v4train.core import param, tree
from v4train.optim import adamw, groups, heads, muon, schedule, stacking
from v4train.optim.config import OptimizerConfig
from v4train.sharding import rules


class HybridState(NamedTuple):
    """Everything the optimizer remembers.

    Attributes:
        count: updates made.
        momentum: Muon's, for its parameters.
        mu: Adam's mean of the gradients, for the other parameters.
        nu: Adam's mean of their squares.
    """

    count: Int[Array, ""]
    momentum: dict
    mu: dict
    nu: dict


def hybrid(
    config: OptimizerConfig,
    declarations: dict,
    *,
    total_steps: int,
    mesh: jax.sharding.Mesh | None = None,
    trainable: Callable[[str, param.Declaration], bool] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of parameters declared as ``declarations``.

    Args:
        config: of all parts. ``clip_norm`` is not applied here but by `clip.clip_by_global_norm`.
        declarations: nested dict of trained parameters, as the model declares them.
        total_steps: updates in the whole run, for the schedule.
        mesh: the devices on which parameters, gradients and state lie as `sharding.rules` stores them (None: one device). Newton-Schulz
            is divided among them (see `stacking`).
        trainable: of a path and its declaration, whether the parameter moves (None: all do).

    Raises:
        ValueError: the schedule does not fit into ``total_steps``.
    """
    config.schedule.check(total_steps)
    declarations = groups.assign(config, declarations)
    declared = param.flatten(declarations)
    buffers = [path for path, declaration in declared.items() if not declaration.trained]
    assert not buffers, f"buffers are not the optimizer's: {buffers}"
    live = frozenset(i for i, leaf in enumerate(declared.items()) if trainable is None or trainable(*leaf))
    parts = _Hybrid(config, declarations, list(declared.values()), total_steps, mesh, live)
    return optax.GradientTransformation(parts.init, parts.update)


@dataclasses.dataclass(frozen=True)
class _Hybrid:
    """What `hybrid` was told. Parameters go by their number in tree order; ``live`` are those that move."""

    config: OptimizerConfig
    declarations: dict
    declared: list[param.Declaration]
    total_steps: int
    mesh: jax.sharding.Mesh | None
    live: frozenset[int]

    def init(self, params: Any) -> HybridState:
        def zeros(group: param.Group) -> dict:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), _members(params, self.declarations, group))

        return HybridState(count=jnp.zeros((), jnp.int32), momentum=zeros("muon"), mu=zeros("adamw"), nu=zeros("adamw"))

    def update(self, updates: Any, state: Any, params: Any = None) -> tuple[dict, HybridState]:
        assert params is not None, "weight decay needs the parameters: update(gradients, state, params)"
        leaves, structure = jax.tree.flatten(updates)
        weights = jax.tree.leaves(params)
        assert len(leaves) == len(weights) == len(self.declared), "gradients, parameters and declarations differ in structure"
        matrices, momentum = self._muon(leaves, state)
        others, mu, nu = self._adamw(leaves, state)
        directions = matrices | others
        rate = schedule.learning_rate(self.config.schedule, step=state.count, total_steps=self.total_steps)

        def step(i: int, weight: Array) -> Array:
            if i not in self.live:
                return jnp.zeros_like(weight, dtype=jnp.float32)
            decay = self.config.weight_decay * weight.astype(jnp.float32) if self.declared[i].decay else 0.0
            return -rate * (directions[i] + decay)

        moves = jax.tree.unflatten(structure, [step(i, weight) for i, weight in enumerate(weights)])
        return moves, HybridState(state.count + 1, momentum, mu, nu)

    def _muon(self, gradients: list[Array], state: HybridState) -> tuple[dict[int, Array], dict]:
        """The directions of Muon's live parameters, and the momentum of all."""
        momentum, structure = jax.tree.flatten(state.momentum)
        matrices, config = {}, self.config.muon
        if config is None:
            return {}, state.momentum
        for slot, i in enumerate(self._numbers("muon")):
            if i in self.live:
                lookahead, momentum[slot] = muon.move(gradients[i], momentum=momentum[slot], config=config)
                matrices[i] = heads.split(lookahead, self.declared[i].heads)
        orthogonal = muon.orthogonalise(list(matrices.values()), config=config, placed=self._placed(matrices))
        directions = {i: heads.join(x, self.declared[i].heads) for i, x in zip(matrices, orthogonal, strict=True)}
        return directions, jax.tree.unflatten(structure, momentum)

    def _adamw(self, gradients: list[Array], state: HybridState) -> tuple[dict[int, Array], dict, dict]:
        """The directions of AdamW's live parameters, and the moments of all."""
        mu, structure = jax.tree.flatten(state.mu)
        nu = jax.tree.leaves(state.nu)
        directions = {}
        for slot, i in enumerate(self._numbers("adamw")):
            if i in self.live:
                moved = adamw.move(gradients[i], mu=mu[slot], nu=nu[slot], count=state.count, config=self.config.adamw)
                directions[i], mu[slot], nu[slot] = moved
        return directions, jax.tree.unflatten(structure, mu), jax.tree.unflatten(structure, nu)

    def _placed(self, numbers: Iterable[int]) -> stacking.Placed | None:
        if self.mesh is None or self.mesh.size == 1:
            return None
        mesh, specs = self.mesh, []
        for d in (self.declared[i] for i in numbers):
            stored = rules.stored_spec(d.axes, shape=d.shape, mesh=mesh)
            specs.append(heads.spec(stored, dimensions=len(d.shape), heads=d.heads, mesh=mesh))
        return stacking.Placed(mesh, specs)

    def _numbers(self, group: param.Group) -> list[int]:
        return [i for i, declaration in enumerate(self.declared) if declaration.group == group]


def state_like(leaves: dict, *, declarations: dict, count: Any) -> HybridState:
    """A state whose leaves are those of ``leaves`` (a nested dict like the parameters, of shardings for example), and ``count``.

    The declarations are those that `groups.assign` gives.
    """
    moments = _members(leaves, declarations, "adamw")
    return HybridState(count, _members(leaves, declarations, "muon"), moments, moments)


def _members(leaves: dict, declarations: dict, group: param.Group) -> dict:
    """The leaves of one group, at their paths; a dict without any is left out."""
    return tree.select(leaves, declarations=declarations, keep=lambda d: d.group == group)
