"""Adam's direction for one parameter (decay and learning rate are the hybrid's).

``eps`` is 1e-20 in DeepSeek-V4: as good as none, but a gradient that has always been zero (an embedding row of a token not yet met)
still gives 0 / 1e-20 = 0. It is added after the root: its square is no fp32 number, so inside the root it would vanish.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.optim.config import AdamWConfig


class Moved(NamedTuple):
    """A direction and the moments it was made of, all fp32 of the parameter's shape."""

    direction: Float[Array, "..."]
    mu: Float[Array, "..."]
    nu: Float[Array, "..."]


def move(
    gradient: Float[Array, "..."], *, mu: Float[Array, "..."], nu: Float[Array, "..."], count: Int[Array, ""], config: AdamWConfig
) -> Moved:
    """One step of Adam. ``count`` is the number of updates before this one, for the bias corrections."""
    gradient = gradient.astype(jnp.float32)
    mu = config.b1 * mu + (1 - config.b1) * gradient
    nu = config.b2 * nu + (1 - config.b2) * jnp.square(gradient)
    done = (count + 1).astype(jnp.float32)
    mean = mu / (1 - config.b1**done)
    square = nu / (1 - config.b2**done)
    return Moved(mean / (jnp.sqrt(square) + config.eps), mu, nu)
