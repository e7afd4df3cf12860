"""One forward pass for prefill, steps and drafts: new tokens of some sequences, given the cache of their past.

The layers are those of `model`, bound to the same parameters. Only what training does for whole rows is done otherwise here: attention
looks into the cache
(`decode.attention`), compressors continue from their tails (`decode.blocks`), and experts are read one by one (`decode.experts`).

Runs of equal layers are scanned as in training. The caches are carried through the scan and updated at the layer's place, never taken
apart: what is carried
and only written at a place is updated in the memory it has.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from v4train.core import param, tree
from v4train.decode import attention, blocks, experts, rings
from v4train.decode import cache as cache_lib
from v4train.model import block as block_lib
from v4train.model import context as context_lib
from v4train.model import hyper_connections, transformer
from v4train.model.attention import compressed_sparse, heavily_compressed, projections, window
from v4train.ops import norm, sparse_attention


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model's layers over a cache of the given layout."""

    model: transformer.Transformer
    layout: cache_lib.Layout

    @functools.cached_property
    def _declarations(self) -> dict:
        return param.declarations(self.model)

    def layers(
        self, params: dict, cache: cache_lib.Cache, streams: Float[Array, "b t n d"], inputs: context_lib.Inputs, at: rings.Span
    ) -> tuple[Float[Array, "b t n d"], cache_lib.Cache]:
        """Streams after the last layer, and the cache with the new tokens in it; its lengths are as they were."""
        caches = dict(cache.layers)
        for i, run in enumerate(self.model.stack.runs):
            name = f"run_{i}"
            streams, caches[name] = self._run(name, run.repeat, params["stack"][name], caches[name], streams, inputs, at)
        return streams, cache._replace(layers=caches)

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

        def body(carry: tuple[Array, dict], one: tuple[dict, Array]) -> tuple[tuple[Array, dict], None]:
            (streams, caches), (values, layer) = carry, one
            bound, caches = param.bind(group, tree.merge(values, absent)), dict(caches)
            for j in range(group.size):
                place = f"layer_{j}"
                weights = params[place]["moe"]["experts"]
                streams, caches[place] = self._layer(getattr(bound, place), weights, caches[place], streams, inputs, at, layer)
            return (streams, caches), None

        if repeat == 1:
            return body((streams, caches), (jax.tree.map(lambda x: x[0], rest), jnp.zeros((), jnp.int32)))[0]
        return jax.lax.scan(body, (streams, caches), (rest, jnp.arange(repeat, dtype=jnp.int32)))[0]

    def _layer(
        self,
        block: block_lib.Block,
        weights: dict[str, Array],
        cache: cache_lib.LayerCache,
        streams: Array,
        inputs: context_lib.Inputs,
        at: rings.Span,
        layer: Array,
    ) -> tuple[Array, cache_lib.LayerCache]:
        x, mixing = block.attention_mix(streams)
        attended, cache = self._attend(block.attention, cache, norm.rms_norm(x, block.attention_norm[...], eps=block.eps), at, layer)
        streams = hyper_connections.write_back(streams, attended, mixing)
        x, mixing = block.moe_mix(streams)
        x = norm.rms_norm(x, block.moe_norm[...], eps=block.eps)
        routing = block.moe.router(x, inputs)
        out = experts.routed(x, routing, weights, layer=layer, limit=self.layout.model.moe.swiglu_limit) + block.moe.shared(x)
        return hyper_connections.write_back(streams, out, mixing), cache

    def _attend(
        self, module: Any, cache: cache_lib.LayerCache, x: Float[Array, "b t d"], at: rings.Span, layer: Array
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
        out = attention.attend(
            p.queries(latent, at.positions, freqs=freqs),
            keys,
            p.sink[...],
            positions=at.positions,
            real=at.real,
            pages=at.pages,
            chunk=a.chunk,
            entries=entries,
            index=index,
        )
        attended = sparse_attention.Attended(out, jnp.zeros(x.shape[:1], jnp.float32))
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
