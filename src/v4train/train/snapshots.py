"""Copies of the state that a run can go back to without reading a disk.

A training step donates its state, so what is kept must be a copy. It lies on the devices, or in the memory of the hosts, where each process
keeps the parts of its own devices. The data position and the count of skipped steps are not part of it: they only go forward.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from v4train.train import state as state_lib


@dataclasses.dataclass(eq=False)
class Snapshot:
    """The trained part of a state.

    Attributes:
        step: steps done when it was taken.
        until: batches consumed when this was the state last; grows when the run goes back to it.
        used: whether the run has gone back to it.
    """

    step: int
    until: int
    used: bool
    _trained: Any  # parameters, buffers, optimizer: copies on the devices, or `_OnHost`

    def onto(self, state: state_lib.State, *, done: int) -> state_lib.State:
        """``state`` with the trained part of the snapshot, which stays usable, ``done`` batches consumed.

        Whatever the optimizer counts (the scalars called ``count``, as optax names them) goes on as if each batch since had been an update:
        the learning rate depends on the batches consumed, and its schedule ends with the run.
        """
        params, buffers, optimizer = jax.tree.map(_copy_back, self._trained, is_leaf=lambda x: isinstance(x, _OnHost))
        passed = done - self.step
        optimizer = jax.tree_util.tree_map_with_path(lambda path, x: _counted(x, passed) if _is_count(path, x) else x, optimizer)
        return state._replace(params=params, buffers=buffers, optimizer=optimizer)


def take(state: state_lib.State, *, step: int, where: Literal["host", "device"]) -> Snapshot:
    """Copies the trained part of the state after ``step`` steps; on ``host`` it waits for the devices."""
    trained = state.params, state.buffers, state.optimizer
    if where == "device":
        return Snapshot(step, step, False, jax.tree.map(lambda x: x.copy(), trained))
    for x in jax.tree.leaves(trained):
        for shard in x.addressable_shards:
            shard.data.copy_to_host_async()
    return Snapshot(step, step, False, jax.tree.map(_OnHost.of, trained))


@dataclasses.dataclass(frozen=True)
class _OnHost:
    """This process's parts of an array, each once however many devices have it."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: dict[tuple, np.ndarray]

    @classmethod
    def of(cls, x: jax.Array) -> "_OnHost":
        parts: dict[tuple, np.ndarray] = {}
        for shard in x.addressable_shards:
            place = _place(shard.index)
            if place not in parts:
                parts[place] = np.array(shard.data, copy=True)  # on a CPU a view would be of the memory that the next step overwrites
        return cls(x.shape, x.sharding, parts)

    def back(self) -> jax.Array:
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[_place(index)].copy())


def _place(index: tuple[slice, ...] | None) -> tuple:
    return tuple((part.start, part.stop) for part in index or ())


def _copy_back(x: jax.Array | _OnHost) -> jax.Array:
    return x.back() if isinstance(x, _OnHost) else x.copy()


def _is_count(path: tuple, x: jax.Array) -> bool:
    last = path[-1]  # of a named tuple an attribute, of a dict a key
    name = getattr(last, "name", getattr(last, "key", None))
    return name == "count" and x.shape == () and np.issubdtype(x.dtype, np.integer)


def _counted(x: jax.Array, passed: int) -> jax.Array:
    value = np.asarray(x.addressable_shards[0].data) + np.asarray(passed, x.dtype)
    return jax.device_put(value, x.sharding)
