"""The best of many scores, merged window by window, are those of one stable sort of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.decode import attention, formats

QUERIES, BEST, WINDOW, ALL, LAST = 3, 40, 1024, 4096, 200


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for name, value in {"_MERGE_ENTRIES": WINDOW // 4, "_GROUP": 4, "_FEW": (16, 64)}.items():
        monkeypatch.setattr(attention, name, value)


@functools.cache
def merge():
    return jax.jit(lambda best, scores, first, filled: attention._best_of(best, scores, first=first, filled=filled))


def orders(name: str) -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(QUERIES, ALL)).astype(np.float32)
    return {
        "random": lambda: scores,
        "many equal": lambda: np.round(scores, 1),
        "all equal": lambda: np.zeros_like(scores),
        "rising": lambda: np.sort(scores, axis=1),
        "falling": lambda: np.sort(scores, axis=1)[:, ::-1].copy(),
        "in the last group": lambda: np.where(np.arange(ALL) % (WINDOW // 4) == WINDOW // 4 - 1, scores + 10, scores),
        "few of each window": lambda: np.where(np.arange(ALL) % 97 == 0, scores + 10, scores),
    }[name]()


@pytest.mark.parametrize("name", ["random", "many equal", "all equal", "rising", "falling", "in the last group", "few of each window"])
def test_best_of_windows_are_the_best_of_all(name):
    """Every way of merging is taken: of all, of the part that is filled, of few groups and of some more."""
    scores = orders(name)
    scores[:, ALL - WINDOW + LAST :] = attention._LOWEST
    best = jnp.full((QUERIES, BEST), attention._LOWEST), jnp.zeros((QUERIES, BEST), jnp.int32)
    for first in range(0, ALL, WINDOW):
        filled = LAST if first == ALL - WINDOW else WINDOW
        best = merge()(best, scores[:, first : first + WINDOW], jnp.int32(first), jnp.int32(filled))
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :BEST]
    np.testing.assert_array_equal(best[1], expected)
    np.testing.assert_array_equal(best[0], np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("queries", [1, QUERIES])
def test_scores_are_those_of_fp64_and_keys_are_multiplied_as_they_are_read(queries):
    """Written down transposed before each product, as XLA's CPU backend does if it has an axis of the batch, keys took half of a scan."""
    rng, as_format, (heads, width, pages, page) = np.random.default_rng(2), formats.of_index_keys("fp8", width=128), (8, 128, 16, 16)
    stored = as_format.encode(jnp.asarray(rng.standard_normal((1, pages, page, width), np.float32)))
    table = rng.permutation(pages).astype(np.int32)
    query, weight = rng.standard_normal((queries, heads, width), np.float32), rng.standard_normal((queries, heads), np.float32)
    visible = np.arange(pages * page - queries, pages * page, dtype=np.int32) + 1

    def best(stored, table, query, weight):
        pool = attention.Pool(stored, jnp.zeros((), jnp.int32), as_format, 4)
        item = attention.Item(query, visible, jnp.ones(queries, bool), query[:, 0], table, query, weight)
        return attention.select_entries(item, attention.Index(query[None], weight[None], pool, BEST), jnp.asarray(visible))

    program = jax.jit(best).lower(stored, table, query, weight).compile()
    scores, numbers = program(stored, table, query, weight)
    keys = np.asarray(as_format.decode(stored, dtype=jnp.float32), np.float64)[0, table].reshape(-1, width)
    exact = np.einsum("cin,ci->cn", np.maximum(np.einsum("cij,nj->cin", query.astype(np.float64), keys), 0), weight.astype(np.float64))
    exact = np.where(np.arange(pages * page) < visible[:, None], exact, -np.inf)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :BEST]
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, axis=1), rtol=1e-4)
    if jax.default_backend() == "cpu":
        assert f"f32[{width},{pages * page}]" not in program.as_text(), "keys are written down transposed"
