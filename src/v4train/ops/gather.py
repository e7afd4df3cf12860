"""Gathers whose gradient is not a scatter while the table is small.

The transpose of a gather is a scatter-add. XLA:CPU runs one as a loop over single rows, GPUs with atomics in no fixed order. While
the table has few rows (compressed entries of a short row, experts of a layer), a comparison with every row is one fused product,
faster and deterministic; above `LARGEST_TABLE` rows it would cost more than it saves, and the scatter is used.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST_TABLE = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(x: Array, at: Array, rows: int) -> Array:
    return jax.vmap(lambda table, place: table.at[place].get(mode="promise_in_bounds"))(x, at)


def _take_rows_forward(x: Array, at: Array, rows: int) -> tuple[Array, Array]:
    return _take_rows(x, at, rows), at


def _take_rows_backward(rows: int, at: Array, gradient: Array) -> tuple[Array, None]:
    hot = jax.nn.one_hot(at, rows, dtype=gradient.dtype)
    summed = jnp.einsum("bckn,bckd->bnd", hot, gradient, preferred_element_type=jnp.float32)
    return summed.astype(gradient.dtype), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def take_rows(x: Float[Array, "b n d"], at: Int[Array, "b c k"]) -> Float[Array, "b c k d"]:
    """``x[b, at[b, c, k]]``; indices must be in bounds."""
    if x.shape[1] <= LARGEST_TABLE:
        return _take_rows(x, at, x.shape[1])
    return jax.vmap(lambda table, place: table.at[place].get(mode="promise_in_bounds"))(x, at)


def take_elements(x: Float[Array, "... n"], at: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """``x[..., at]``; indices must be in bounds."""
    if x.shape[-1] <= LARGEST_TABLE:
        hot = at[..., None] == jnp.expand_dims(jnp.arange(x.shape[-1]), range(at.ndim))
        return jnp.sum(jnp.where(hot, x[..., None, :], 0), axis=-1)
    return jnp.take_along_axis(x, at, axis=-1, mode="promise_in_bounds")
