"""Clipping by the global norm, apart from the optimizer: the train step reports the norm and skips a step whose norm is not finite.

The norm is that of the whole gradient, summed in fp32 over all leaves and, since arrays are global, over all devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Clipped(NamedTuple):
    """Gradients of norm at most the given one, and the norm they had before."""

    gradients: dict
    norm: Float[Array, ""]


def global_norm(tree: dict) -> Float[Array, ""]:
    """The root of the sum of the squares of all elements, in fp32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm(gradients: dict, max_norm: float | None) -> Clipped:
    """Scales all gradients by one factor so that their global norm is at most ``max_norm`` (None: measures only).

    Gradients within the norm come back bit for bit. So do those whose norm is NaN; an infinite norm gives zeros and NaNs: the
    caller looks at the norm before it uses either.
    """
    norm = global_norm(gradients)
    if max_norm is None:
        return Clipped(gradients, norm)
    factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return Clipped(jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients), norm)
