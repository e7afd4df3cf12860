"""The indexer's recall while all entries are attended, against the loops, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import attention_case as cases
from tests.ops import jaxprs
from v4train.ops import sparse_attention

CASE = cases.draw(seed=3)


def attend(case, *, top_k, chunk=8, window=cases.WINDOW):
    return sparse_attention.attend(
        case.query,
        case.kv,
        case.sink,
        segment_ids=cases.SEGMENTS,
        window=window,
        chunk=chunk,
        entries=cases.entries(case.values),
        index=case.index,
        selection=sparse_attention.Selection(top_k=None, teach=True, recall_at=top_k),
    )


def looped(*, top_k):
    """``[B, 3]``: a query at a time, in fp64: sort the visible entries by score, add up the teacher's part of the first k."""
    found = cases.loop(CASE, top_k=None)
    sums = np.zeros((cases.BATCH, 3))
    for b, t in np.ndindex(found.seen.shape[:2]):
        visible = np.flatnonzero(found.seen[b, t])
        if len(visible) <= top_k:
            continue
        mass = found.shares[b, :, t].sum(axis=0)[visible]
        best = np.argsort(-found.scores[b, t, visible], kind="stable")[:top_k]
        sums[b] += mass[best].sum() / mass.sum(), np.sort(mass)[-top_k:].sum() / mass.sum(), 1
    return sums


@pytest.mark.parametrize("chunk", [8, 64], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_it_is_the_teachers_part_of_the_best_entries(top_k, chunk):
    with jax.default_matmul_precision("highest"):
        ours = cases.jit(lambda case: attend(case, top_k=top_k, chunk=chunk).recall)(CASE)
    expected = looped(top_k=top_k)
    assert expected[:, 2].sum() > 10
    assert 0.1 < expected[:, 0].sum() / expected[:, 2].sum() < 0.95, "the case tells a good indexer from a bad one"
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_no_query_counts_that_sees_no_more_than_it_would_pick():
    np.testing.assert_array_equal(attend(CASE, top_k=CASE.values.shape[1]).recall, 0)


def test_an_indexer_that_scores_as_the_teacher_attends_has_the_highest_recall():
    """The scores decide which entries count: those of the teacher itself find the most, their negative the least."""
    query, index = np.ones((1, 4, 1, 2), np.float32), np.ones((1, 4, 1), np.float32)
    values = np.log(np.array([[[4.0, 4.0], [2.0, 2.0], [1.0, 1.0]]], np.float32)) / np.sqrt(2)

    def recall(keys):
        return sparse_attention.attend(
            query,
            np.zeros((1, 4, 2), np.float32),
            np.zeros(1, np.float32),
            segment_ids=np.ones((1, 4), np.int32),
            window=1,
            chunk=4,
            entries=sparse_attention.Entries(jnp.asarray(values), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32)),
            index=sparse_attention.Index(query, index, jnp.asarray(keys)),
            selection=sparse_attention.Selection(top_k=None, teach=True, recall_at=1),
        ).recall[0]

    keys = np.array([[[3.0, 0], [2.0, 0], [1.0, 0]]], np.float32)
    np.testing.assert_allclose(recall(keys), [4 * 4 / 7, 4 * 4 / 7, 4], rtol=1e-5)
    np.testing.assert_allclose(recall(keys[:, ::-1]), [4 * 1 / 7, 4 * 4 / 7, 4], rtol=1e-5)


def test_it_has_no_gradient_and_costs_nothing_where_it_is_not_asked_for():
    gradient = jax.grad(lambda case: attend(case, top_k=2).recall[:, :2].sum())(CASE)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))
    for top_k in (None, 2):
        names = [e.primitive.name for e in jaxprs.equations(jax.make_jaxpr(lambda case, k=top_k: attend(case, top_k=k))(CASE))]
        assert ("top_k" in names) == (top_k is not None)
    assert attend(CASE, top_k=None).recall is None
