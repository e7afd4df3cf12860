"""Draws follow the distributions that brute force computes, and depend on nothing but seed, position and the row's own logits."""

import functools

import jax
import numpy as np
import pytest

from v4train.decode import sampling

VOCAB, DRAWS = 24, 20_000
LOGITS = np.random.default_rng(0).normal(0, 2, (1, VOCAB)).astype(np.float32)
sample = jax.jit(sampling.sample)
allowed = jax.jit(sampling.allowed)


def knobs(rows: int = 1, *, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> sampling.Knobs:
    def row(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (rows,))

    words = np.broadcast_to(np.asarray(seed, np.uint64), (rows,))
    split = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).astype(np.uint32)
    return sampling.Knobs(row(temperature, np.float32), row(top_k, np.int32), row(top_p, np.float32), split)


def distribution(logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Token by token, in fp64."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: top_k or None]
    mass = {i: np.exp(scaled[i] - scaled[order[0]]) for i in order}
    total, reached, kept = sum(mass.values()), 0.0, []
    for i in order:
        kept.append(i)
        reached += mass[i] / total
        if reached >= top_p:
            break
    found = np.zeros(len(scaled))
    found[kept] = [mass[i] for i in kept]
    return found / found.sum()


@functools.cache
def counts(**options) -> np.ndarray:
    chosen = sample(np.repeat(LOGITS, DRAWS, axis=0), knobs=knobs(DRAWS, seed=7, **options), positions=np.arange(DRAWS, dtype=np.int32))
    return np.bincount(np.asarray(chosen.tokens), minlength=VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-38, 1e-37, 1e-6])
def test_a_temperature_too_low_to_divide_by_is_greedy(temperature):
    """Quotients would be infinite for several tokens, of which the first would be taken."""
    best = int(LOGITS.argmax())
    assert (LOGITS[0, :best] > 0).any()
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}):
        found = sample(LOGITS, knobs=knobs(temperature=temperature, **options), positions=np.zeros(1, np.int32))
        assert int(found.tokens[0]) == best


CASES = [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 12, "top_p": 0.7}]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_draws_follow_the_distribution(options):
    expected = distribution(LOGITS[0], **options)
    found = counts(**options)
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial count, per token.
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    np.testing.assert_array_less(np.abs(found - DRAWS * expected), 5 * deviation + 1)


@pytest.mark.parametrize("seed", range(20))
def test_limits_leave_the_tokens_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, (6, VOCAB)), 1).astype(np.float32)  # with ties
    options = {
        "temperature": rng.uniform(0.3, 2, 6).astype(np.float32),
        "top_k": rng.integers(0, 8, 6),
        "top_p": rng.choice([0.0, 0.31, 0.77, 1.0], 6).astype(np.float32),
    }
    found = np.asarray(allowed(logits, knobs=knobs(6, **options)))
    for i in range(6):
        expected = distribution(logits[i], **{name: value[i] for name, value in options.items()})
        np.testing.assert_array_equal(found[i], expected > 0)


def test_greedy_takes_the_first_of_the_highest():
    logits = np.array([[0, 3, 3, 1], [5, 1, 5, 5]], np.float32)
    chosen = sample(logits, knobs=knobs(2, temperature=0, top_k=1), positions=np.zeros(2, np.int32))
    assert chosen.tokens.tolist() == [1, 0]
    expected = logits[[0, 1], [1, 0]] - np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(chosen.logprobs, expected, rtol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (8, VOCAB)).astype(np.float32)
    options = {
        "temperature": np.array([0, 1, 1, 0.5, 2, 0, 1, 1], np.float32),
        "top_k": np.array([0, 0, 3, 0, 9, 2, 0, 0]),
        "top_p": np.array([1, 1, 1, 0.5, 0.9, 0.1, 1, 1], np.float32),
        "seed": np.array([1, 2, 3, 4, 5, 6, 2**40, 0]),
    }
    positions = np.arange(8, dtype=np.int32)
    together = sample(logits, knobs=knobs(8, **options), positions=positions)
    for i in range(8):
        alone = sample(logits[i : i + 1], knobs=knobs(1, **{k: v[i] for k, v in options.items()}), positions=positions[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], rtol=1e-6)


def test_seed_and_position_make_the_noise():
    rows = np.repeat(LOGITS, 64, axis=0)

    def tokens(**changes):
        options = {"seed": 3, "positions": np.arange(64, dtype=np.int32)} | changes
        return np.asarray(sample(rows, knobs=knobs(64, seed=options["seed"]), positions=options["positions"]).tokens)

    np.testing.assert_array_equal(tokens(), tokens())
    assert (tokens() != tokens(seed=4)).any()
    assert (tokens() != tokens(seed=3 + 2**32)).any()
    np.testing.assert_array_equal(tokens()[1:], tokens(positions=np.arange(64, dtype=np.int32) + 1)[:-1])


def test_the_best_tokens_in_order():
    found = sampling.best(LOGITS, count=5)
    expected = np.argsort(-LOGITS[0])[:5]
    np.testing.assert_array_equal(found.tokens[0], expected)
    shares = distribution(LOGITS[0])
    np.testing.assert_allclose(np.exp(found.logprobs[0]), shares[expected], rtol=1e-5)
