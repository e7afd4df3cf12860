"""Compressed entries against a walk over documents, one block and one channel at a time, in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import packing
from v4train.ops import compress

SEGMENTS, POSITIONS = packing.layout()
WIDTH = 3


def _draw(overlap, ratio, *, seed=0):
    rng, features = np.random.default_rng(seed), WIDTH * (2 if overlap else 1)
    values, gates = rng.normal(size=(2, len(SEGMENTS), packing.LENGTH, features)).astype(np.float32)
    return values, 2 * gates, rng.normal(size=(ratio, features)).astype(np.float32)


def _pooled(values, gates, table, *, overlap):
    """Entries of every block, ``[B, N, WIDTH]``; unused slots are 0."""
    ratio = len(table)
    out = np.zeros((len(values), packing.LENGTH // ratio, WIDTH))
    for b, row in enumerate(packing.blocks(SEGMENTS, POSITIONS, ratio=ratio)):
        for n, block in enumerate(row):
            for channel in range(WIDTH):
                own = channel + (WIDTH if overlap else 0)
                slots = [(t, place, own) for place, t in enumerate(block.tokens)]
                if overlap and block.previous is not None:
                    slots += [(t, place, channel) for place, t in enumerate(block.previous)]
                weight = np.exp([np.float64(gates[b, t, c]) + table[place, c] for t, place, c in slots])
                out[b, n, channel] = weight @ [np.float64(values[b, t, c]) for t, _, c in slots] / weight.sum()
    return out


@jax.jit
def _table4(segment_ids, positions):
    return compress.block_table(segment_ids, positions, ratio=4)


def _run(values, gates, table, *, overlap):
    @jax.jit
    def run(values, gates, table, segment_ids, positions):
        blocks = compress.block_table(segment_ids, positions, ratio=len(table))
        return compress.pool(values, gates, table, blocks, overlap=overlap), blocks

    return run(values, gates, table, SEGMENTS, POSITIONS)


@pytest.mark.parametrize("ratio", [1, 2, 4, 16, 37])
def test_the_table_holds_the_complete_blocks_of_every_document(ratio):
    found = jax.tree.map(np.asarray, compress.block_table(SEGMENTS, POSITIONS, ratio=ratio))
    assert found.end.shape == (len(SEGMENTS), packing.LENGTH // ratio)
    for b, row in enumerate(packing.blocks(SEGMENTS, POSITIONS, ratio=ratio)):
        unused = found.end.shape[1] - len(row)
        assert found.end[b].tolist() == [block.tokens[-1] for block in row] + [packing.LENGTH] * unused
        assert found.segment[b].tolist() == [block.segment for block in row] + [0] * unused
        assert found.position[b].tolist() == [block.position for block in row] + [0] * unused
        assert found.has_previous[b].tolist() == [block.previous is not None for block in row] + [False] * unused


def test_an_entry_is_at_the_position_of_its_first_token():
    """m i, not i: with one block one could not tell."""
    table = _table4(*packing.layout({"one": [(0, 19)]}, length=19))
    assert table.position.tolist() == [[0, 4, 8, 12]]
    assert table.end.tolist() == [[3, 7, 11, 15]]  # the tail of 3 tokens makes no entry
    assert table.has_previous.tolist() == [[False, True, True, True]]


def test_a_document_that_continues_keeps_its_grid_of_blocks():
    """It starts at position 6: positions 6 and 7 belong to a block whose head is in an earlier row, so the first entry is at 8, alone."""
    table = _table4(*packing.layout({"continues": [(6, 13)]}, length=19))
    assert table.position.tolist() == [[8, 12, 0, 0]]
    assert table.end.tolist() == [[5, 9, 19, 19]]
    assert table.has_previous.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("ratio", [4, 16])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "plain"])
def test_pooling_agrees_with_the_walk(ratio, overlap):
    inputs = _draw(overlap, ratio)
    out, blocks = _run(*inputs, overlap=overlap)
    used = np.asarray(blocks.segment)[..., None] > 0
    assert used.any()
    np.testing.assert_allclose(np.where(used, out, 0), _pooled(*inputs, overlap=overlap), rtol=1e-5, atol=1e-6)
    assert np.isfinite(out).all()


def test_the_first_half_of_the_features_goes_to_the_next_block():
    """With gates 0 an entry is a mean: of its own tokens' second half, and of the first half of the block before, if there is one."""
    tokens = np.arange(8, dtype=np.float32)
    values = np.stack([100 + tokens, tokens], axis=-1)[None]
    blocks = compress.block_table(np.ones((1, 8), np.int32), np.arange(8, dtype=np.int32)[None], ratio=4)
    out = compress.pool(values, jnp.zeros_like(values), jnp.zeros((4, 2)), blocks, overlap=True)
    np.testing.assert_allclose(out[0, :, 0], [1.5, (101.5 + 5.5) / 2], rtol=1e-6)


def test_the_table_is_added_by_place_and_half():
    """A large logit selects one token: place 2 of the block before by the first half, place 1 of the own block by the second."""
    tokens = np.arange(8, dtype=np.float32)
    values = np.stack([100 + tokens, tokens], axis=-1)[None]
    blocks = compress.block_table(np.ones((1, 8), np.int32), np.arange(8, dtype=np.int32)[None], ratio=4)
    for half, expected in ((0, [1.5, 102.0]), (1, [1.0, 5.0])):
        table = np.zeros((4, 2), np.float32)
        table[2 - half, half] = 50
        out = compress.pool(values, jnp.zeros_like(values), table, blocks, overlap=True)
        np.testing.assert_allclose(out[0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "plain"])
def test_gradients_of_all_inputs_agree_with_finite_differences(overlap):
    inputs = _draw(overlap, 4)
    blocks = _table4(SEGMENTS, POSITIONS)
    used = np.asarray(blocks.segment)[..., None] > 0
    ct = np.where(used, np.random.default_rng(1).normal(size=(len(SEGMENTS), packing.LENGTH // 4, WIDTH)), 0).astype(np.float32)
    pull = jax.jit(lambda ct, *inputs: jax.vjp(lambda *x: compress.pool(*x, blocks, overlap=overlap), *inputs)[1](ct))
    for place, gradient in enumerate(pull(ct, *inputs)):
        assert np.isfinite(gradient).all()
        direction = np.random.default_rng(place).normal(size=gradient.shape)
        high, low = ([np.float64(x) + (h * direction if i == place else 0) for i, x in enumerate(inputs)] for h in (1e-5, -1e-5))
        slope = ((_pooled(*high, overlap=overlap) - _pooled(*low, overlap=overlap)) * ct).sum() / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_tokens_outside_complete_blocks_get_no_gradient():
    """Tails, heads of continued documents, documents shorter than a block, padding."""
    values, gates, table = _draw(True, 4)
    blocks = _table4(SEGMENTS, POSITIONS)
    used = np.asarray(blocks.segment)[..., None] > 0

    def loss(values, gates):
        return jnp.where(used, compress.pool(values, gates, table, blocks, overlap=True), 0).sum()

    own, into_next = np.zeros((2, *SEGMENTS.shape), bool)
    for b, row in enumerate(packing.blocks(SEGMENTS, POSITIONS, ratio=4)):
        for block in row:
            own[b, block.tokens] = True
            into_next[b, block.previous or []] = True
    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(values, gates):
        reached = np.asarray(gradient) != 0
        np.testing.assert_array_equal(reached[..., WIDTH:].all(-1), own)
        np.testing.assert_array_equal(reached[..., WIDTH:].any(-1), own)
        np.testing.assert_array_equal(reached[..., :WIDTH].all(-1), into_next)
        np.testing.assert_array_equal(reached[..., :WIDTH].any(-1), into_next)


def test_a_document_gets_the_same_entries_alone_and_packed():
    values, gates, table = _draw(True, 4)
    row = list(packing.ROWS).index("three documents")
    packed, _ = _run(values, gates, table, overlap=True)
    alone = compress.block_table(np.ones((1, 14), np.int32), np.arange(14, dtype=np.int32)[None], ratio=4)
    out = compress.pool(values[row : row + 1, 9:23], gates[row : row + 1, 9:23], table, alone, overlap=True)
    np.testing.assert_allclose(packed[row, 2:5], out[0], rtol=1e-5, atol=1e-6)


def test_the_softmax_of_bf16_features_is_fp32():
    """Only the result is rounded: a bf16 softmax over 32 slots would be off by several times 2^-8."""
    values, gates, table = _draw(True, 16)
    values, gates = jnp.asarray(values, jnp.bfloat16), jnp.asarray(gates, jnp.bfloat16)
    out, blocks = _run(values, gates, table, overlap=True)
    assert out.dtype == jnp.bfloat16
    exact = _pooled(np.asarray(values, np.float64), np.asarray(gates, np.float64), table, overlap=True)
    used = np.asarray(blocks.segment)[..., None] > 0
    np.testing.assert_allclose(np.where(used, np.asarray(out, np.float64), 0), exact, rtol=2.0**-8, atol=1e-6)
