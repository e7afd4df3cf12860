"""V4 attention: one softmax over a window of raw tokens, compressed entries and a sink.

One function serves the three layer kinds and the three phases:

| layer          | entries | index | what a query attends besides its window                                   |
| window         | no      | no    | nothing                                                                   |
| HCA, dense CSA | yes     | no    | every visible entry                                                       |
| warm-up CSA    | yes     | yes   | every visible entry; the indexer is taught on all of them                 |
| sparse CSA     | yes     | yes   | the `top_k` visible entries with the highest index scores, and only those |

Layout: queries are taken in chunks of `chunk` tokens (a `lax.scan` whose body is recomputed in the backward pass), each with its own
slice of window keys, so memory grows linearly with S and no S x S array exists. In the sparse case the selected entries are gathered,
``[B, C, k, K]`` for a chunk; nothing else of the compressed cache is touched. The rejected alternative, dense attention under a top-k
mask, costs S^2 / m.

Inside a chunk logits are ``[B, C, H, keys]``: no product has to transpose, which makes programs smaller, and XLA's CPU backend cannot run
bf16 products whose fp32 result is transposed.

The indexer learns from a KL divergence alone (`Indexed.teach`): teacher is the attention itself, per head ``exp(logit) / (all mass incl.
window and sink)``, summed over heads, then normalised over the entries in question; student is the softmax of the index scores over the
same entries. No gradient flows through the teacher or through the selection.

The key is also the value, shared by all heads. The sink is a learned logit per head that takes mass and gives nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.ops import gather, select
from v4train.ops import top_k as top_k_lib

_LOWEST = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Entries(NamedTuple):
    """Compressed keys (= values) and where they end; see `ops.compress`."""

    values: Float[Array, "b n k"]
    end: Int[Array, "b n"]
    segment: Int[Array, "b n"]


class Index(NamedTuple):
    """What the lightning indexer scores entries with: ``score = sum_h weight_h * relu(query_h . key)``."""

    query: Float[Array, "b s i j"]
    weight: Float[Array, "b s i"]
    key: Float[Array, "b n j"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the index is used for.

    Attributes:
        top_k: entries a query attends; None attends all visible ones.
        teach: compute the indexer's loss.
    """

    top_k: int | None
    teach: bool


class Attended(NamedTuple):
    """``out`` is ``[B, S, H, K]`` in the query's dtype; the loss is summed over the queries of a row, those that see no entry give 0."""

    out: Float[Array, "b s h k"]
    indexer_loss: Float[Array, "b"]  # nats


class _Chunk(NamedTuple):
    """One chunk of queries with the raw tokens that its windows cover."""

    start: Int[Array, ""]
    query: Float[Array, "b c h k"]
    segment: Int[Array, "b c"]
    keys: Float[Array, "b w k"]
    key_segment: Int[Array, "b w"]
    index_query: Float[Array, "b c i j"] | None
    index_weight: Float[Array, "b c i"] | None


def attend(
    query: Float[Array, "b s h k"],
    kv: Float[Array, "b s k"],
    sink: Float[Array, "h"],
    *,
    segment_ids: Int[Array, "b s"],
    window: int,
    chunk: int,
    entries: Entries | None = None,
    index: Index | None = None,
    selection: Selection | None = None,
) -> Attended:
    """Causal attention inside documents (``segment_ids`` > 0; 0 is padding, whose rows come out zero).

    Args:
        window: raw tokens a query sees, itself included.
        chunk: queries computed at a time; a row shorter than that is one chunk.
        entries: compressed entries, or None for a window layer.
        index: needed if ``selection`` is given.
        selection: None attends all visible entries without an indexer.
    """
    batch, length = segment_ids.shape
    chunk = min(max(chunk, window), length)
    count = -(-length // chunk)
    halo = min(window - 1, chunk)
    if selection is not None and entries is not None and selection.top_k is not None and selection.top_k >= entries.end.shape[1]:
        selection = dataclasses.replace(selection, top_k=None)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def with_halo(x: Array) -> Array:
        if halo == 0:
            return x
        left = jnp.pad(x[:-1, :, -halo:], ((1, 0), (0, 0), (0, 0), *((0, 0),) * (x.ndim - 3)))
        return jnp.concatenate([left, x], axis=2)

    segments = split(segment_ids)
    chunks = _Chunk(
        start=jnp.arange(count, dtype=jnp.int32) * chunk,
        query=split(query),
        segment=segments,
        keys=with_halo(split(kv)),
        key_segment=with_halo(segments),
        index_query=None if index is None or selection is None else split(index.query),
        index_weight=None if index is None or selection is None else split(index.weight),
    )
    index_key = None if index is None or selection is None else index.key

    def body(sink: Array, entries: Entries | None, index_key: Array | None, chunk: _Chunk):
        return _attend_chunk(chunk, sink, window=window, entries=entries, index_key=index_key, selection=selection)

    if count == 1:
        only = body(sink, entries, index_key, jax.tree.map(lambda x: x[0], chunks))
        return Attended(only.out[:, :length], only.indexer_loss)
    remembered = jax.checkpoint(body)
    parts = jax.lax.map(lambda one: remembered(sink, entries, index_key, one), chunks)
    out = jnp.moveaxis(parts.out, 0, 1).reshape(batch, count * chunk, *query.shape[2:])[:, :length]
    return Attended(out, parts.indexer_loss.sum(axis=0))


def _attend_chunk(
    chunk: _Chunk, sink: Array, *, window: int, entries: Entries | None, index_key: Array | None, selection: Selection | None
) -> Attended:
    query = chunk.query * (chunk.query.shape[-1] ** -0.5)
    size, covered = chunk.segment.shape[1], chunk.key_segment.shape[1]
    ages = (jnp.arange(size)[:, None] + covered - size) - jnp.arange(covered)[None]  # query index minus key index
    near = (ages >= 0) & (ages < window)
    own = (chunk.segment[:, :, None] == chunk.key_segment[:, None]) & (chunk.segment > 0)[:, :, None] & near[None]
    raw = jnp.einsum("bchk,bwk->bchw", query, chunk.keys, preferred_element_type=jnp.float32)
    raw = jnp.where(own[:, :, None], raw, -jnp.inf)
    top = jnp.maximum(raw.max(axis=-1), sink[None, None])
    none = jnp.zeros(chunk.segment.shape[:1], jnp.float32)
    if entries is None:
        top = jax.lax.stop_gradient(top)
        mass = jnp.exp(raw - top[..., None])
        total = mass.sum(axis=-1) + jnp.exp(sink[None, None] - top)
        return Attended(_mix(mass / total[..., None], chunk.keys, query.dtype, "bchw,bwk->bchk"), none)

    seen = _visible(chunk, entries)
    scores, picked = None, None
    if selection is not None:
        assert index_key is not None, "a selection needs an index"
        assert chunk.index_query is not None
        assert chunk.index_weight is not None
        scores = index_scores(chunk.index_query, chunk.index_weight, index_key)
        if selection.top_k is not None:
            scores, picked = _select(scores, seen, selection.top_k)
            seen = jnp.take_along_axis(seen, picked, axis=-1, mode="promise_in_bounds")
    if picked is None:
        values, each = entries.values, "bnk"
    else:
        values, each = gather.take_rows(entries.values, picked), "bcnk"
    far = jnp.einsum(f"bchk,{each}->bchn", query, values, preferred_element_type=jnp.float32)
    far = jnp.where(seen[:, :, None], far, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(top, far.max(axis=-1)))
    near_mass, far_mass = jnp.exp(raw - top[..., None]), jnp.exp(far - top[..., None])
    total = near_mass.sum(axis=-1) + far_mass.sum(axis=-1) + jnp.exp(sink[None, None] - top)
    share = far_mass / total[..., None]
    out = _mix(near_mass / total[..., None], chunk.keys, jnp.float32, "bchw,bwk->bchk")
    out = out + _mix(share, values, jnp.float32, f"bchn,{each}->bchk")
    loss = none if scores is None or selection is None or not selection.teach else _indexer_loss(share, scores, seen)
    return Attended(out.astype(query.dtype), loss)


def _mix(share: Array, values: Array, dtype: jnp.dtype, equation: str) -> Array:
    return jnp.einsum(equation, share.astype(values.dtype), values, preferred_element_type=jnp.float32).astype(dtype)


def _visible(chunk: _Chunk, entries: Entries) -> Array:
    """[B, C, N]: of the query's document, and complete at the query."""
    here = chunk.start + jnp.arange(chunk.segment.shape[1], dtype=jnp.int32)
    return (
        (entries.end[:, None] <= here[None, :, None])
        & (entries.segment[:, None] == chunk.segment[:, :, None])
        & (chunk.segment > 0)[:, :, None]
    )


def index_scores(query: Float[Array, "b c i j"], weight: Float[Array, "b c i"], key: Float[Array, "b n j"]) -> Float[Array, "b c n"]:
    """fp32 scores of entries. The ReLU comes before the weights: without it half of the selection changes."""
    products = jnp.einsum("bcij,bnj->bcin", query, key, preferred_element_type=jnp.float32)
    return jnp.einsum("bci,bcin->bcn", weight.astype(jnp.float32), jax.nn.relu(products))


def _select(scores: Array, seen: Array, top_k: int) -> tuple[Array, Array]:
    """Scores and places ``[B, C, k]`` of the best visible entries; invisible ones fill up where there are fewer than k."""
    implementation = select.implementation("top_k")
    picked = top_k_lib.top_k(jnp.where(seen, scores, _LOWEST), k=top_k, implementation=implementation)
    return gather.take_elements(scores, picked), picked


def _indexer_loss(share: Array, scores: Array, seen: Array) -> Array:
    """KL(teacher || student) summed over the queries of each row."""
    teacher = jax.lax.stop_gradient(share.sum(axis=2))
    teacher = teacher / jnp.maximum(teacher.sum(axis=-1, keepdims=True), _TINY)
    student = jax.nn.log_softmax(jnp.where(seen, scores, _LOWEST), axis=-1)
    entry_loss = jnp.where(seen, teacher * (jnp.log(jnp.maximum(teacher, _TINY)) - student), 0.0)
    return entry_loss.sum(axis=(1, 2))
