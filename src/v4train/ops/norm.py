"""Normalisation. Statistics are always fp32; the result has the input's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, "d"] | None = None, *, eps: float) -> Float[Array, "... d"]:
    """``x / sqrt(mean(x^2) + eps)``, times a learned weight if one is given."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return y.astype(x.dtype)


def layer_norm(x: Float[Array, "... d"], *, eps: float) -> Float[Array, "... d"]:
    """Zero mean and unit variance over the last axis, no learned weight."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return rms_norm(y, eps=eps).astype(x.dtype)
