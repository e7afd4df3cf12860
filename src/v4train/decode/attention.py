"""Attention of new tokens to a cache: one softmax over window, entries and a sink, as `ops.sparse_attention` computes it for whole rows.

The work is cut into *items*: a few queries of one sequence (a chunk of a prompt's tokens, or the one token of a step), with the raw keys
that their windows
cover. An item's far part is one of two:

- **selected** (CSA): index scores of the keys that exist, the best `top_k` of them, and then only these rows of the main pool are
  gathered and
  read back from their format. Nothing else of it is touched;
- **dense** (HCA, CSA without an indexer, and CSA when speed is compared): all entries that exist, block after block, with a running
  softmax.

Both walk over the pages that the sequence *has*, in loops whose number of turns is data, so that a step costs what the sequence's length
asks for and
nothing for the length it might reach. Scores of an item are collected in blocks and merged with the best so far: they never exist for all
entries at
once. A tie goes to the earlier entry, as in training: the merge puts earlier entries first, and the sort is stable.

Items run one after the other (`jax.lax.map`) where a platform computes one thing at a time, because each then takes only its own turns;
on an accelerator they run together
(`jax.vmap`), and all take as many as the longest.

The rejected alternative for long sequences, scores for `max_length` entries under a mask, is one product and one sort, and makes a step
of a short sequence as slow as one of the longest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4train.decode import fetch, formats
from v4train.ops import select

_LOWEST = float(jnp.finfo(jnp.float32).min)
_PRODUCTS = 2**20  # of queries and keys, at a time
_BLOCK_PAGES = 16  # at a time, or as many as hold _BLOCK_ENTRIES: whoever has fewer pays for these
_BLOCK_ENTRIES = 128
_AHEAD = 64  # entries ranked below the selection that a step may bring along
_MERGE_ENTRIES = 8192  # scores collected before they are merged with the best so far; on a CPU _QUARTERS times as many
_QUARTERS = 4
_GROUP = 16  # scores of a group, of which the highest says whether they are looked at
_FEW = (128, 512)  # groups


class Pool(NamedTuple):
    """Entries or index keys of one layer: the stacked arrays, the layer's place in them, and how they are stored."""

    stored: formats.Stored  # [l, pages, entries of a page, ...]
    layer: Int[Array, ""]
    as_format: formats.Format
    ratio: int

    @property
    def per_page(self) -> int:
        return next(iter(self.stored.values())).shape[2]


class Index(NamedTuple):
    """What scores entries, and how many are selected."""

    query: Float[Array, "b t i j"]
    weight: Float[Array, "b t i"]
    keys: Pool
    top_k: int


class Item(NamedTuple):
    """A few queries of one sequence."""

    query: Float[Array, "c h k"]
    positions: Int[Array, "c"]
    real: Bool[Array, "c"]
    keys: Float[Array, "w+c k"]  # raw keys: of the tokens before the first query that its window covers, then of the queries
    pages: Int[Array, "p"]
    index_query: Float[Array, "c i j"] | None
    index_weight: Float[Array, "c i"] | None
    row: Int[Array, ""] | None = None  # of the call, for tiers


class _Softmax(NamedTuple):
    """A softmax in progress: the highest logit, the mass and the mixture, both relative to it."""

    top: Float[Array, "c h"]
    mass: Float[Array, "c h"]
    mixed: Float[Array, "c h k"]


def attend(
    query: Float[Array, "b t h k"],
    keys: Float[Array, "b w+t k"],
    sink: Float[Array, "h"],
    *,
    positions: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    pages: Int[Array, "b p"],
    chunk: int,
    entries: Pool | None = None,
    index: Index | None = None,
    tier: fetch.Tier | None = None,
) -> Float[Array, "b t h k"]:
    """Attention output of new tokens, fp32 inside, in the query's dtype.

    Args:
        query: rotated queries.
        keys: rotated raw keys: the ``w`` (the window less 1) tokens before the first query, then one for each query. What lies before the
            sequence's first
            position is ignored.
        sink: logit of each head.
        positions: of the queries, consecutive in each row.
        real: which queries count; the others' results are finite and meaningless.
        pages: page table of each row.
        chunk: queries of an item.
        entries: compressed entries, those that the queries' own tokens complete included; None for a window layer.
        index: selects entries; None attends all.
        tier: where selected entries come from, if not from the pool.
    """
    batch, length = positions.shape
    items = _items(query, keys, positions=positions, real=real, pages=pages, chunk=chunk, index=index)
    run = functools.partial(_attend_item, sink=sink, entries=entries, index=index, tier=tier)
    out = _each(run, items, together=tier is None)
    return out.reshape(batch, -1, *query.shape[2:])[:, :length]


def attend_hot(
    query: Float[Array, "b t h k"],
    keys: Float[Array, "b w+t k"],
    sink: Float[Array, "h"],
    *,
    positions: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    pages: Int[Array, "b p"],
    slots: Int[Array, "b"],
    chunk: int,
    entries: Pool,
    index: Index,
    tier: fetch.Tier,
) -> tuple[Float[Array, "b t h k"], formats.Stored]:
    """As `attend`, for the few tokens of a step: selected entries are brought to the hot buffers of all rows together.

    Args:
        entries: the hot buffers, ``[l, slots, hot entries, ...]``.

    Returns:
        The output, and the hot buffers.
    """
    batch, length = positions.shape
    assert length <= chunk, (length, chunk)
    items = _items(query, keys, positions=positions, real=real, pages=pages, chunk=chunk, index=index)

    def choose(item: Item) -> tuple[Array, Array]:
        visible = jnp.where(item.real, (item.positions + 1) // entries.ratio, 0)
        return select_entries(item, index, visible, more=_AHEAD)

    scores, numbers = _each(choose, items)
    seen, top_k = scores > _LOWEST, min(index.top_k, scores.shape[-1])
    spare = jnp.where(seen, numbers, -1)[..., top_k:].swapaxes(1, 2).reshape(batch, -1)  # all queries' next best, then those after
    scores, numbers, seen = scores[..., :top_k], numbers[..., :top_k], seen[..., :top_k]
    found, hot = tier.bring(entries.stored, entries.layer, slots, numbers.reshape(batch, -1), seen.reshape(batch, -1), spare)
    rows_ = {name: x.reshape(*numbers.shape, x.shape[-1]) for name, x in found.items()}

    def absorb(one: tuple[Item, Array, formats.Stored]) -> Array:
        item, seen, rows_ = one
        query = item.query * (item.query.shape[-1] ** -0.5)
        values = entries.as_format.decode(rows_, dtype=query.dtype)
        return _finish(_absorb(_window(query, item, sink), query, values, seen, "cnk"), item)

    return _each(absorb, (items, seen, rows_)), hot


def _items(query: Array, keys: Array, *, positions: Array, real: Array, pages: Array, chunk: int, index: Index | None) -> Item:
    batch, length = positions.shape
    chunk = min(chunk, length)
    halo = keys.shape[1] - length
    parts = -(-length // chunk)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, parts * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return padded.reshape(batch * parts, chunk, *x.shape[2:])

    padded = jnp.pad(keys, ((0, 0), (0, parts * chunk - length), (0, 0)))
    covered = jnp.stack([padded[:, i * chunk : i * chunk + halo + chunk] for i in range(parts)], axis=1)
    return Item(
        query=split(query),
        positions=split(positions),
        real=split(real),
        keys=covered.reshape(batch * parts, *covered.shape[2:]),
        pages=jnp.repeat(pages, parts, axis=0),
        index_query=None if index is None else split(index.query),
        index_weight=None if index is None else split(index.weight),
        row=jnp.repeat(jnp.arange(batch, dtype=jnp.int32), parts),
    )


def _each(run: Callable[[Any], Any], items: Any, *, together: bool = True) -> Any:
    if jax.tree.leaves(items)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], run(jax.tree.map(lambda x: x[0], items)))
    return jax.vmap(run)(items) if together and jax.default_backend() != "cpu" else jax.lax.map(run, items)


def _attend_item(item: Item, *, sink: Array, entries: Pool | None, index: Index | None, tier: fetch.Tier | None) -> Float[Array, "c h k"]:
    query = item.query * (item.query.shape[-1] ** -0.5)
    state = _window(query, item, sink)
    if entries is not None:
        visible = jnp.where(item.real, (item.positions + 1) // entries.ratio, 0)
        if index is None:
            state = _dense(state, query, item, entries, visible)
        else:
            scores, places = select_entries(item, index, visible)
            seen = scores > _LOWEST
            if tier is None:
                stored = rows(entries, item.pages, places)
            else:
                assert item.row is not None
                stored = tier.stream(item.row, places, seen)
            state = _absorb(state, query, entries.as_format.decode(stored, dtype=query.dtype), seen, "cnk")
    return _finish(state, item)


def _finish(state: _Softmax, item: Item) -> Float[Array, "c h k"]:
    return (state.mixed / state.mass[..., None]).astype(item.query.dtype)


def _window(query: Array, item: Item, sink: Array) -> _Softmax:
    size, covered = query.shape[0], item.keys.shape[0]
    halo = covered - size
    age = halo + jnp.arange(size)[:, None] - jnp.arange(covered)[None]  # a query's position less a key's
    near = (age >= 0) & (age <= halo) & (age <= item.positions[:, None])
    raw = jnp.einsum("chk,wk->chw", query, item.keys, preferred_element_type=jnp.float32)
    raw = jnp.where(near[:, None], raw, -jnp.inf)
    top = jnp.maximum(raw.max(axis=-1), sink[None])
    shares = jnp.exp(raw - top[..., None])
    mixed = jnp.einsum("chw,wk->chk", shares.astype(item.keys.dtype), item.keys, preferred_element_type=jnp.float32)
    return _Softmax(top, shares.sum(axis=-1) + jnp.exp(sink[None] - top), mixed)


def _absorb(state: _Softmax, query: Array, values: Array, seen: Bool[Array, "c n"], each: str) -> _Softmax:
    """Takes more entries into the softmax. ``each`` is ``nk`` or, if every query has its own, ``cnk``."""
    if each == "cnk" and values.shape[0] == 1:
        values, each = values[0], "nk"  # an axis of the batch has the values written down transposed
    raw = jnp.einsum(f"chk,{each}->chn", query, values, preferred_element_type=jnp.float32)
    raw = jnp.where(seen[:, None], raw, -jnp.inf)
    top = jnp.maximum(state.top, raw.max(axis=-1))
    shares, kept = jnp.exp(raw - top[..., None]), jnp.exp(state.top - top)
    mixed = jnp.einsum(f"chn,{each}->chk", shares.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return _Softmax(top, state.mass * kept + shares.sum(axis=-1), state.mixed * kept[..., None] + mixed)


def _dense(state: _Softmax, query: Array, item: Item, entries: Pool, visible: Int[Array, "c"]) -> _Softmax:
    walk = _Walk.of(entries, item.pages, queries=query.shape[0] * query.shape[1])

    def block(i: Array, state: _Softmax) -> _Softmax:
        seen = walk.numbers(i)[None] < visible[:, None]
        return _absorb(state, query, walk.read(i, dtype=query.dtype), seen, "nk")

    return jax.lax.fori_loop(0, walk.turns(visible.max()), block, state)


def select_entries(item: Item, index: Index, visible: Int[Array, "c"], *, more: int = 0) -> tuple[Float[Array, "c k"], Int[Array, "c k"]]:
    """Scores and numbers of each query's best visible entries, best first; where there are fewer than k, the lowest score fills up.

    Args:
        more: entries beyond the index's ``top_k``.
    """
    query, weight = item.index_query, item.index_weight
    assert query is not None
    assert weight is not None
    if select.implementation("top_k") != "earliest":
        raise ValueError("decoding selects the earlier of equal entries (top_k 'earliest'); there is no other implementation for pages")
    queries, heads = query.shape[:2]
    walk = _Walk.of(index.keys, item.pages, queries=queries * heads)
    together = max(1, min(_window_of_scores(), walk.most) // walk.block)
    turns = walk.turns(visible.max())
    top_k = min(index.top_k + more, walk.most)

    def merge(j: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        filled = jnp.minimum(together, turns - j * together)

        def score(i: Array, scores: Array) -> Array:
            number = j * together + i
            keys = walk.read(number, dtype=query.dtype)
            one = _index_scores(query, weight, keys)
            one = jnp.where(walk.numbers(number)[None] < visible[:, None], one, _LOWEST)
            return jax.lax.dynamic_update_slice_in_dim(scores, one, i * walk.block, 1, allow_negative_indices=False)

        none = jnp.full((queries, together * walk.block), _LOWEST, jnp.float32)
        scores = jax.lax.fori_loop(0, filled, score, none)
        return _best_of(best, scores, first=j * none.shape[1], filled=filled * walk.block)

    nothing = jnp.full((queries, top_k), _LOWEST, jnp.float32), jnp.zeros((queries, top_k), jnp.int32)
    return jax.lax.fori_loop(0, (turns + together - 1) // together, merge, nothing)


def _index_scores(query: Float[Array, "c i j"], weight: Float[Array, "c i"], keys: Float[Array, "n j"]) -> Float[Array, "c n"]:
    """As `ops.sparse_attention.index_scores`, without an axis of the batch, for which XLA's CPU backend writes the keys down transposed:
    that took longer than the product."""
    products = jnp.einsum("cij,nj->cin", query, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("ci,cin->cn", weight.astype(jnp.float32), jax.nn.relu(products))


def _window_of_scores() -> int:
    """Scores that are collected before they are merged. Rows that run together would take every branch of `_best_of`."""
    return _MERGE_ENTRIES * _QUARTERS if jax.default_backend() == "cpu" else _MERGE_ENTRIES


def _best_of(best: tuple[Array, Array], scores: Float[Array, "c n"], *, first: Array, filled: Array) -> tuple[Array, Array]:
    """The best so far, scores and numbers, with more scores merged in: those of the entries from ``first`` on, ``filled`` of them.

    Sorting all scores is what takes longest in a long prompt (7 ns a score here, 1 for the score itself), and few scores of a later window
    are among the best: those above the lowest of them. So scores are put into groups of `_GROUP`, whose members lie far apart so that
    maxima are found by whole vectors, and only groups whose maximum is above are sorted, if they are few. Groups are taken in the order
    of their numbers, and their members too, so that equal scores keep their order.
    """
    queries, size = scores.shape
    top_k, groups = best[0].shape[1], size // _GROUP

    def merged(scores: Array, numbers: Array) -> tuple[Array, Array]:
        scores, numbers = jnp.concatenate([best[0], scores], axis=1), jnp.concatenate([best[1], numbers], axis=1)
        highest, places = jax.lax.top_k(scores, top_k)
        return highest, jnp.take_along_axis(numbers, places, axis=1, mode="promise_in_bounds")

    def of_first(count: int) -> tuple[Array, Array]:
        numbers = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32)[None], (queries, count))
        return merged(scores[:, :count], numbers)

    def of_groups(count: int) -> tuple[Array, Array]:
        so_far = jnp.cumsum(higher, axis=1, dtype=jnp.int32)
        wanted = jnp.arange(1, count + 1, dtype=jnp.int32)
        chosen = jnp.minimum(jax.vmap(lambda row: jnp.searchsorted(row, wanted))(so_far), groups - 1)
        places = (jnp.arange(_GROUP, dtype=jnp.int32)[None, :, None] * groups + chosen[:, None]).reshape(queries, -1)
        found = jnp.take_along_axis(scores, places, axis=1, mode="promise_in_bounds").reshape(queries, _GROUP, count)
        there = (wanted[None] <= so_far[:, -1:])[:, None]
        return merged(jnp.where(there, found, _LOWEST).reshape(queries, -1), first + places)

    few = [count for count in _FEW if 2 * count <= groups]
    if size < _MERGE_ENTRIES * _QUARTERS or size % _GROUP or not few:
        return of_first(size)
    higher = scores.reshape(queries, _GROUP, groups).max(axis=1) > best[0][:, -1:]
    above = jnp.sum(higher, axis=1).max()
    branch = jnp.where(filled * _QUARTERS <= size, 1, 2 + jnp.sum(above > jnp.array(few)))
    branch = jnp.where(branch == 2 + len(few), 0, branch)
    ways = [functools.partial(of_first, size), functools.partial(of_first, size // _QUARTERS)]
    return jax.lax.switch(branch, ways + [functools.partial(of_groups, count) for count in few])


def rows(pool: Pool, pages: Int[Array, "p"], numbers: Int[Array, "c k"]) -> formats.Stored:
    """The stored entries of a sequence by their numbers, from wherever their pages lie."""
    page = jnp.maximum(pages.at[numbers // pool.per_page].get(mode="promise_in_bounds"), 0)
    return {name: array.at[pool.layer, page, numbers % pool.per_page].get(mode="promise_in_bounds") for name, array in pool.stored.items()}


def block_pages(per_page: int) -> int:
    """Most pages that are read at a time: a longer table of pages changes no result."""
    return max(_BLOCK_PAGES, _BLOCK_ENTRIES // per_page)


class _Walk(NamedTuple):
    """A sequence's entries in blocks of whole pages."""

    pool: Pool
    pages: Int[Array, "p"]  # padded to whole blocks
    pages_of_block: int

    @classmethod
    def of(cls, pool: Pool, pages: Array, *, queries: int) -> "_Walk":
        wanted = min(block_pages(pool.per_page), _PRODUCTS // (queries * pool.per_page))
        size = min(max(wanted, 1), pages.shape[0])
        return cls(pool, jnp.pad(pages, (0, -pages.shape[0] % size)), size)

    @property
    def block(self) -> int:
        """Entries of a block."""
        return self.pages_of_block * self.pool.per_page

    @property
    def most(self) -> int:
        """Entries of the longest sequence, in whole blocks."""
        return self.pages.shape[0] * self.pool.per_page

    def turns(self, visible: Array) -> Array:
        """Blocks that hold so many entries."""
        return (visible + self.block - 1) // self.block

    def numbers(self, i: Array) -> Int[Array, "n"]:
        return i * self.block + jnp.arange(self.block, dtype=jnp.int32)

    def read(self, i: Array, *, dtype: jnp.dtype) -> Float[Array, "n k"]:
        pages = jax.lax.dynamic_slice_in_dim(self.pages, i * self.pages_of_block, self.pages_of_block, allow_negative_indices=False)
        pool, pages = self.pool, jnp.maximum(pages, 0)
        stored = {name: array.at[pool.layer, pages].get(mode="promise_in_bounds") for name, array in pool.stored.items()}
        flat = {name: x.reshape(self.block, x.shape[-1]) for name, x in stored.items()}
        return pool.as_format.decode(flat, dtype=dtype)
