"""Parallelism as a table: which mesh axes split which logical axis.

A parameter and an activation may name the same logical axis ("embed"). Within one array every mesh axis is used once, by the first logical
axis that asks for it: an activation ``batch sequence embed`` spends `fsdp` on the batch and leaves "embed" whole, a parameter ``embed ffn``
splits "embed" over `fsdp`. A dimension that its mesh axes do not divide stays whole: tables of 4 rows on 8 devices are replicated.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp", "expert"),
    "sequence": ("context",),
    "tokens": ("replica", "fsdp", "expert", "context"),
    "experts": ("expert",),
    "embed": ("fsdp",),
    "rank": ("fsdp",),  # without it 63% of attention (query up-projection, grouped output) would be whole on every device
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "matrices": ("replica", "fsdp", "expert", "context", "tensor"),
}


SMALLEST_SPLIT = 2**14
"""Elements of one layer below which a parameter is not split."""


def spec(axes: tuple[str | None, ...], *, shape: tuple[int, ...] | None, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The partition of an array with these logical axes; with a shape, only dimensions that divide are split."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for i, axis in enumerate(axes):
        wanted = [name for name in RULES.get(axis or "", ()) if name not in used and mesh.shape[name] > 1]
        if shape is not None and shape[i] % math.prod(mesh.shape[name] for name in wanted):
            wanted = []
        used.update(wanted)
        parts.append(tuple(wanted) or None)
    return PartitionSpec(*parts)


def sharding(axes: tuple[str | None, ...], *, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Like `spec`, bound to the mesh."""
    return NamedSharding(mesh, spec(axes, shape=shape, mesh=mesh))


def parameter_sharding(axes: tuple[str | None, ...], *, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a parameter lives. Small ones stay whole on every device: gathering a norm's weight costs more than keeping it."""
    size = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis != "layers")
    if size < SMALLEST_SPLIT and "experts" not in axes:
        return NamedSharding(mesh, PartitionSpec())
    return sharding(axes, shape=shape, mesh=mesh)
