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

The selection is the one part whose time grows with S^2. It has no derivative, so it looks at `BLOCK` entries at a time, keeps the best k so
far, passes over blocks in which a chunk sees nothing (the future, other documents), and is kept for the backward pass (k numbers a
query) instead of being made again. The loss that teaches the indexer scores the selected entries once more, with a derivative.

Where rows are split over devices (``axis_name``, see `ops.context_parallel`), queries and raw keys are a shard's own, the first window
reaches into the left neighbour, and entries and index keys are gathered.

Inside a chunk logits are ``[B, C, H, keys]``: no product has to transpose, which makes programs smaller, and XLA's CPU backend cannot run
bf16 products whose fp32 result is transposed.

The indexer learns from a KL divergence alone (`Indexed.teach`): teacher is the attention itself, per head ``exp(logit) / (all mass incl.
window and sink)``, summed over heads, then normalised over the entries in question; student is the softmax of the index scores over the
same entries. No gradient flows through the teacher or through the selection. How well it has learned shows in its *recall*
(`Selection.recall_at`): the share of the teacher's probability that lies in the k entries that it scores highest. The most that any choice
of k entries could have stands beside it: what is missing there is no fault of the indexer. Where all visible entries are attended the
teacher is over all of them, so it can be said; once only the selected ones are, it cannot, for the rest is not computed.

The key is also the value, shared by all heads. The sink is a learned logit per head that takes mass and gives nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from v4train.ops import context_parallel, gather, select
from v4train.ops import top_k as top_k_lib

BLOCK = 8192
"""Entries whose index scores exist at a time."""

_LOWEST = float(jnp.finfo(jnp.float32).min)
_PICKED = "picked entries"
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Entries(NamedTuple):
    """Compressed keys (= values) and where they end; see `ops.compress`. If rows are split, values are a shard's, the rest is of all."""

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
        recall_at: entries that the indexer would pick, to measure its recall while all are attended; None: do not.
    """

    top_k: int | None
    teach: bool
    recall_at: int | None = None


class Attended(NamedTuple):
    """``out`` is ``[B, S, H, K]`` in the query's dtype; the loss is summed over the queries of a row, those that see no entry give 0. The
    recall, and the most that it could be, are summed over the queries that see more than ``recall_at`` entries, beside their number; None
    if they were not asked for."""

    out: Float[Array, "b s h k"]
    indexer_loss: Float[Array, "b"]  # nats
    recall: Float[Array, "b 3"] | None = None


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
    axis_name: str | None = None,
    heads_axis: str | None = None,
) -> Attended:
    """Causal attention inside documents (``segment_ids`` > 0; 0 is padding, whose rows come out zero).

    Args:
        window: raw tokens a query sees, itself included.
        chunk: queries computed at a time; a row shorter than that is one chunk.
        entries: compressed entries, or None for a window layer.
        index: needed if ``selection`` is given.
        selection: None attends all visible entries without an indexer.
        axis_name: mesh axis that splits rows (inside `jax.shard_map`). The loss is then that of this shard's queries.
        heads_axis: mesh axis that splits heads; the indexer's teacher is the sum over all of them.
    """
    batch, length = segment_ids.shape
    devices = context_parallel.size(axis_name)
    chunk = min(max(chunk, window), length)
    count = -(-length // chunk)
    halo = min(window - 1, max(chunk, (devices - 1) * length))
    first = context_parallel.first_token(length, axis_name=axis_name)
    if entries is not None:
        entries = entries._replace(values=context_parallel.gather(entries.values, axis_name=axis_name))
        if selection is not None and selection.top_k is not None and selection.top_k >= entries.end.shape[1]:
            selection = dataclasses.replace(selection, top_k=None)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def with_halo(x: Array) -> Array:
        parts, before = split(x), context_parallel.left(x, tokens=halo, axis_name=axis_name)[None]
        return jnp.concatenate([jnp.concatenate([before, parts[:-1, :, chunk - halo :]]) if count > 1 else before, parts], axis=2)

    indexed = index if selection is not None else None
    chunks = _Chunk(
        start=first + jnp.arange(count, dtype=jnp.int32) * chunk,
        query=split(query),
        segment=split(segment_ids),
        keys=with_halo(kv),
        key_segment=with_halo(segment_ids),
        index_query=None if indexed is None else split(indexed.query),
        index_weight=None if indexed is None else split(indexed.weight),
    )
    index_key = None if indexed is None else context_parallel.gather(indexed.key, axis_name=axis_name)

    def body(sink: Array, entries: Entries | None, index_key: Array | None, chunk: _Chunk):
        return _attend_chunk(chunk, sink, window=window, entries=entries, index_key=index_key, selection=selection, heads_axis=heads_axis)

    if count == 1:
        only = body(sink, entries, index_key, jax.tree.map(lambda x: x[0], chunks))
        return only._replace(out=only.out[:, :length])
    remembered = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(_PICKED))
    parts = jax.lax.map(lambda one: remembered(sink, entries, index_key, one), chunks)
    out = jnp.moveaxis(parts.out, 0, 1).reshape(batch, count * chunk, *query.shape[2:])[:, :length]
    return Attended(out, *jax.tree.map(lambda x: x.sum(axis=0), parts[1:]))


def _attend_chunk(
    chunk: _Chunk,
    sink: Array,
    *,
    window: int,
    entries: Entries | None,
    index_key: Array | None,
    selection: Selection | None,
    heads_axis: str | None,
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

    found = _attended_entries(chunk, entries, index_key, selection)
    values, seen, each = found.values, found.seen, "bnk" if found.values.ndim == 3 else "bcnk"
    far = jnp.einsum(f"bchk,{each}->bchn", query, values, preferred_element_type=jnp.float32)
    far = jnp.where(seen[:, :, None], far, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(top, far.max(axis=-1)))
    near_mass, far_mass = jnp.exp(raw - top[..., None]), jnp.exp(far - top[..., None])
    total = near_mass.sum(axis=-1) + far_mass.sum(axis=-1) + jnp.exp(sink[None, None] - top)
    share = far_mass / total[..., None]
    out = _mix(near_mass / total[..., None], chunk.keys, jnp.float32, "bchw,bwk->bchk")
    out = out + _mix(share, values, jnp.float32, f"bchn,{each}->bchk")
    if found.scores is None:
        return Attended(out.astype(query.dtype), none)
    teacher = _teacher(share, heads_axis)
    recall = None
    if selection is not None and selection.recall_at is not None:
        recall = _recall(teacher, jax.lax.stop_gradient(found.scores), seen, top_k=selection.recall_at)
    return Attended(out.astype(query.dtype), _indexer_loss(teacher, found.scores, seen), recall)


class _Attended(NamedTuple):
    """The entries that a chunk attends: all ``[B, N, K]``, or selected ones for each query ``[B, C, k, K]``."""

    values: Array
    seen: Array  # [B, C, N or k]
    scores: Array | None  # likewise, of the indexer, if it is taught


def _attended_entries(chunk: _Chunk, entries: Entries, index_key: Array | None, selection: Selection | None) -> _Attended:
    if selection is None:
        return _Attended(entries.values, _visible(chunk, entries.end, entries.segment), None)
    assert index_key is not None, "a selection needs an index"
    assert chunk.index_query is not None
    assert chunk.index_weight is not None
    if selection.top_k is None:
        scores = index_scores(chunk.index_query, chunk.index_weight, index_key) if selection.teach else None
        return _Attended(entries.values, _visible(chunk, entries.end, entries.segment), scores)
    still = jax.lax.stop_gradient((chunk.index_query, chunk.index_weight, index_key))
    picked = ad_checkpoint.checkpoint_name(_select(chunk, *still, entries.end, entries.segment, selection.top_k), _PICKED)
    seen, picked = picked >= 0, jnp.maximum(picked, 0)
    scores = _scores_of_picked(chunk.index_query, chunk.index_weight, gather.take_rows(index_key, picked)) if selection.teach else None
    return _Attended(gather.take_rows(entries.values, picked), seen, scores)


def _mix(share: Array, values: Array, dtype: jnp.dtype, equation: str) -> Array:
    return jnp.einsum(equation, share.astype(values.dtype), values, preferred_element_type=jnp.float32).astype(dtype)


def _visible(chunk: _Chunk, end: Array, segment: Array) -> Array:
    """[B, C, N]: of the query's document, and complete at the query."""
    here = chunk.start + jnp.arange(chunk.segment.shape[1], dtype=jnp.int32)
    return (end[:, None] <= here[None, :, None]) & (segment[:, None] == chunk.segment[:, :, None]) & (chunk.segment > 0)[:, :, None]


def index_scores(query: Float[Array, "b c i j"], weight: Float[Array, "b c i"], key: Float[Array, "b n j"]) -> Float[Array, "b c n"]:
    """fp32 scores of entries. The ReLU comes before the weights: without it half of the selection changes."""
    products = jnp.einsum("bcij,bnj->bcin", query, key, preferred_element_type=jnp.float32)
    return jnp.einsum("bci,bcin->bcn", weight.astype(jnp.float32), jax.nn.relu(products))


def _scores_of_picked(query: Float[Array, "b c i j"], weight: Float[Array, "b c i"], key: Float[Array, "b c n j"]) -> Float[Array, "b c n"]:
    """`index_scores`, where every query has entries of its own."""
    products = jnp.einsum("bcij,bcnj->bcin", query, key, preferred_element_type=jnp.float32)
    return jnp.einsum("bci,bcin->bcn", weight.astype(jnp.float32), jax.nn.relu(products))


def _select(chunk: _Chunk, query: Array, weight: Array, key: Array, end: Array, segment: Array, top_k: int) -> Array:
    """Places ``[B, C, k]`` of the best visible entries; -1 fills up where there are fewer than k."""
    implementation, count = select.implementation("top_k"), end.shape[1]
    if implementation != "earliest" or count <= BLOCK:
        seen = _visible(chunk, end, segment)
        picked = top_k_lib.top_k(jnp.where(seen, index_scores(query, weight, key), _LOWEST), k=top_k, implementation=implementation)
        return jnp.where(jnp.take_along_axis(seen, picked, axis=-1, mode="promise_in_bounds"), picked, -1)
    size = BLOCK
    end, segment, key = (jnp.pad(x, ((0, 0), (0, -count % size), *((0, 0),) * (x.ndim - 2))) for x in (end, segment, key))

    def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        here = [jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (key, end, segment)]
        scores = jnp.where(_visible(chunk, here[1], here[2]), index_scores(query, weight, here[0]), -jnp.inf)
        places = jnp.broadcast_to(i * size + jnp.arange(size, dtype=jnp.int32), scores.shape)
        # The earlier entries come first, so that they win where scores are equal.
        scores, places = (jnp.concatenate(pair, axis=-1) for pair in zip(best, (scores, places), strict=True))
        scores, picked = jax.lax.top_k(scores, top_k)
        return scores, jnp.take_along_axis(places, picked, axis=-1, mode="promise_in_bounds")

    start, stop = _blocks_with_visible(chunk, end, segment, size)
    nothing = jnp.full((*chunk.segment.shape, top_k), -jnp.inf), jnp.zeros((*chunk.segment.shape, top_k), jnp.int32)
    scores, picked = jax.lax.fori_loop(start, stop, better, nothing)
    return jnp.where(scores != -jnp.inf, picked, -1)


def _blocks_with_visible(chunk: _Chunk, end: Array, segment: Array, size: int) -> tuple[Array, Array]:
    """First and last + 1 of the blocks in which a query of the chunk may see something."""
    real = chunk.segment > 0
    lowest = jnp.where(real, chunk.segment, jnp.iinfo(jnp.int32).max).min(axis=1, keepdims=True)
    highest = chunk.segment.max(axis=1, keepdims=True)
    last = chunk.start + chunk.segment.shape[1] - 1
    useful = ((end <= last) & (segment >= lowest) & (segment <= highest) & (segment > 0)).any(axis=0)
    place = jnp.arange(len(useful), dtype=jnp.int32)
    start = jnp.min(jnp.where(useful, place, len(useful))) // size
    return start, -(-jnp.max(jnp.where(useful, place + 1, 0)) // size)


def _teacher(share: Array, heads_axis: str | None) -> Array:
    """``[B, C, N]``: each entry's part of a query's probability, all heads together; sums to 1 over the entries that it sees."""
    teacher = jax.lax.stop_gradient(share.sum(axis=2))
    if heads_axis is not None:
        teacher = jax.lax.psum(teacher, heads_axis)
    return teacher / jnp.maximum(teacher.sum(axis=-1, keepdims=True), _TINY)


def _recall(teacher: Array, scores: Array, seen: Array, *, top_k: int) -> Array:
    """``[B, 3]``: the teacher's part in the ``top_k`` visible entries of highest score, and in its own ``top_k`` largest, summed over the
    queries that see more than so many, and the number of these."""
    rows, _, entries = scores.shape
    if entries <= top_k:
        return jnp.zeros((rows, 3), jnp.float32)
    picked = top_k_lib.top_k(jnp.where(seen, scores, _LOWEST), k=top_k, implementation=select.implementation("top_k"))
    found = jnp.take_along_axis(teacher, picked, axis=-1, mode="promise_in_bounds").sum(axis=-1)
    most = jax.lax.top_k(teacher, top_k)[0].sum(axis=-1)
    counts = (seen.sum(axis=-1) > top_k).astype(jnp.float32)
    return jnp.stack([(found * counts).sum(axis=1), (most * counts).sum(axis=1), counts.sum(axis=1)], axis=-1)


def _indexer_loss(teacher: Array, scores: Array, seen: Array) -> Array:
    """KL(teacher || student) summed over the queries of each row."""
    student = jax.nn.log_softmax(jnp.where(seen, scores, _LOWEST), axis=-1)
    entry_loss = jnp.where(seen, teacher * (jnp.log(jnp.maximum(teacher, _TINY)) - student), 0.0)
    return entry_loss.sum(axis=(1, 2))
