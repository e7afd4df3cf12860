"""Next-token cross-entropy without an array of all logits.

At V = 129,280 and S = 1M the logits would be 517 GB in fp32. They are computed, used and forgotten for one chunk of tokens at a time; the
backward pass computes them again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def logits(hidden: Float[Array, "... d"], head: Float[Array, "d v"], *, allowed: Bool[Array, "v"] | None = None) -> Float[Array, "... v"]:
    """fp32 logits; ids that are not ``allowed`` get the lowest finite value."""
    out = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
    if allowed is None:
        return out
    return jnp.where(jnp.expand_dims(allowed, range(out.ndim - 1)), out, jnp.finfo(jnp.float32).min)


def cross_entropy(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b s"],
    *,
    allowed: Bool[Array, "v"] | None = None,
    chunk: int = 2048,
) -> Float[Array, "b s"]:
    """Nats per token, fp32, computed ``chunk`` positions of all rows at a time."""

    def nats(hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, head, allowed=allowed)
        ids = jnp.arange(scores.shape[-1], dtype=targets.dtype)
        chosen = jnp.sum(jnp.where(ids[None, None] == targets[..., None], scores, 0), axis=-1)  # its gradient needs no scatter
        return jax.nn.logsumexp(scores, axis=-1) - chosen

    length = targets.shape[1]
    if length <= chunk:
        return jax.checkpoint(nats)(hidden, targets)
    chunks = -(-length // chunk)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda xs: jax.checkpoint(nats)(*xs), (split(hidden), split(targets)))
    return jnp.moveaxis(out, 0, 1).reshape(targets.shape[0], chunks * chunk)[:, :length]
