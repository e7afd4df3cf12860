"""How model code speaks of sharding: in shape letters, without a mesh.

The mesh is ambient (`on_mesh`), because it belongs to the place where the program runs and not to the model. Outside of it, or on one
device, every function here does nothing, so the same model code runs alone.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.sharding import PartitionSpec

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
    return jax.lax.with_sharding_constraint(x, rules.sharding(axes_lib.logical_axes(letters), shape=x.shape, mesh=mesh))


def unshard(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter as a layer uses it: gathered over `fsdp`, still split over `expert` and `tensor`. Its gradient is scattered back.

    Without this, the compiler is free to split the arithmetic over `fsdp` instead, and moves activations to do so.
    """
    mesh = _current()
    if mesh is None:
        return x
    kept = tuple(axis if "fsdp" not in rules.RULES.get(axis or "", ()) else None for axis in axes)
    return jax.lax.with_sharding_constraint(x, rules.parameter_sharding(kept, shape=x.shape, mesh=mesh))


def mesh_axis(letter: str) -> str | None:
    """The mesh axis that splits a logical axis, or None if it is whole. For axes that one mesh axis splits."""
    mesh = _current()
    if mesh is None:
        return None
    names = [name for name in rules.RULES.get(axes_lib.LETTERS[letter], ()) if mesh.shape[name] > 1]
    assert len(names) <= 1, (letter, names)
    return names[0] if names else None


def shard_local(function: Callable, *, inputs: tuple[str, ...], outputs: str) -> Callable:
    """Runs ``function`` on each device's shard (`jax.shard_map`), with shardings given in shape letters.

    Here every split axis must divide; the recipe's checks make sure of it.
    """
    mesh = _current()
    if mesh is None:
        return function

    def specs(letters: str) -> PartitionSpec:
        return rules.spec(axes_lib.logical_axes(letters), shape=None, mesh=mesh)

    return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs(i) for i in inputs), out_specs=specs(outputs), check_vma=False)
