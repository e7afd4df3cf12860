"""Routed experts for a few tokens: only the experts that are chosen are touched.

Training sends a batch through `ops.exchange` and a grouped product over *all* experts, whose cost follows the number of experts when
tokens are few: a step of one token would read 256 experts to use 6. Here (token, choice) pairs are sorted by expert and one loop walks
over them; a turn takes up to `_ROWS` pairs of one expert, so there are about as many turns as chosen experts, and no more rows than there
are tokens, because a token chooses an expert once. Matrices are read from the stacked parameters of all layers at (layer, expert): a scan
over layers that took a layer's experts as its input would copy all of them, used or not. Products, casts and their order are those of
training.

XLA's CPU backend multiplies whole arrays only, so that a matrix is copied out of the stack before its product. A large one is therefore
taken in slabs of rows, whose copy is still in the cache when it is multiplied, and the products of slabs are added in fp32: 78 ms of a
core instead of 171 for the eight experts of a layer of V4-Flash and 16 tokens; matrices that lie alone take 75. Accelerators take a matrix
at once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.model import moe as moe_lib
from v4train.model import router

_ROWS = 32
_SLAB = 2**20  # numbers


def routed(
    x: Float[Array, "b s d"], routing: router.Routing, weights: dict[str, Array], *, layer: Int[Array, ""], limit: float
) -> Float[Array, "b s d"]:
    """The weighted sum of each token's experts; padding gives 0.

    Args:
        weights: ``w1``, ``w3`` and ``w2`` of all layers of a run, ``[l, E, in, out]``.
        layer: the layer's place in them.
        limit: of the clamped SwiGLU.
    """
    tokens, top_k = x.reshape(-1, x.shape[-1]), routing.experts.shape[-1]
    experts = weights["w1"].shape[1]
    slot_expert = routing.experts.reshape(-1)
    order = jnp.argsort(slot_expert)
    size = min(_ROWS, len(tokens))
    # The last turn may begin less than a turn before the end.
    ids = jnp.pad(slot_expert[order], (0, size), constant_values=experts)
    rows = jnp.pad(tokens.at[order // top_k].get(mode="promise_in_bounds"), ((0, size), (0, 0)))
    used = jnp.sum(slot_expert < experts, dtype=jnp.int32)

    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        at, out = state
        here = jax.lax.dynamic_slice_in_dim(ids, at, size, allow_negative_indices=False)
        mine = here == here[0]
        times = functools.partial(_times, layer=layer, expert=here[0])
        block = jax.lax.dynamic_slice_in_dim(rows, at, size, allow_negative_indices=False)
        found = times(moe_lib.swiglu(times(block, weights["w1"]), times(block, weights["w3"]), limit=limit), weights["w2"])
        kept = jax.lax.dynamic_slice_in_dim(out, at, size, allow_negative_indices=False)
        out = jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], found, kept), at, 0, allow_negative_indices=False)
        return at + jnp.sum(mine, dtype=jnp.int32), out

    out = jax.lax.while_loop(lambda state: state[0] < used, turn, (jnp.zeros((), jnp.int32), jnp.zeros_like(rows)))[1]
    place = jnp.argsort(order).reshape(-1, top_k)
    slots = out.at[place].get(mode="promise_in_bounds").astype(jnp.float32)
    return jnp.sum(routing.weights.reshape(-1, top_k, 1) * slots, axis=1).astype(x.dtype).reshape(x.shape)


def _times(x: Float[Array, "r i"], stacked: Float[Array, "l e i o"], *, layer: Array, expert: Array) -> Float[Array, "r o"]:
    """The product with one matrix of the stack."""
    wide, out = stacked.shape[2:]
    parts = _parts(wide, out)
    size, zero = wide // parts, jnp.zeros((), jnp.int32)

    def slab(i: Array, total: Array) -> Array:
        matrix = jax.lax.dynamic_slice(stacked, (layer, expert, i * size, zero), (1, 1, size, out), allow_negative_indices=False)[0, 0]
        columns = jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1, allow_negative_indices=False)
        return total + jnp.einsum("rd,df->rf", columns, matrix, preferred_element_type=jnp.float32)

    nothing = jnp.zeros((len(x), out), jnp.float32)
    return (slab(zero, nothing) if parts == 1 else jax.lax.fori_loop(0, parts, slab, nothing)).astype(x.dtype)


def _parts(rows: int, columns: int) -> int:
    """Slabs of equal height, none larger than `_SLAB` unless it is one row."""
    if jax.default_backend() != "cpu":
        return 1
    least = min(-(-rows * columns // _SLAB), rows)
    return next(parts for parts in range(least, rows + 1) if rows % parts == 0)
