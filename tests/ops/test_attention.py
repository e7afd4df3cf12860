"""The dense oracle against its definition in loops, and closed forms of what is easy to get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import attention_case as cases
from v4train.ops import attention, sparse_attention

CASE = cases.draw()


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def _one_document(length):
    return np.ones((1, length), np.int32)


def test_index_scores_have_the_relu_before_the_weights():
    expected = cases.loop(CASE, top_k=None)
    scores = np.where(expected.seen, attention.index_scores(jax.tree.map(jnp.asarray, CASE.index)), 0)
    np.testing.assert_allclose(scores, np.where(expected.seen, expected.scores, 0), rtol=1e-5, atol=1e-5)
    without = np.einsum("bsi,bsin->bsn", CASE.index.weight, np.einsum("bsij,bnj->bsin", CASE.index.query, CASE.index.key))
    chosen, *wrong = (
        attention.select(jnp.asarray(x), jnp.asarray(expected.seen), top_k=3) for x in (scores, without, np.maximum(without, 0))
    )
    assert all((x != chosen).any() for x in wrong)


@pytest.mark.parametrize("top_k", [None, 3, 1])
def test_entries_agree_with_loops(top_k):
    expected, entries = cases.loop(CASE, top_k=top_k), cases.entries(CASE.values)
    attended = attention.visible_entries(cases.SEGMENTS, entries)
    if top_k is not None:
        attended = attention.select(attention.index_scores(jax.tree.map(jnp.asarray, CASE.index)), attended, top_k=top_k)
    np.testing.assert_array_equal(attended, expected.seen)
    out, shares = attention.dense_attention(*CASE[:3], segment_ids=cases.SEGMENTS, window=cases.WINDOW, entries=entries, attended=attended)
    np.testing.assert_allclose(out, expected.out, atol=1e-5)
    np.testing.assert_allclose(shares, expected.shares, atol=1e-5)


def test_window_alone_agrees_with_loops():
    out, shares = attention.dense_attention(*CASE[:3], segment_ids=cases.SEGMENTS, window=cases.WINDOW)
    np.testing.assert_allclose(out, cases.loop(CASE, top_k=None, use_entries=False).out, atol=1e-5)
    assert shares is None


def test_equal_scores_select_the_earlier_entry():
    seen = jnp.array([[[True, True, False, True, True]]])
    assert attention.select(jnp.zeros((1, 1, 5)), seen, top_k=3).tolist() == [[[True, True, False, True, False]]]
    assert attention.select(jnp.array([[[0.0, -1, 9, 1, 0]]]), seen, top_k=2).tolist() == [[[True, False, False, True, False]]]
    assert attention.select(jnp.zeros((1, 1, 5)), ~seen, top_k=3).tolist() == [[[False, False, True, False, False]]]


def test_a_query_sees_a_block_from_its_last_token_on():
    """Entry i is visible at t iff i < (t + 1) // m."""
    entries = sparse_attention.Entries(jnp.zeros((1, 2, 1)), jnp.array([[3, 7]]), jnp.array([[1, 1]]))
    visible = attention.visible_entries(_one_document(10), entries)[0]
    assert visible.sum(axis=-1).tolist() == [(t + 1) // 4 for t in range(10)]


def test_the_sink_takes_mass_and_gives_nothing():
    """A token alone: ``e^l / (e^l + e^sink)`` of its own value."""
    query, kv, sink = jnp.full((1, 1, 2, 1), 3.0), jnp.full((1, 1, 1), 2.0), jnp.array([0.0, 6.0])
    out, _ = attention.dense_attention(query, kv, sink, segment_ids=_one_document(1), window=4)
    np.testing.assert_allclose(out[0, 0, :, 0], [2 / (1 + np.exp(-6)), 1.0], rtol=1e-6)


def test_the_window_includes_the_query():
    """With queries 0 and no sink to speak of, the output is the mean of the last `window` tokens."""
    kv, nothing = jnp.arange(8.0)[None, :, None], jnp.full((1,), -1e9)
    out, _ = attention.dense_attention(jnp.zeros((1, 8, 1, 1)), kv, nothing, segment_ids=_one_document(8), window=3)
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0.5, 1, 2, 3, 4, 5, 6], rtol=1e-6)
