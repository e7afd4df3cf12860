"""The oracle of `ops.sparse_attention`: the same attention with S x S and S x N masks, nothing chunked, nothing gathered."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4train.ops import sparse_attention


def visible_entries(segment_ids: Int[Array, "b s"], entries: sparse_attention.Entries) -> Bool[Array, "b s n"]:
    """Which entries each query may see: of its own document, ending at or before it."""
    here = jnp.arange(segment_ids.shape[1])[None, :, None]
    same = (entries.segment[:, None] == segment_ids[:, :, None]) & (segment_ids > 0)[:, :, None]
    return same & (entries.end[:, None] <= here)


def select(scores: Float[Array, "b s n"], seen: Bool[Array, "b s n"], *, top_k: int) -> Bool[Array, "b s n"]:
    """The ``top_k`` visible entries of highest score as a mask (ties: the earlier entry)."""
    order = jnp.argsort(jnp.where(seen, -scores, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return seen & (rank < top_k)


def index_scores(index: sparse_attention.Index) -> Float[Array, "b s n"]:
    """``sum_h weight_h relu(query_h . key)``."""
    return jnp.einsum("bsi,bsin->bsn", index.weight, jax.nn.relu(jnp.einsum("bsij,bnj->bsin", index.query, index.key)))


def dense_attention(
    query: Float[Array, "b s h k"],
    kv: Float[Array, "b s k"],
    sink: Float[Array, "h"],
    *,
    segment_ids: Int[Array, "b s"],
    window: int,
    entries: sparse_attention.Entries | None = None,
    attended: Bool[Array, "b s n"] | None = None,
) -> tuple[Float[Array, "b s h k"], Float[Array, "b h s n"] | None]:
    """Attention output, and each entry's probability (None without entries). ``attended`` masks entries; None takes all visible ones."""
    length = query.shape[1]
    age = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    near = ((age >= 0) & (age < window))[None] & (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids > 0)[:, :, None]
    keys, mask = kv, near
    if entries is not None:
        attended = visible_entries(segment_ids, entries) if attended is None else attended
        keys, mask = jnp.concatenate([kv, entries.values], axis=1), jnp.concatenate([near, attended], axis=-1)
    scores = jnp.einsum("bshk,bnk->bhsn", query, keys) * query.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sink[None, :, None, None], (*scores.shape[:3], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhsn,bnk->bshk", shares, keys), None if entries is None else shares[..., length:]
