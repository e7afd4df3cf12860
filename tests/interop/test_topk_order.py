"""The order at ties against `torch.topk` itself: stored rows, and live ones where torch is installed.

`topk_rows.npz` holds rows of scores (all equal, few values, ReLUs, signed zeros, invisible tails, NaNs, and sequences that defeat the
choice of the pivot so that heap selection takes over), the k asked for, and the set that torch 2.13 on a CPU picked.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.interop import topk_order
from v4train.ops import select, sparse_attention, top_k

LOWEST = np.finfo(np.float32).min


@functools.cache
def _stored() -> list[tuple[np.ndarray, np.ndarray]]:
    table = np.load(pathlib.Path(__file__).with_name("topk_rows.npz"))
    rows = np.split(table["scores"], np.cumsum(table["lengths"])[:-1])
    return list(zip(rows, np.split(table["picked"], np.cumsum(table["ks"])[:-1]), strict=True))


def test_the_stored_rows_are_picked_as_torch_picked_them():
    assert len(_stored()) > 300
    wrong = [(len(x), len(picked)) for x, picked in _stored() if sorted(topk_order.select(x, k=len(picked))) != picked.tolist()]
    assert not wrong, wrong


def test_the_stored_rows_are_not_picked_by_taking_the_earliest():
    """If they were, this file would show nothing."""
    earliest = [sorted(np.argsort(-x, kind="stable")[: len(picked)]) == picked.tolist() for x, picked in _stored()]
    assert np.mean(earliest) < 0.6


@pytest.mark.interop
def test_rows_of_all_lengths_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for length in range(1, 601):
        heads = rng.integers(1, 4)
        x = np.maximum(rng.standard_normal((heads, length)), 0).sum(0) * (rng.random(length) < rng.random())
        x[rng.integers(length) + 1 :] = -np.inf
        x = x.astype(np.float32)
        for k in {*range(1, length + 1)} if length < 40 else {*rng.integers(1, length + 1, 8).tolist(), 1, length // 64 or 1}:
            expected = torch.tensor(x)[None].topk(k).indices[0].tolist()
            assert set(topk_order.select(x, k=k).tolist()) == set(expected), (length, k)


def _rows() -> np.ndarray:
    """Scores of 12 queries that see 1, 5, 9, .. of 48 entries; two thirds are exactly 0."""
    rng = np.random.default_rng(3)
    scores = np.maximum(rng.standard_normal((1, 12, 48)) - 0.4, 0).astype(np.float32)
    return np.where(np.arange(48) < 1 + 4 * np.arange(12)[:, None], scores, LOWEST)


@pytest.mark.parametrize("entries", [None, 20])
def test_order_picks_visible_entries_as_rows_of_what_exists(entries):
    """Each row by itself, cut to the entries that the reference has when it runs the query."""
    scores, k = _rows(), 7
    picked = np.asarray(jax.jit(functools.partial(topk_order.Order(entries), k=k))(scores))
    changed = 0
    for query in range(12):
        visible = 1 + 4 * query
        exist = max(visible, 48 if entries is None else entries)
        row = np.where(scores[0, query, :exist] == LOWEST, -np.inf, scores[0, query, :exist])
        expected = {place for place in topk_order.select(row, k=k).tolist() if place < visible}
        assert {place for place in picked[0, query].tolist() if place < visible} == expected
        changed += expected != {place for place in jax.lax.top_k(scores[0, query], k)[1].tolist() if place < visible}
    assert changed > 3


def test_the_number_of_existing_entries_matters():
    scores = _rows()
    all_of_them, few = (np.sort(topk_order.Order(entries)(jnp.asarray(scores), k=7)) for entries in (None, 20))
    assert (all_of_them != few).any()


def test_rows_without_a_tie_across_the_boundary_never_reach_the_host(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr(topk_order, "_break_ties", refuse)
    scores = np.tile(np.r_[np.arange(5.0), np.zeros(4)].astype(np.float32), (2, 3, 1))
    picked = jax.jit(functools.partial(topk_order.Order(), k=4))(scores)  # the zeros tie, but behind the boundary
    assert np.sort(picked).tolist() == [[[1, 2, 3, 4]] * 3] * 2
    assert topk_order.Order()(jnp.asarray(scores), k=9).shape == (2, 3, 9)


def _attention(order: top_k.Implementation | None):
    """Loss and gradients of sparse attention whose index scores are mostly exact zeros, in chunks: a scan with recomputation."""
    rng = np.random.default_rng(5)
    length, entries = 64, 16

    def draw(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arrays = {"query": draw(1, length, 2, 8), "kv": draw(1, length, 8), "entries": draw(1, entries, 8), "keys": draw(1, entries, 4)}
    arrays |= {"index_query": draw(1, length, 1, 4) - 0.5, "index_weight": draw(1, length, 1)}

    def loss(x: dict) -> jax.Array:
        end = jnp.arange(entries, dtype=jnp.int32)[None] * 4 + 3
        out = sparse_attention.attend(
            x["query"],
            x["kv"],
            jnp.zeros(2),
            segment_ids=jnp.ones((1, length), jnp.int32),
            window=4,
            chunk=16,
            entries=sparse_attention.Entries(x["entries"], end, jnp.ones_like(end)),
            index=sparse_attention.Index(x["index_query"], x["index_weight"], x["keys"]),
            selection=sparse_attention.Selection(top_k=5, teach=True),
        )
        return jnp.sum(out.out**2) + out.indexer_loss.sum()

    if order is None:
        return small.jit(jax.value_and_grad(loss))(arrays)
    with select.using("top_k", implementation=order):
        return small.jit(jax.value_and_grad(loss))(arrays)


def test_it_works_under_jit_grad_scan_and_remat():
    """Against the whole selection done outside: an implementation that sorts every row on the host, without the detection of ties."""

    def every_row(scores: jax.Array, *, k: int) -> jax.Array:
        def on_host(scores):
            rows = np.asarray(scores).reshape(-1, scores.shape[-1])
            return np.stack([topk_order.select(row, k=k) for row in rows]).reshape(*scores.shape[:-1], k).astype(np.int32)

        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((*scores.shape[:-1], k), jnp.int32), jax.lax.stop_gradient(scores))

    (loss, gradients), (expected, wanted), (earliest, _) = _attention(topk_order.Order()), _attention(every_row), _attention(None)
    assert abs(expected - earliest) > 1e-3, "the order must matter here"
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, wanted)
