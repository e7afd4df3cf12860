"""Sinkhorn normalisation of the mHC mixing matrices (V4 report eq. 3-8)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def doubly_stochastic(logits: Float[Array, "n n ..."], *, iterations: int, eps: float) -> Float[Array, "n n ..."]:
    """Row softmax plus ``eps``, one column normalisation, then ``iterations - 1`` times rows and columns.

    Rows and columns are the *first* two axes: sums over n = 4 neighbours in memory would waste the vector units, sums of n arrays
    over all tokens fill them. Every division adds ``eps``. The last step normalises columns, so column sums are 1 up to eps and row
    sums only nearly. fp32. The loop is a scan: unrolled, its 40 divisions a site would dominate the size of the compiled program.
    """

    def normalise(x: Array, axis: int) -> Array:
        return x / (jnp.sum(x, axis=axis, keepdims=True) + eps)

    first = normalise(jax.nn.softmax(logits.astype(jnp.float32), axis=1) + eps, 0)
    return jax.lax.scan(lambda x, _: (normalise(normalise(x, 1), 0), None), first, length=iterations - 1)[0]
