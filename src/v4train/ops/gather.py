"""Gathers of rows and elements that say how their gradient is summed.

The transpose of a gather is a scatter-add. GPUs run one with atomics in no fixed order, TPUs by sorting. While the table has few rows
(compressed entries of a short row, experts of a layer), a comparison with every row is one product, deterministic and faster there; above
`LARGEST_TABLE` rows it would cost more than it saves. A CPU adds row after row: at 512 rows and 256 picks of 64 features that takes a
fortieth of the product's time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.ops import select

LARGEST_TABLE = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take_rows(x: Array, at: Array, rows: int, compared: bool) -> Array:
    return jax.vmap(lambda table, place: table.at[place].get(mode="promise_in_bounds"))(x, at)


def _take_rows_forward(x: Array, at: Array, rows: int, compared: bool) -> tuple[Array, Array]:
    return _take_rows(x, at, rows, compared), at


def _take_rows_backward(rows: int, compared: bool, at: Array, gradient: Array) -> tuple[Array, None]:
    """Sums in fp32, whatever the dtype."""
    if compared:
        hot = jax.nn.one_hot(at, rows, dtype=gradient.dtype)
        summed = jnp.einsum("bckn,bckd->bnd", hot, gradient, preferred_element_type=jnp.float32)
    else:
        nothing = jnp.zeros((rows, gradient.shape[-1]), jnp.float32)
        add = jax.vmap(lambda place, part: nothing.at[place].add(part, mode="promise_in_bounds"))
        summed = add(at, gradient.astype(jnp.float32))
    return summed.astype(gradient.dtype), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def take_rows(x: Float[Array, "b n d"], at: Int[Array, "b c k"]) -> Float[Array, "b c k d"]:
    """``x[b, at[b, c, k]]``; indices must be in bounds."""
    compared = x.shape[1] <= LARGEST_TABLE and select.implementation("summed_rows") == "compared"
    return _take_rows(x, at, x.shape[1], compared)


def take_elements(x: Float[Array, "... n"], at: Int[Array, "... k"]) -> Float[Array, "... k"]:
    """``x[..., at]``; indices must be in bounds."""
    if x.shape[-1] <= LARGEST_TABLE:
        hot = at[..., None] == jnp.expand_dims(jnp.arange(x.shape[-1]), range(at.ndim))
        return jnp.sum(jnp.where(hot, x[..., None, :], 0), axis=-1)
    return jnp.take_along_axis(x, at, axis=-1, mode="promise_in_bounds")
