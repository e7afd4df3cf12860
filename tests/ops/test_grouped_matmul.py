"""Grouped matmul against a loop over rows in numpy fp64, forward and backward, for all implementations that run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.ops import grouped_matmul

SIZES = {
    "balanced": (16, 16, 16),
    "skewed": (0, 40, 0),
    "empty_ends": (0, 17, 0),
    "full": (30, 10, 24),
    "longer_than_a_block": (3, 44, 5),
    "nothing": (0, 0, 0),
}
ROWS, WIDTH, HIDDEN = 64, 5, 7


@pytest.fixture(params=["dense", "ragged_dot", "blocked"])
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "BLOCK_ROWS", 8)


def _case(sizes, *, rows=ROWS, dtype=np.float32, seed=0):
    """x, w, dy; rows past the end are NaN in x and dy, since nobody may look at them."""
    rng = np.random.default_rng(seed)
    used = sum(sizes)
    x, dy = rng.normal(size=(rows, WIDTH)).astype(dtype), rng.normal(size=(rows, HIDDEN)).astype(dtype)
    x[used:], dy[used:] = np.nan, np.nan
    return x, rng.normal(size=(len(sizes), WIDTH, HIDDEN)).astype(dtype), dy


def _oracle(x, w, dy, sizes):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row], dx[row] = x[row] @ w[group], w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


def _forward_and_backward(x, w, dy, sizes, implementation):
    @jax.jit
    def run(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *pull(dy)

    return run(x, w, dy, jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("case", SIZES)
def test_agrees_with_a_loop_over_rows(case, implementation):
    x, w, dy = _case(SIZES[case])
    got = _forward_and_backward(x, w, dy, SIZES[case], implementation)
    for name, array, expected in zip(("y", "dx", "dw"), got, _oracle(x, w, dy, SIZES[case]), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_bf16_accumulates_in_fp32(implementation):
    """Sums of 300 positive terms: accumulated in bf16 they would stop growing at 256 times a term."""
    sizes = (300, 0, 200)
    x, w, dy = (jnp.asarray(np.abs(a), jnp.bfloat16) for a in _case(sizes, rows=512))
    got = _forward_and_backward(x, w, dy, sizes, implementation)
    for array, expected in zip(got, _oracle(x, w, dy, sizes), strict=True):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(array, np.float64), expected, rtol=2**-8)


def test_buffer_smaller_than_a_block(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "BLOCK_ROWS", 64)
    x, w, dy = _case((2, 0, 3), rows=6)
    got = _forward_and_backward(x, w, dy, (2, 0, 3), "blocked")
    for array, expected in zip(got, _oracle(x, w, dy, (2, 0, 3)), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_work_of_blocked_follows_the_used_rows():
    """The loops' trip counts come from the group sizes: no product in the program is larger than one block."""
    x, w, _ = _case(SIZES["balanced"], rows=4096)
    run = jax.jit(lambda x, w, s: grouped_matmul.grouped_matmul(x, w, s, implementation="blocked"))
    cost = run.lower(x, w, jnp.asarray(SIZES["balanced"], jnp.int32)).compile().cost_analysis()
    block_flops = 2 * grouped_matmul.BLOCK_ROWS * WIDTH * HIDDEN
    dense_flops = 2 * 4096 * WIDTH * HIDDEN
    assert block_flops <= cost["flops"] < dense_flops / 4


def test_unknown_implementation_names_the_options():
    with pytest.raises(ValueError, match=r"unknown implementation 'magic'; choose one of dense, ragged_dot, blocked"):
        grouped_matmul.grouped_matmul(jnp.ones((4, 2)), jnp.ones((1, 2, 3)), jnp.ones(1, jnp.int32), implementation="magic")
