"""Bytes of the cache, counted from arrays; and what the compiled step does with its memory."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small
from v4train import recipe
from v4train.config import load
from v4train.decode import cache as cache_lib
from v4train.decode import config as config_lib
from v4train.model import config as model_config

FLASH = pathlib.Path(__file__).parents[2] / "configs" / "v4_flash.yaml"


def flash() -> model_config.ModelConfig:
    """V4-Flash with its indexer in use."""
    return load.load(FLASH, cls=recipe.Recipe, overrides=["model.kinds.1.phase=sparse"]).config.model


def layout(kind: str, *, model: model_config.ModelConfig | None = None, **config) -> cache_lib.Layout:
    sizes = config_lib.DecodeConfig.model_validate({"cache": kind} | config)
    return cache_lib.Layout(model or flash(), sizes, jnp.dtype(jnp.bfloat16))


def test_bytes_of_a_token_and_of_a_sequence_are_those_of_the_published_geometry():
    """21 CSA layers of one entry and one index key each 4 tokens, 20 HCA layers of one entry each 128."""
    assert layout("bf16").sizes().per_token == 21 * (1024 + 256) / 4 + 20 * 1024 / 128 == 6880
    assert layout("fp8").sizes().per_token == 21 * (584 + 129) / 4 + 20 * 584 / 128 == 3834.5
    window = 43 * 128 * 512 * 2
    tails = 20 * 128 * 2 * 512 * 4 + 21 * 8 * 2 * (1024 + 256) * 4
    for kind in ("fp32", "bf16", "fp8"):
        sizes = layout(kind, max_length=256).sizes()
        assert sizes.per_slot == window + tails + 4 + 4  # a length and one page number


@pytest.mark.parametrize(("tokens", "saved"), [(32_768, 0.41), (131_072, 0.434), (1_048_576, 0.441)])
def test_fp8_saves_two_fifths_of_the_whole_cache(tokens, saved):
    """Of the whole cache, with the windows and tails that both have; entries and keys alone: 44.3%."""
    whole = {kind: cache_lib.total_bytes(layout(kind, max_length=tokens).structure()) for kind in ("bf16", "fp8")}
    assert 1 - whole["fp8"] / whole["bf16"] == pytest.approx(saved, abs=1e-3)
    for kind, found in whole.items():
        assert found == layout(kind, max_length=tokens).sizes().of(tokens)


def test_real_arrays_have_these_bytes():
    for kind in ("bf16", "fp8"):
        shape = layout(kind, max_length=32_768)
        cache = shape.empty()
        real = sum(x.nbytes for x in jax.tree.leaves(cache))
        assert real == shape.sizes().of(32_768) == sum(cache_lib.bytes_by_part(cache).values())
        del cache


def test_a_pool_of_given_bytes_fits_into_them():
    for slots, given in ((1, 10**9), (8, 10**9)):
        shape = layout("fp8", slots=slots, device_bytes=given)
        page = shape.sizes().per_token * 256
        assert given - page < cache_lib.total_bytes(shape.structure()) <= given
    with pytest.raises(ValueError, match=r"device_bytes 100,000,000 leaves no page: 8 slots take"):
        layout("fp8", slots=8, device_bytes=100_000_000)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"page_tokens": 192}, r"page_tokens 192 is not a multiple of the compression ratios \[128\]: set a multiple of all of \[4, 128\]"),
        ({"max_length": 2**21}, r"max_length 2097152 is more than model.max_positions 1048576"),
        ({"pages": 3, "device_bytes": 10**9}, "pages 3 and device_bytes 1000000000 both set"),
    ],
)
def test_sizes_that_do_not_fit(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        layout("bf16", **config)


def test_speculation_needs_an_mtp_block():
    with pytest.raises(ValueError, match="no MTP block"):
        layout("bf16", model=flash().model_copy(update={"mtp": None}), speculate=True)


MODEL = small.config(layers=[{"pattern": ["csa", "hca"], "repeat": 2}], moe={"hash_layers": 0}, mtp=None)


def compiled(name: str, **config):
    """A compiled function of a decoder with a large pool, and the cache's arrays."""
    decoder = sequences.decoder(MODEL, small.parameters(MODEL), **config)
    cache, slots = decoder.layout.structure(), decoder.config.slots
    one = np.zeros((), np.int32)
    lowered = {
        "step": lambda: decoder._extend.lower(decoder.params, cache, np.zeros((slots, 1), np.int32), np.zeros(slots, np.int32)),
        "prefill": lambda: decoder._prefill.lower(decoder.params, cache, sequences.text(16).chunk(0, size=16), one, one, one, every=False),
    }[name]()
    return lowered.compile(), cache


@pytest.mark.parametrize(("name", "kind"), [("step", "fp8"), ("prefill", "fp8"), ("step", "bf16")])
def test_the_cache_is_updated_where_it_is(name, kind):
    """Neither copied nor, as a CPU would do for a scatter of bf16, turned into another format and back."""
    program, cache = compiled(name, max_length=2**17, page_tokens=256, cache=kind)
    pools = [x for layer in cache.layers["run_0"].values() for x in jax.tree.leaves((layer.entries, layer.index))]
    rings = [x for layer in cache.layers["run_0"].values() for x in jax.tree.leaves((layer.window, layer.tail, layer.index_tail))]
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == cache_lib.total_bytes(cache), "every array is donated and reused"
    assert memory.temp_size_in_bytes < cache_lib.total_bytes(pools) / 3, "there is no second pool"
    copied = {shape for shape in re.findall(r"= (\w+\[[\d,]+\])\S* copy\(", program.as_text())}
    names = {"float32": "f32", "uint16": "u16", "uint8": "u8"}
    for x in pools + (rings if name == "step" else []):
        assert f"{names[x.dtype.name]}[{','.join(map(str, x.shape))}]" not in copied


def test_a_step_does_not_grow_with_the_longest_sequence_there_may_be():
    """Turns of a loop are data and counted once here: what else grew with `max_length` would show."""
    short, long = (compiled("step", max_length=length, page_tokens=256, pages=256)[0] for length in (2**17, 2**20))
    assert long.cost_analysis()["flops"] == pytest.approx(short.cost_analysis()["flops"], rel=0.01)
    entries = (2**20 - 2**17) // 4
    assert long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes < entries / 2, "no array of all scores"
