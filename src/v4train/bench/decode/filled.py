"""A model with the true layers of V4-Flash and a cache that is full to any length, without reading a prompt of that length.

Time and bytes of a decode step depend on shapes and on the number of entries, not on what the entries say. So the cache is filled with
random entries, encoded as the decoder encodes them, and its lengths are set. Layers keep their true widths and heads; what is cut is
how many there are, how many experts a layer has (those that a token uses stay six), and the vocabulary. A step therefore does the work
of so many layers of V4-Flash at batch 1, weights read from memory included.

There is one CSA layer and one HCA layer, as V4-Flash has 21 and 20 of them among its 43 layers; its two window layers, a twentieth of them,
are left out. The vocabulary is cut as the layers are, to 2 of 43 parts (6,016 of 129,280), so that the head has its true share of a step.

A random index selects entries that lie anywhere, the worst case of a gather.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4train import recipe as recipe_lib
from v4train.core import param
from v4train.decode import cache as cache_lib
from v4train.decode import config as decode_config
from v4train.decode import decoder as decoder_lib
from v4train.decode import formats
from v4train.model import config as model_config
from v4train.model import transformer
from v4train.numerics import config as numerics_config

RECIPE = "configs/v4_flash.yaml"
"""Whose layers are measured; relative to the working directory."""
_CUT = (
    "mesh.expert=1",
    "model.layers=[{pattern: [csa, hca]}]",
    "model.kinds.1.phase=sparse",
    "model.moe.experts=8",
    "model.moe.hash_layers=0",
    "model.vocab_size=6016",
    "model.mtp=null",
)
WIDTHS: dict[str, tuple[str, ...]] = {
    "true": (),
    "small": ("model.hidden=512", "model.attention.query_rank=128", "model.attention.output_rank=64", "model.moe.ffn=256"),
}
"""Overrides of the recipe. Heads, index heads, top-k, window and ratios are V4-Flash's in both; small: what attention does not see is an
eighth or a sixteenth, so that a step is mostly attention, as in V4-Flash when a batch is large enough to share the weights."""
_PATTERN = 4096  # random entries that repeat through a pool

MODES: dict[str, dict[str, str]] = {
    "dense-fp32": {"cache": "fp32", "attention": "dense"},
    "dense-bf16": {"cache": "bf16", "attention": "dense"},
    "sparse-bf16": {"cache": "bf16", "attention": "selected"},
    "sparse-fp8": {"cache": "fp8", "attention": "selected"},
}
"""What is compared: settings of `DecodeConfig`."""


def model(path: str = RECIPE, *, whole: bool = False, widths: str = "true", overrides: Sequence[str] = ()) -> model_config.ModelConfig:
    """The recipe's model with sparse attention; cut to a CSA and an HCA layer unless it is wanted whole, then changed to ``widths`` and by
    ``overrides``."""
    cut = ("model.kinds.1.phase=sparse", "model.mtp=null") if whole else _CUT
    return recipe_lib.resolve(path, overrides=(*cut, *WIDTHS[widths], *overrides)).config.model


def config(mode: str, *, length: int, slots: int = 1, **settings: Any) -> decode_config.DecodeConfig:
    """Of a decoder with room for ``length`` tokens in each slot."""
    return decode_config.DecodeConfig(slots=slots, max_length=length, **MODES[mode], **settings)


def parameters(model: model_config.ModelConfig) -> dict:
    """Random weights of plausible size, drawn fast: one block of noise that repeats."""
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32)
    declarations = param.declarations(transformer.Transformer(model))

    def draw(d: param.Declaration) -> jax.Array:
        if not d.trained:
            return jnp.zeros(d.shape, d.dtype)
        if isinstance(d.init, param.Constant):
            return jnp.full(d.shape, d.init.value, d.dtype)
        values = np.resize(noise, d.size).reshape(d.shape)
        values *= np.float32(d.shape[-2] ** -0.5 if len(d.shape) > 1 else 0.02)
        return jnp.asarray(values)

    return jax.tree.map(draw, declarations, is_leaf=param.is_declaration)


def decoder(model: model_config.ModelConfig, params: dict, config: decode_config.DecodeConfig) -> decoder_lib.Decoder:
    """A decoder that computes in fp32, the arithmetic that a CPU has."""
    return decoder_lib.Decoder(model, params, config=config, numerics=numerics_config.NumericsConfig(compute="float32"))


def fill(layout: cache_lib.Layout, *, length: int) -> cache_lib.Cache:
    """A cache whose every slot holds ``length`` tokens that nobody has read."""
    rng = np.random.default_rng(1)
    cache = layout.empty()

    def ring(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.resize(rng.standard_normal(2**16, np.float32), x.size).reshape(x.shape), x.dtype)

    def pool(stored: formats.Stored | None, as_format: formats.Format | None) -> formats.Stored | None:
        if stored is None or as_format is None:
            return stored
        encoded = _encoded(as_format, rng)
        return {name: jnp.asarray(np.resize(encoded[name], x.shape)) for name, x in stored.items()}

    layers: dict[str, dict[str, cache_lib.LayerCache]] = {}
    for run, places in cache.layers.items():
        layers[run] = {}
        for place, layer in places.items():
            kind = next((k for k in layout.model.kinds if isinstance(k, model_config.CompressedSparseConfig)), None)
            window, tail, index_tail = (jax.tree.map(ring, x) for x in (layer.window, layer.tail, layer.index_tail))
            layers[run][place] = layer._replace(
                window=window,
                tail=tail,
                index_tail=index_tail,
                entries=pool(layer.entries, layout.entries_format()),
                index=pool(layer.index, None if kind is None else layout.index_format(kind)),
            )
    lengths = jnp.full_like(cache.lengths, length)
    return cache._replace(lengths=lengths, layers=layers)


def fill_tiers(decoder: decoder_lib.Decoder, *, length: int) -> None:
    """Random entries for the first ``length`` tokens of slot 0 in host memory, and in the file what has no room there."""
    if decoder.tiers is None:
        return
    shapes, layout = decoder.tiers.page_shapes, decoder.layout
    encoded = _encoded(layout.entries_format(), np.random.default_rng(1))
    for page in range(-(-length // layout.config.page_tokens)):
        decoder.tiers.pool.put_page(page, {name: np.resize(np.roll(encoded[name], page, axis=0), s.shape) for name, s in shapes.items()})


def _encoded(as_format: formats.Format, rng: np.random.Generator) -> formats.Stored:
    return jax.device_get(as_format.encode(jnp.asarray(rng.standard_normal((_PATTERN, as_format.width), np.float32))))
