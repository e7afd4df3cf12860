"""Chunked and gathered attention against the dense oracle and the loops: values, gradients, the indexer's loss, and size.

The rows of `packing` put every hard case into one batch, so that each program is compiled once: documents that continue in the middle of a
block, documents shorter than a block, padding, rows without any entry.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import attention_case as cases
from tests.ops import jaxprs
from v4train.ops import attention, sparse_attention

CASE = cases.draw()
MODES = {  # of the layers that have entries
    "dense": None,
    "warm-up": sparse_attention.Selection(top_k=None, teach=True),
    "sparse": sparse_attention.Selection(top_k=cases.TOP_K, teach=True),
}
CHUNK = 8  # five chunks, the last one not full
OUT_COTANGENT = np.random.default_rng(1).normal(size=(cases.BATCH, cases.LENGTH, cases.HEADS, cases.WIDTH)).astype(np.float32)
INDEX = ("query", "weight", "key")


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def _attend(case, selection, chunk):
    return sparse_attention.attend(
        case.query,
        case.kv,
        case.sink,
        segment_ids=cases.SEGMENTS,
        window=cases.WINDOW,
        chunk=chunk,
        entries=cases.entries(case.values),
        index=case.index,
        selection=selection,
    )


@functools.cache
def _run(mode: str, chunk: int = CHUNK):
    """Output, loss, gradients by the output's cotangent, gradients by the loss."""

    @cases.jit
    def run(case):
        attended, pull = jax.vjp(lambda case: _attend(case, MODES[mode], chunk), case)
        by_out = pull(sparse_attention.Attended(OUT_COTANGENT, jnp.zeros(cases.BATCH)))[0]
        by_loss = pull(sparse_attention.Attended(jnp.zeros_like(OUT_COTANGENT), jnp.ones(cases.BATCH)))[0]
        return attended, by_out, by_loss

    return run(CASE)


def _looped(mode: str):
    return cases.loop(CASE, top_k=cases.TOP_K if mode == "sparse" else None)


@pytest.mark.parametrize("mode", MODES)
def test_output_and_loss_agree_with_the_loops(mode):
    attended, *_ = _run(mode)
    expected = _looped(mode)
    np.testing.assert_allclose(attended.out, expected.out, atol=1e-5)
    np.testing.assert_allclose(attended.indexer_loss, 0 if mode == "dense" else expected.loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(attended.out)[cases.SEGMENTS == 0], 0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_output_agree_with_the_oracle(mode):
    _, gradients, _ = _run(mode)
    seen = jnp.asarray(_looped(mode).seen)

    def oracle(query, kv, sink, values):
        return attention.dense_attention(
            query, kv, sink, segment_ids=cases.SEGMENTS, window=cases.WINDOW, entries=cases.entries(values), attended=seen
        )[0]

    expected = cases.jit(lambda *x: jax.vjp(oracle, *x)[1](jnp.asarray(OUT_COTANGENT)))(*CASE[:4])
    for name, ours, theirs in zip(cases.Case._fields, gradients, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)
        assert np.abs(theirs).max() > 0.1, name
    for name, gradient in zip(INDEX, gradients.index, strict=True):
        np.testing.assert_array_equal(gradient, 0, err_msg=f"the selection has no derivative: {name}")


@pytest.mark.parametrize("mode", ["warm-up", "sparse"])
def test_the_loss_teaches_the_indexer_and_nothing_else(mode):
    """d KL / d score = student - teacher, pushed through the weights and the ReLU."""
    _, _, gradients = _run(mode)
    for name, gradient in zip(cases.Case._fields, gradients[:4], strict=False):
        np.testing.assert_array_equal(gradient, 0, err_msg=name)
    expected = _looped(mode)
    teacher = expected.shares.sum(1)
    teacher = teacher / np.maximum(teacher.sum(-1, keepdims=True), 1e-30)
    student = np.where(expected.seen, np.exp(expected.scores), 0)
    student = student / np.maximum(student.sum(-1, keepdims=True), 1e-30)
    query, weight, key = (np.asarray(x, np.float64) for x in CASE.index)
    products = np.einsum("bsij,bnj->bsin", query, key)
    by_weight = np.einsum("bsn,bsin->bsi", student - teacher, np.maximum(products, 0))
    by_product = np.einsum("bsn,bsi,bsin->bsin", student - teacher, weight, products > 0)
    by_query, by_key = np.einsum("bsin,bnj->bsij", by_product, key), np.einsum("bsin,bsij->bnj", by_product, query)
    for name, ours, theirs in zip(INDEX, gradients.index, (by_query, by_weight, by_key), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)
        assert np.abs(theirs).max() > 0.1, name


def test_dense_layers_have_no_indexer_loss_and_no_gradient_into_the_indexer():
    attended, _, by_loss = _run("dense")
    np.testing.assert_array_equal(attended.indexer_loss, 0)
    assert all(not np.any(x) for x in jax.tree.leaves(by_loss))


def test_everything_is_finite_where_no_entry_is_visible():
    """Rows of padding only, first tokens of documents, documents shorter than a block: forward and backward."""
    lonely = ~_looped("warm-up").seen.any(-1)
    assert lonely[cases.SEGMENTS > 0].any()
    for mode in MODES:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(_run(mode))), mode
    _, _, gradients = _run("sparse")
    np.testing.assert_array_equal(np.asarray(gradients.index.query)[lonely], 0)
    np.testing.assert_array_equal(np.asarray(gradients.index.weight)[lonely], 0)


def test_entries_that_only_fill_up_a_selection_get_nothing():
    """Unused slots are picked where fewer than `top_k` are visible; no gradient reaches them."""
    unused = np.asarray(cases.entries(CASE.values).segment)[..., None] == 0
    for gradients in _run("sparse")[1:]:
        np.testing.assert_array_equal(np.where(unused, gradients.values, 0), 0)
        np.testing.assert_array_equal(np.where(unused, gradients.index.key, 0), 0)


@pytest.mark.parametrize("mode", ["warm-up", "sparse"])
@pytest.mark.parametrize("chunk", [1, 12, 37, 64], ids=["raised to the window", "not a divisor", "one chunk", "longer than the row"])
def test_results_do_not_depend_on_the_chunk(mode, chunk):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), _run(mode, chunk), _run(mode))


@pytest.mark.parametrize("length", [3, 5, 7, 8, 9, 16, 37])
def test_windows_alone_agree_with_the_loops_at_every_length(length):
    """Shorter than the window, one chunk, exactly two, one token more."""

    @cases.jit
    def run(query, kv, segment_ids):
        return sparse_attention.attend(query, kv, CASE.sink, segment_ids=segment_ids, window=cases.WINDOW, chunk=CHUNK)

    attended = run(*(x[:, :length] for x in (CASE.query, CASE.kv, cases.SEGMENTS)))
    np.testing.assert_allclose(attended.out, cases.loop(CASE, top_k=None, use_entries=False).out[:, :length], atol=1e-5)
    np.testing.assert_array_equal(attended.indexer_loss, 0)


def test_gradients_of_a_window_layer_agree_with_the_oracle():
    def ours(query, kv, sink):
        return sparse_attention.attend(query, kv, sink, segment_ids=cases.SEGMENTS, window=cases.WINDOW, chunk=CHUNK).out

    def theirs(query, kv, sink):
        return attention.dense_attention(query, kv, sink, segment_ids=cases.SEGMENTS, window=cases.WINDOW)[0]

    pulls = [cases.jit(lambda *x, f=f: jax.vjp(f, *x)[1](jnp.asarray(OUT_COTANGENT)))(*CASE[:3]) for f in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *pulls)


def test_selection_prunes_beyond_top_k_entries_and_only_there():
    """A sparse test in which S <= m k would be a dense one."""
    sparse, dense = (np.asarray(_run(mode)[0].out) for mode in ("sparse", "warm-up"))
    visible = _looped("warm-up").seen.sum(-1)
    pruned = visible > cases.TOP_K
    assert pruned.any()
    assert (np.abs(sparse - dense).max((-1, -2)) > 1e-4)[pruned].all()
    np.testing.assert_allclose(sparse[~pruned], dense[~pruned], atol=1e-6)


@pytest.mark.parametrize("block", [2, 4, 8], ids=lambda n: f"{n} entries")
def test_a_selection_made_block_by_block_is_the_same(monkeypatch, block):
    """Nine entries: in five, three and two blocks, the last one not full. Forward, backward, and the loss."""
    monkeypatch.setattr(sparse_attention, "BLOCK", block)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), _run.__wrapped__("sparse"), _run("sparse"))


@pytest.mark.parametrize("block", [2, 4])
def test_of_equal_scores_the_earlier_entries_are_taken_block_by_block_too(monkeypatch, block):
    monkeypatch.setattr(sparse_attention, "BLOCK", block)
    tied = CASE._replace(index=CASE.index._replace(weight=np.zeros_like(CASE.index.weight)))
    attended = cases.jit(lambda case: _attend(case, MODES["sparse"], CHUNK))(tied)
    np.testing.assert_allclose(attended.out, cases.loop(tied, top_k=cases.TOP_K).out, atol=1e-5)


def test_blocks_in_which_a_chunk_sees_nothing_are_passed_over():
    """Six chunks of six tokens, two blocks of three entries each; documents of 18 tokens."""
    segment = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 18, axis=1)
    end, of = jnp.array([[3, 7, 11, 15, 21, 25, 29, 33, 36, 36, 36, 36]]), jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]])
    found = []
    for i in range(6):
        mine = segment[:, 6 * i : 6 * i + 6]
        chunk = sparse_attention._Chunk(jnp.int32(6 * i), mine, mine, mine, mine, None, None)
        found.append(tuple(int(x) for x in sparse_attention._blocks_with_visible(chunk, end, of, 3)))
    assert found == [(0, 1), (0, 1), (0, 2), (1, 2), (1, 3), (1, 3)]
    nothing = sparse_attention._Chunk(jnp.int32(0), *(jnp.zeros((1, 6), jnp.int32),) * 4, None, None)
    start, stop = sparse_attention._blocks_with_visible(nothing, end, of, 3)
    assert stop <= start


def test_a_top_k_that_covers_all_entries_is_dense_attention():
    everything = sparse_attention.Selection(top_k=cases.LENGTH // cases.RATIO, teach=True)
    attended = cases.jit(lambda case: _attend(case, everything, CHUNK))(CASE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), attended, _run("warm-up")[0])
    almost = sparse_attention.Selection(top_k=cases.LENGTH // cases.RATIO - 1, teach=True)
    expected = cases.loop(CASE, top_k=almost.top_k)
    np.testing.assert_allclose(cases.jit(lambda case: _attend(case, almost, CHUNK))(CASE).out, expected.out, atol=1e-5)


def test_the_teacher_keeps_window_and_sink_in_the_denominator():
    """By hand: window mass 1; head 0 has masses 2, 3 and sink 4 (shares 1/5, 3/10), head 1 has 1/2, 1/3 and sink 1/6 (1/4, 1/6).

    Summed, the teacher is 27 : 28. Without window and sink (2/5 + 3/5, 3/5 + 2/5) it would be 1 : 1. The student says 1 : 3.
    """
    attended = sparse_attention.attend(
        jnp.array([[[[1.0], [-1.0]]]]),
        jnp.zeros((1, 1, 1)),
        jnp.log(jnp.array([4.0, 1 / 6])),
        segment_ids=np.ones((1, 1), np.int32),
        window=1,
        chunk=1,
        entries=sparse_attention.Entries(jnp.log(jnp.array([[[2.0], [3.0]]])), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)),
        index=sparse_attention.Index(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1)), jnp.log(jnp.array([[[1.0], [3.0]]]))),
        selection=MODES["warm-up"],
    )
    by_hand = 27 / 55 * np.log(27 / 55 * 4) + 28 / 55 * np.log(28 / 55 * 4 / 3)
    np.testing.assert_allclose(attended.indexer_loss, [by_hand], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_comes_later_or_from_another_document_changes_nothing(mode):
    """One token and one entry are replaced at a time; bitwise, for the compiled program is the same."""
    run = cases.jit(lambda case: _attend(case, MODES[mode], CHUNK).out)
    out, ends = np.asarray(run(CASE)), np.asarray(cases.entries(CASE.values).end)
    for b, t in ((0, 20), (1, 10), (2, 5), (4, 12)):
        kv = CASE.kv.copy()
        kv[b, t] += 1
        changed = (np.asarray(run(CASE._replace(kv=kv))) != out).any((-1, -2))
        after = np.arange(cases.LENGTH)
        expected = (after >= t) & (after < t + cases.WINDOW) & (cases.SEGMENTS[b] == cases.SEGMENTS[b, t])
        np.testing.assert_array_equal(changed[b], expected)
        assert changed.sum() == expected.sum()
    for b, n in ((0, 3), (1, 1), (2, 4), (4, 2)):
        values = CASE.values.copy()
        values[b, n] += 1
        key = CASE.index.key.copy()
        key[b, n] += 1
        changed = (np.asarray(run(CASE._replace(values=values, index=CASE.index._replace(key=key)))) != out).any((-1, -2))
        end = ends[b, n]
        allowed = (np.arange(cases.LENGTH) >= end) & (cases.SEGMENTS[b] == cases.SEGMENTS[b, end])
        assert not changed[b, ~allowed].any()
        assert changed[b].any()
        assert changed.sum() == changed[b].sum()
        if mode != "sparse":
            np.testing.assert_array_equal(changed[b], allowed)


def test_two_runs_are_bitwise_equal():
    """Also the gradients of entries that many queries have selected, which are sums in some order."""

    @cases.jit
    def gradients(case):
        return jax.grad(lambda case: sum(x.sum() for x in jax.tree.leaves(_attend(case, MODES["sparse"], CHUNK))))(case)

    jax.tree.map(np.testing.assert_array_equal, gradients(CASE), gradients(CASE))


def test_bf16_inputs_are_accumulated_in_fp32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), CASE)._replace(sink=CASE.sink)
    attended = cases.jit(lambda case: _attend(case, MODES["sparse"], CHUNK))(half)
    assert attended.out.dtype == jnp.bfloat16
    assert attended.indexer_loss.dtype == jnp.float32
    expected = cases.loop(jax.tree.map(lambda x: np.asarray(x, np.float64), half), top_k=cases.TOP_K)
    np.testing.assert_allclose(np.asarray(attended.out, np.float64), expected.out, atol=0.05)
    np.testing.assert_allclose(attended.indexer_loss, expected.loss, rtol=0.02, atol=1e-4)


def test_large_logits_do_not_overflow():
    loud = CASE._replace(query=1e4 * CASE.query, sink=np.array([1e4, -1e4, 0], np.float32))
    out, gradients = cases.jit(jax.value_and_grad(lambda case: (_attend(case, MODES["sparse"], CHUNK).out ** 2).sum()))(loud)
    assert np.isfinite(out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def _largest(mode, length, *, dense=False):
    """Elements of the largest array in forward and backward pass of one row."""
    n, f32 = length // 4, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    case = cases.Case(
        f32((1, length, 4, 16)), f32((1, length, 16)), f32((4,)), f32((1, n, 16)),
        sparse_attention.Index(f32((1, length, 2, 8)), f32((1, length, 2)), f32((1, n, 8))),
    )  # fmt: skip
    segments, end = np.ones((1, length), np.int32), jnp.arange(3, length, 4)[None]

    def loss(case):
        entries = sparse_attention.Entries(case.values, end, jnp.ones_like(end))
        if dense:
            return attention.dense_attention(*case[:3], segment_ids=segments, window=32, entries=entries)[0].sum()
        attended = sparse_attention.attend(
            *case[:3], segment_ids=segments, window=32, chunk=32, entries=entries, index=case.index, selection=MODES[mode]
        )
        return attended.out.sum() + attended.indexer_loss.sum()

    return jaxprs.largest_result(jax.grad(loss), case)


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_linear_in_the_sequence(mode):
    """No S x S and no S x N array, anywhere in the program, the bodies of its loops included."""
    assert _largest(mode, 8192) == 2 * _largest(mode, 4096)
    assert _largest(mode, 8192) <= 8192 * 4 * 16
    assert _largest(mode, 256, dense=True) >= 4 * 256 * (256 + 64)


def test_sparse_layers_touch_only_selected_entries():
    """Attention itself multiplies with k entries a query: no product of all heads with all entries, as a masked implementation has."""
    length, n = 4096, 1024
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def out(query, kv, values, index_query, index_weight, index_key):
        end = jnp.arange(3, length, 4)[None]
        return sparse_attention.attend(
            query, kv, jnp.zeros(4), segment_ids=np.ones((1, length), np.int32), window=32, chunk=32,
            entries=sparse_attention.Entries(values, end, jnp.ones_like(end)),
            index=sparse_attention.Index(index_query, index_weight, index_key), selection=MODES["sparse"],
        ).out  # fmt: skip

    shapes = [(1, length, 4, 16), (1, length, 16), (1, n, 16), (1, length, 2, 8), (1, length, 2), (1, n, 8)]
    products = [e for e in jaxprs.equations(jax.make_jaxpr(out)(*map(f32, shapes))) if e.primitive.name == "dot_general"]
    with_all = [e for e in products if n in e.outvars[0].aval.shape]
    assert {e.invars[0].aval.shape[-1] for e in products} >= {8, 16}
    assert all(4 not in e.outvars[0].aval.shape for e in with_all), [e.outvars[0].aval.shape for e in with_all]
    assert len(with_all) == 2  # the index scores: keys with queries, then weights
