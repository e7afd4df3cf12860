"""Sums in bf16 that are right on average.

bf16 has 8 significant bits: once a sum is 256 times an addend, rounding to nearest drops the addend, each time, and the sum stands still.
Rounded up with a probability of just the part that does not fit, the expectation of every rounding is the value, and so is that of the
sum. Its error grows like the square root of the number of additions, not like the number.

The lower 16 bits of an fp32 are what bf16 lacks. Adding a uniform number of 16 bits carries into the upper half with probability
``lower / 2^16``, exactly; then the lower half is cut off. The numbers follow from a key, hence from seed, step and microbatch, and with
JAX's partitionable generator not from the mesh.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

Tree = TypeVar("Tree")


def round_up_or_down(x: Float[Array, "..."], bits: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """fp32 -> bf16, to one of the two neighbours, by random ``bits``. Infinities and NaN stay what they are."""
    whole = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) + bits.astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def add(total: Tree, x: Tree, *, key: Array) -> Tree:
    """``total + x`` for trees: bf16 ``total``, ``x`` of any float dtype; added in fp32, rounded up or down at random."""
    leaves, structure = jax.tree.flatten(total)
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]

    def one(a: Array, b: Array, key: Array) -> Array:
        return round_up_or_down(a.astype(jnp.float32) + b.astype(jnp.float32), jax.random.bits(key, a.shape, jnp.uint16))

    return jax.tree.unflatten(structure, map(one, leaves, structure.flatten_up_to(x), keys))
