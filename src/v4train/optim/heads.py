"""A matrix of several heads as one matrix a head: ``[..., n, heads * m]`` <-> ``[..., heads, n, m]``.

V4.1 orthogonalises queries head by head: a head whose gradients are large no longer decides for all heads what a step is, and the
matrices are smaller, 64 of 1024 x 512 in place of one of 1024 x 32768 in V4-Flash (62 % of the arithmetic). Heads then stack like
layers and experts (`stacking`).

The view costs no exchange if the devices that split the columns hold whole heads, or equal parts of one head (`spec`). Otherwise, as with 6
heads on 4 devices, heads and devices do not match, the columns are gathered, and the devices share the heads like copies.
"""

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from v4train.sharding import rules


def split(x: Float[Array, "... n hm"], heads: int) -> Float[Array, "... h n m"]:
    """One matrix for each head; for one head the array as it is."""
    if heads == 1:
        return x
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def join(x: Float[Array, "... h n m"], heads: int) -> Float[Array, "... n hm"]:
    """The way back."""
    if heads == 1:
        return x
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)


def spec(stored: PartitionSpec, *, dimensions: int, heads: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """The partition of the view, of an array of so many dimensions that is stored as ``stored``."""
    if heads == 1:
        return stored
    *lead, rows, columns = (*stored, *(None,) * (dimensions - len(stored)))
    over, rest = _whole(rules.names(columns), heads=heads, sizes=mesh.shape)
    return PartitionSpec(*lead, over or None, rows, rest or None)


def _whole(names: Sequence[str], *, heads: int, sizes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split the heads, and those that split inside a head. Neither, if some device has a head and a part of another."""
    for i, name in enumerate(names):
        if heads % sizes[name]:
            return tuple(names[:i]), tuple(names[i:]) if heads == 1 else ()
        heads //= sizes[name]
    return tuple(names), ()
