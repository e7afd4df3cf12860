"""The same bits with and without tiers, whatever their sizes."""

import numpy as np
import pytest

from tests.decode import sequences, test_cache
from tests.model import small
from v4train.decode import cache as cache_lib

MODEL = small.config(
    layers=[{"pattern": ["window"]}, {"pattern": ["csa", "hca"], "repeat": 2}, {"pattern": ["csa"]}], moe={"hash_layers": 0}, mtp=None
)
LENGTH = 100


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


def tiers(tmp_path=None, *, hot: int = 6, host: int = 10**6, disk: int = 10**6) -> dict:
    return {"hot_entries": hot, "host_bytes": host, "disk": None if tmp_path is None else {"path": str(tmp_path), "bytes": disk}}


def play(decoder, *, seed: int = 0) -> list[np.ndarray]:
    """Three sequences in random company: chunks of random sizes, steps of random slots, ends and beginnings."""
    rng = np.random.default_rng(seed)
    cache, found = decoder.empty(), []
    prompts = [sequences.text(LENGTH, seed=int(rng.integers(100))) for _ in range(3)]
    at = [0, 0, 0]
    for _ in range(45):
        slot = int(rng.integers(3))
        if at[slot] < 60 and rng.random() < 0.5:
            size = int(rng.integers(1, 17))
            cache, logits, _ = decoder.prefill(cache, prompt=prompts[slot], start=at[slot], slot=slot, count=size)
            found.append(np.asarray(logits))
            at[slot] += size
            continue
        active = [s for s in range(3) if rng.random() < 0.7 and at[s] < LENGTH]
        if active:
            cache, logits, _ = sequences.step(decoder, cache, {s: int(prompts[s].tokens[at[s]]) for s in active})
            found += [logits[s] for s in active]
        for s in active:
            at[s] += 1
        if rng.random() < 0.05:
            cache, at[slot] = cache._replace(lengths=cache.lengths.at[slot].set(0)), 0
            prompts[slot] = sequences.text(LENGTH, seed=int(rng.integers(100)))
    return found


def compare(params, cache: str, *limits: dict) -> None:
    plain = play(sequences.decoder(MODEL, params, cache=cache))
    for each in limits:
        decoder = sequences.decoder(MODEL, params, cache=cache, tiers=each)
        for expected, found in zip(plain, play(decoder), strict=True):
            np.testing.assert_array_equal(found, expected)
        counts = decoder.tiers.statistics()
        assert min(counts["hot_hits_total"], counts["hot_misses_total"]) > 50
        assert counts["prefetch_hits_total"] > 0
        decoder.close()


def test_random_company_gets_the_same_bits_with_the_least_tiers(params, tmp_path):
    """A hot buffer of one step's selection, and host memory for a few pages: the rest goes through the file."""
    compare(params, "fp8", tiers(tmp_path, hot=4, host=3000))


@pytest.mark.slow
def test_random_company_gets_the_same_bits_with_other_limits(params, tmp_path):
    """Slow: three decoders are compiled. Entries of one array of floats; FP8's are two arrays, bytes and bfloat16."""
    compare(params, "fp32", tiers(tmp_path, hot=4, host=6000), tiers(hot=30))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {"tiers": {"hot_entries": 511, "host_bytes": 2**30}},
            r"hot_entries 511 is less than a step needs \(a token that selects 512 entries",
        ),
        (
            {"tiers": {"hot_entries": 1023, "host_bytes": 2**30}, "speculate": True},
            "2 tokens that select 512 entries each.*give at least 1024",
        ),
        ({"tiers": {"host_bytes": 100_000}, "slots": 4}, r"host_bytes 100,000 is less than 448,512, what the 4 slots"),
        (
            {"tiers": {"host_bytes": 10**6}, "pages": 3},
            r"pages 3: decode.tiers has room for the entries of 1 pages \(a page has 784,896 bytes",
        ),
        ({"tiers": {"host_bytes": 2**30}, "attention": "dense"}, "no layer of the model selects entries"),
    ],
)
def test_limits_that_cannot_work(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        test_cache.layout("fp8", **config)


@pytest.mark.parametrize(("tokens", "saved"), [(32_768, 0.613), (131_072, 0.748), (1_048_576, 0.793)])
def test_tiers_leave_a_fraction_on_the_device(tokens, saved):
    """Of V4-Flash's FP8 cache, windows and tails included; what is gone from the device is on the host."""
    whole = test_cache.layout("fp8", max_length=tokens)
    tiered = test_cache.layout("fp8", max_length=tokens, tiers={"host_bytes": 2**40})
    sizes = [cache_lib.total_bytes(each.structure()) for each in (whole, tiered)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(saved, abs=2e-3)
    hot = 21 * 1024 * 584
    assert sizes[0] - sizes[1] == tiered.segment_bytes * tiered.host_layer_count * tiered.pages - hot
