"""One forward pass for prefill, steps and drafts: new tokens of some sequences, given the cache of their past.

The layers are those of `model`, bound to the same parameters. Only what training does for whole rows is done otherwise here: attention
looks into the cache
(`decode.attention`), compressors continue from their tails (`decode.blocks`), and experts are read one by one (`decode.experts`).

Runs of equal layers are scanned as in training. The caches are carried through the scan and updated at the layer's place, never taken
apart: what is carried
and only written at a place is updated in the memory it has.
"""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v4train.core import param, tree
from v4train.decode import attention, blocks, experts, fetch, formats, rings
from v4train.decode import cache as cache_lib
from v4train.model import block as block_lib
from v4train.model import context as context_lib
from v4train.model import hyper_connections, transformer
from v4train.model.attention import compressed_sparse, heavily_compressed, projections, window
from v4train.ops import norm, products, select, sparse_attention


class Passed(NamedTuple):
    """What all layers give.

    Attributes:
        streams: after the last one.
        cache: with the new tokens in it; its lengths are as they were.
        fresh: with tiers, the entries ``[l, b, n, ...]`` that the tokens complete, for each place that selects; see `Layout.host_layers`.
    """

    streams: Float[Array, "b t n d"]
    cache: cache_lib.Cache
    fresh: list[formats.Stored]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model's layers over a cache of the given layout.

    Attributes:
        host: of the tiers, if the layout has them.
        streams_entries: selected entries come from the host as they are needed (prompts), not by the hot buffers (steps).
    """

    model: transformer.Transformer
    layout: cache_lib.Layout
    host: fetch.Host | None = None
    streams_entries: bool = False

    @functools.cached_property
    def _declarations(self) -> dict:
        return param.declarations(self.model)

    def layers(
        self, params: dict, cache: cache_lib.Cache, streams: Float[Array, "b t n d"], inputs: context_lib.Inputs, at: rings.Span
    ) -> Passed:
        """Runs all layers."""
        caches, fresh = dict(cache.layers), []
        for i, run in enumerate(self.model.stack.runs):
            name = f"run_{i}"
            (streams, caches[name]), made = self._run(name, run.repeat, params["stack"][name], caches[name], streams, inputs, at)
            fresh += [made[place] for place in sorted(made, key=lambda place: self.layout.host_layers[name, place])]
        return Passed(streams, cache._replace(layers=caches), fresh)

    def draft(
        self,
        params: dict,
        cache: cache_lib.Cache,
        streams: Float[Array, "b t n d"],
        following: Float[Array, "b t d"],
        inputs: context_lib.Inputs,
        at: rings.Span,
    ) -> tuple[Float[Array, "b t d"], cache_lib.Cache]:
        """The MTP block: hidden states that predict the token after the next, and the cache with its window extended.

        Args:
            streams: of the tokens at ``at``, after the last layer.
            following: embeddings of the tokens that come one later.
            inputs: the tokens at ``at``.
        """
        assert self.model.mtp is not None
        assert cache.mtp is not None
        values = params["mtp"]["block"]["moe"]["experts"]
        bound = param.bind(self.model.mtp, params["mtp"])
        stacked = {name: x[None] for name, x in values.items()}
        streams, own = self._layer(bound.block, stacked, cache.mtp, bound.join(streams, following), inputs, at, jnp.zeros((), jnp.int32))
        return bound.hidden(streams), cache._replace(mtp=own)

    def _run(self, name: str, repeat: int, params: dict, caches: dict, streams: Array, inputs: context_lib.Inputs, at: rings.Span):
        group, declared = getattr(self.model.stack, name), self._declarations["stack"][name]
        rest = tree.select(params, declarations=declared, keep=lambda d: "routed_expert" not in d.tags)
        absent = jax.tree.map(
            lambda d: d.struct,
            tree.select(declared, declarations=declared, keep=lambda d: "routed_expert" in d.tags),
            is_leaf=param.is_declaration,
        )

        def body(carry: tuple[Array, dict], one: tuple[dict, Array]) -> tuple[tuple[Array, dict], dict]:
            (streams, caches), (values, layer) = carry, one
            bound, caches, made = param.bind(group, tree.merge(values, absent)), dict(caches), {}
            for j in range(group.size):
                place = f"layer_{j}"
                weights = params[place]["moe"]["experts"]
                host_layer = self.layout.host_layers.get((name, place), 0) + layer
                streams, own = self._layer(getattr(bound, place), weights, caches[place], streams, inputs, at, layer, host_layer)
                caches[place] = own._replace(fresh=None)
                if own.fresh is not None:
                    made[place] = own.fresh
            return (streams, caches), made

        if repeat == 1:
            carry, made = body((streams, caches), (jax.tree.map(lambda x: x[0], rest), jnp.zeros((), jnp.int32)))
            return carry, jax.tree.map(lambda x: x[None], made)
        return jax.lax.scan(body, (streams, caches), (rest, jnp.arange(repeat, dtype=jnp.int32)))

    def _layer(
        self,
        block: block_lib.Block,
        weights: dict[str, Array],
        cache: cache_lib.LayerCache,
        streams: Array,
        inputs: context_lib.Inputs,
        at: rings.Span,
        layer: Array,
        host_layer: Array | None = None,
    ) -> tuple[Array, cache_lib.LayerCache]:
        x, mixing = block.attention_mix(streams)
        x = norm.rms_norm(x, block.attention_norm[...], eps=block.eps)
        attended, cache = self._attend(block.attention, cache, x, at, layer, host_layer)
        streams = hyper_connections.write_back(streams, attended, mixing)
        x, mixing = block.moe_mix(streams)
        x = norm.rms_norm(x, block.moe_norm[...], eps=block.eps)
        routing = block.moe.router(x, inputs)
        out = experts.routed(x, routing, weights, layer=layer, limit=self.layout.model.moe.swiglu_limit) + block.moe.shared(x)
        return hyper_connections.write_back(streams, out, mixing), cache

    def _attend(
        self, module: Any, cache: cache_lib.LayerCache, x: Float[Array, "b t d"], at: rings.Span, layer: Array, host_layer: Array | None
    ) -> tuple[Float[Array, "b t d"], cache_lib.LayerCache]:
        a = self.layout.model.attention
        p: projections.Projections = module.projections
        freqs = projections.frequencies(a, compressed=not isinstance(module, window.WindowAttention))
        latent = p.latent(x)
        keys, ring = rings.through(cache.window, p.keys(x, at.positions, freqs=freqs), at, layer=layer, back=a.window - 1)
        cache = cache._replace(window=ring)
        entries, index = None, None
        if not isinstance(module, window.WindowAttention):
            entries, index, cache = self._compress(module, cache, x, latent, at, layer, freqs)
        query = p.queries(latent, at.positions, freqs=freqs)
        known: dict[str, Any] = {"positions": at.positions, "real": at.real, "pages": at.pages, "chunk": a.chunk}
        tier = None
        if cache.fresh is not None:
            assert self.host is not None
            assert host_layer is not None
            assert entries is not None
            tier = fetch.Tier(self.host, host_layer, at.start // entries.ratio, cache.fresh)
        if tier is None or self.streams_entries:
            out = attention.attend(query, keys, p.sink[...], **known, entries=entries, index=index, tier=tier)
        else:
            assert entries is not None
            assert index is not None
            out, hot = attention.attend_hot(query, keys, p.sink[...], **known, slots=at.slots, entries=entries, index=index, tier=tier)
            cache = cache._replace(entries=hot)
        attended = sparse_attention.Attended(out, jnp.zeros(x.shape[:1], jnp.float32))
        with _groups_first():
            return p.output(attended, at.positions, freqs=freqs, dtype=x.dtype).out, cache

    def _compress(
        self,
        module: compressed_sparse.CompressedSparseAttention | heavily_compressed.HeavilyCompressedAttention,
        cache: cache_lib.LayerCache,
        x: Array,
        latent: Array,
        at: rings.Span,
        layer: Array,
        freqs: np.ndarray,
    ) -> tuple[attention.Pool, attention.Index | None, cache_lib.LayerCache]:
        """Writes the entries, and index keys, that the new tokens complete, and says what the queries attend."""
        ratio, as_format = module.kind.ratio, self.layout.entries_format()
        assert cache.tail is not None
        assert cache.entries is not None
        new, tail = blocks.pool(module.compressor, x, cache.tail, at, layer=layer, ratio=ratio, freqs=freqs)
        if self.layout.tiered(module.kind):
            stored, cache = cache.entries, cache._replace(fresh=as_format.encode(new))
        else:
            stored = blocks.store(cache.entries, new, at, layer=layer, ratio=ratio, as_format=as_format)
        cache = cache._replace(tail=tail, entries=stored)
        pool = attention.Pool(stored, layer, as_format, ratio)
        if cache.index is None:
            return pool, None, cache
        assert cache.index_tail is not None
        assert isinstance(module, compressed_sparse.CompressedSparseAttention)
        as_format = self.layout.index_format(module.kind)
        indexer = module.indexer
        new, tail = blocks.pool(indexer.compressor, x, cache.index_tail, at, layer=layer, ratio=ratio, freqs=freqs)
        stored = blocks.store(cache.index, new, at, layer=layer, ratio=ratio, as_format=as_format)
        query, weight = indexer.queries(x, latent, at.positions, freqs=freqs)
        index = attention.Index(query, weight, attention.Pool(stored, layer, as_format, ratio), module.kind.top_k)
        return pool, index, cache._replace(index_tail=tail, index=stored)


def _groups_first() -> contextlib.AbstractContextManager[None]:
    """Where linear products are in the compute dtype, grouped ones are in the order that is fast for few rows."""
    if select.implementation("linear_product") != "compute":
        return contextlib.nullcontext()
    return select.using("linear_product", implementation=products.GroupsFirst())
