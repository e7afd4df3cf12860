"""How model code speaks of sharding: in shape letters, without a mesh.

The mesh is ambient (`on_mesh`), because it belongs to the place where the program runs and not to the model. Outside of it, or on one
device, every function here does nothing, so the same model code runs alone.

Parameters are stored split over more axes than a layer computes with (`rules`). A layer takes them in one of two ways:

* `unshard`: the compiler gathers the parameter before the layer, and is asked to leave its gradient as it is stored. The partitioner writes
  that as an all-reduce of which each device keeps a slice; XLA turns the pair into a reduce-scatter on TPU and GPU, and not on the CPU.
* `Stored`, an input of `shard_local`: gathered by an explicit all-gather, whose derivative is an explicit reduce-scatter over the
  axes that store it, followed by an all-reduce of only the device's part over `replica`. For what is large: experts, vocabulary.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from v4train.core import axes as axes_lib
from v4train.sharding import rules

_mesh: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar("v4train_mesh", default=None)


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Traces and runs what is inside for this mesh."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def _current() -> jax.sharding.Mesh | None:
    mesh = _mesh.get()
    return None if mesh is None or mesh.size == 1 else mesh


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Asks the compiler to split ``x`` as its axes' letters say (``"B S D"``)."""
    mesh = _current()
    if mesh is None:
        return x
    return lax.with_sharding_constraint(x, rules.sharding(axes_lib.logical_axes(letters), shape=x.shape, mesh=mesh))


def unshard(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as a layer uses it: whole but for `expert` and `tensor`. Its gradient comes back split as it is stored.

    Without this, the compiler is free to split the arithmetic over `fsdp` instead, and moves activations to do so.
    """
    mesh = _current()
    if mesh is None:
        return x
    used, stored = (place(axes, shape=x.shape, mesh=mesh) for place in (rules.sharding, rules.parameter_sharding))
    return x if used.spec == stored.spec else _unshard(x, used, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _unshard(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
    return lax.with_sharding_constraint(x, used)


def _unshard_forward(x: jax.Array, used: NamedSharding, stored: NamedSharding) -> tuple[jax.Array, None]:
    return _unshard(x, used, stored), None


def _unshard_backward(used: NamedSharding, stored: NamedSharding, _, dy: jax.Array) -> tuple[jax.Array]:
    return (lax.with_sharding_constraint(dy, stored),)


_unshard.defvjp(_unshard_forward, _unshard_backward)


def mesh_axis(letter: str) -> str | None:
    """The mesh axis that splits a logical axis, or None if it is whole. For axes that one mesh axis splits."""
    mesh = _current()
    if mesh is None:
        return None
    names = [name for name in rules.rule(axes_lib.LETTERS[letter], mesh=mesh) if mesh.shape[name] > 1]
    assert len(names) <= 1, (letter, names)
    return names[0] if names else None


def mesh_axes(letter: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis, outermost first."""
    mesh = _current()
    return () if mesh is None else tuple(name for name in rules.rule(axes_lib.LETTERS[letter], mesh=mesh) if mesh.shape[name] > 1)


def used_axes(letters: str) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of an array where it is computed with, outermost first."""
    mesh, axes = _current(), axes_lib.logical_axes(letters)
    if mesh is None:
        return ((),) * len(axes)
    return tuple(rules.names(part) for part in rules.spec(axes, shape=None, mesh=mesh))


def evenly(letters: str, *, shape: tuple[int, ...]) -> str:
    """The letters of an array, with ``_`` for axes that this mesh leaves whole where it is computed with: for `shard_local`, which wants
    every axis that it splits to divide."""
    mesh = _current()
    if mesh is None:
        return letters
    computed = rules.spec(axes_lib.logical_axes(letters), shape=shape, mesh=mesh)
    return " ".join(letter if rules.names(part) else "_" for letter, part in zip(letters.split(), computed, strict=True))


def stored_axes(letters: str, *, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that split each axis of a parameter where it lives, outermost first."""
    mesh = _current()
    if mesh is None:
        return ((),) * len(shape)
    return tuple(rules.names(part) for part in rules.stored_spec(axes_lib.logical_axes(letters), shape=shape, mesh=mesh))


@dataclasses.dataclass(frozen=True)
class Stored:
    """An input of `shard_local` that is a parameter as it lives.

    Attributes:
        letters: of all its axes, as they are declared: ``"E D F"``.
        gathered: the function gets it in its compute layout; otherwise it gets what this device stores.
    """

    letters: str
    gathered: bool = True


def shard_local(function: Callable, *, inputs: Sequence[str | Stored], outputs: str | tuple[str, ...]) -> Callable:
    """Runs ``function`` on each device's shard (`jax.shard_map`), with shardings given in shape letters.

    Here every split axis of activations must divide; the recipe's checks make sure of it. Letters given for a tuple of arrays hold for each
    of them, and axes that they do not mention are whole. Several results are a tuple, with letters for each.
    """
    mesh = _current()
    if mesh is None:
        return function

    def given(x: jax.Array, letters: str | Stored) -> PartitionSpec:
        if isinstance(letters, Stored):
            return rules.stored_spec(axes_lib.logical_axes(letters.letters), shape=x.shape, mesh=mesh)
        return rules.spec(axes_lib.logical_axes(letters), shape=None, mesh=mesh)

    def result(letters: str) -> PartitionSpec:
        return rules.spec(axes_lib.logical_axes(letters), shape=None, mesh=mesh)

    def run(*args: Any) -> Any:
        specs = tuple(given(x, letters) for x, letters in zip(args, inputs, strict=True))
        wanted = [
            rules.spec(axes_lib.logical_axes(letters.letters), shape=x.shape, mesh=mesh)
            if isinstance(letters, Stored) and letters.gathered
            else None
            for x, letters in zip(args, inputs, strict=True)
        ]

        def local(*shards: jax.Array) -> jax.Array:
            return function(
                *(x if used is None else gather(x, stored=at, used=used) for x, at, used in zip(shards, specs, wanted, strict=True))
            )

        out = result(outputs) if isinstance(outputs, str) else tuple(result(letters) for letters in outputs)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return run


def gather(x: jax.Array, *, stored: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """Inside of `jax.shard_map`: a parameter's shard, gathered over the axes that store it and are not used."""
    for dimension, (at, kept) in enumerate(zip(stored, used, strict=True)):
        extra = rules.names(at)[len(rules.names(kept)) :]
        if extra:
            x = lax.all_gather(x, extra, axis=dimension, tiled=True)
    return x
