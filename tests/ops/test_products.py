"""FP8 products against fp64: with factors that numpy has rounded block by block, and against the exact products within the formats' bounds.

Two kinds of bound, none of them measured. *Same numerics*: with the same rounded factors, the only error is that of fp32 sums, at most
``n 2^-24`` of the sum of magnitudes for n terms, and the rounding of the result. *Quantisation*: an element moves by at most
``e = max(2^-4 |x|, 2^-10 scale)``, so a product moves by at most ``(|a| + e_a)(|b| + e_b) - |a||b|``, and a sum by the sum of these.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4train.numerics import policy
from v4train.ops import grouped_matmul, products, select
from v4train.ops.kernels import grouped_matmul_triton

TILE = 128
SIZES = {"whole_tiles": (2, 128, 256, 128), "cut_off": (2, 40, 160, 48), "smaller_than_a_tile": (1, 24, 32, 64)}
GROUPS = {"balanced": (40, 60, 50), "skewed": (0, 150, 7), "one_row": (1, 0, 159)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "BLOCK_ROWS", 16)
    monkeypatch.setattr(grouped_matmul_triton, "BLOCK_ROWS", 16)


def wide(rng, *shape):
    return (rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * 2)).astype(np.float32)


def rounded(x, block):
    """Values and scales in fp64, by a loop over blocks of the last two axes; written from the definition."""
    x = np.asarray(x, np.float64)
    values, scales = np.zeros_like(x), np.ones_like(x)
    for lead in np.ndindex(*x.shape[:-2]):
        for i in range(0, x.shape[-2], block[0]):
            for j in range(0, x.shape[-1], block[1]):
                at = (*lead, slice(i, i + block[0]), slice(j, j + block[1]))
                amax = np.abs(x[at]).max()
                if amax:
                    scales[at] = 2.0 ** min(e for e in range(-60, 60) if amax <= 464 * 2.0**e)
                    values[at] = (x[at] / scales[at]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales[at]
    return values, scales


def moved(x, block):
    """The most that rounding moves each element."""
    return np.maximum(np.abs(x) * 2.0**-4, rounded(x, block)[1] * 2.0**-10)


def assert_same_numerics(got, a, b, product, *, terms):
    """``got`` is the product of rounded factors, but for sums in fp32."""
    room = 2 * terms * 2.0**-24 * product(np.abs(a), np.abs(b)) + 1e-30
    assert np.all(np.abs(np.asarray(got, np.float64) - product(a, b)) <= room)


def assert_within_quantisation(got, a, b, product, *, errors, terms):
    bound = product(np.abs(a) + errors[0], np.abs(b) + errors[1]) - product(np.abs(a), np.abs(b))
    room = 2 * terms * 2.0**-24 * product(np.abs(a) + errors[0], np.abs(b) + errors[1])
    error = np.abs(np.asarray(got, np.float64) - product(a, b))
    assert np.all(error <= bound + room)
    assert error.max() > bound.max() / 100, "rounded at all"


def run_linear(x, w, dy, probe=None):
    @jax.jit
    def run(x, w, dy, probe):
        y, pull = jax.vjp(lambda x, w, probe: products.Fp8(probe).linear(x, w), x, w, probe)
        return y, *pull(dy)

    return run(x, w, dy, probe)


def along_rows(x):
    """[b, s, d] as numpy blocks of 128 tokens and one channel."""
    return rounded(x, (TILE, 1))


@pytest.mark.parametrize("case", SIZES)
def test_the_three_products(case):
    b, s, d, f = SIZES[case]
    rng = np.random.default_rng(0)
    x, dy = wide(rng, b, s, d), wide(rng, b, s, f)
    master = wide(rng, d, f)
    w = np.asarray(policy.straight_through(jnp.asarray(master), "fp8"))
    y, dx, dw, _ = run_linear(x, w, dy)
    forward, backward = functools.partial(np.einsum, "bsd,df->bsf"), functools.partial(np.einsum, "bsf,df->bsd")
    weight = functools.partial(np.einsum, "bsd,bsf->df")
    w64, row = rounded(master, (TILE, TILE))[0], (1, TILE)
    np.testing.assert_array_equal(w, w64)
    assert_same_numerics(y, rounded(x, row)[0], w64, forward, terms=d)
    assert_same_numerics(dx, rounded(dy, row)[0], w64, backward, terms=f)
    assert_same_numerics(dw, along_rows(x)[0], along_rows(dy)[0], weight, terms=b * s)
    x, dy, master = (a.astype(np.float64) for a in (x, dy, master))
    of_w = moved(master, (TILE, TILE))
    assert_within_quantisation(y, x, master, forward, errors=(moved(x, row), of_w), terms=d)
    assert_within_quantisation(dx, dy, master, backward, errors=(moved(dy, row), of_w), terms=f)
    assert_within_quantisation(dw, x, dy, weight, errors=(moved(x, (TILE, 1)), moved(dy, (TILE, 1))), terms=b * s)


def test_a_matrix_for_each_output_group():
    rng = np.random.default_rng(1)
    x, w, dy = wide(rng, 2, 16, 3, 160), wide(rng, 3, 160, 48), wide(rng, 2, 16, 3, 48)
    w = policy.straight_through(jnp.asarray(w), "fp8")
    got = run_linear(x, w, dy)
    each = [run_linear(x[:, :, g], w[g], dy[:, :, g]) for g in range(3)]
    for i, axis in enumerate((2, 2, 0)):
        np.testing.assert_allclose(got[i], jnp.stack([e[i] for e in each], axis=axis), rtol=1e-5, atol=1e-6)


def test_bf16_has_the_numerics_of_fp32():
    """Factors that are exact in bf16 are rounded to the same codes, and bf16 accumulates in fp32."""
    rng = np.random.default_rng(2)
    x, w, dy = (wide(rng, *shape).astype(ml_dtypes.bfloat16) for shape in ((2, 64, 160), (160, 48), (2, 64, 48)))
    w = policy.straight_through(jnp.asarray(w), "fp8")
    low = run_linear(x, w, dy)
    high = run_linear(*(jnp.asarray(a, jnp.float32) for a in (x, w, dy)))
    for a, b in zip(low[:3], high[:3], strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8 + 1e-6, atol=1e-4)


@pytest.mark.parametrize("implementation", ["dense", "ragged_dot", "blocked", "interpreted", "fp8_interpreted"])
@pytest.mark.parametrize("case", GROUPS)
def test_experts(case, implementation):
    """On FP8 units too: the kernel's 8-bit codes and scales, multiplied by the interpreter."""
    sizes, d, f, rows = GROUPS[case], 160, 48, 176
    used, rng = sum(sizes), np.random.default_rng(3)
    x, dy, master = wide(rng, rows, d), wide(rng, rows, f), wide(rng, len(sizes), d, f)
    x[used:], dy[used:] = np.nan, np.nan
    w = policy.straight_through(jnp.asarray(master), "fp8")
    probe = jnp.zeros(products.PROBE_SHAPE)

    @jax.jit
    def run(x, w, dy, probe):
        def product(x, w, probe):
            with select.using("fp8_experts", implementation=implementation if implementation.startswith("fp8_") else "emulated"):
                return products.Fp8(probe).grouped(x, w, group_sizes=jnp.asarray(sizes), implementation=implementation)

        y, pull = jax.vjp(product, x, w, probe)
        return y, *pull(dy)

    y, dx, dw, counts = run(x, w, dy, probe)
    x[used:], dy[used:] = 0, 0
    member = np.repeat(np.eye(len(sizes)), sizes, axis=0)
    member = np.concatenate([member, np.zeros((rows - used, len(sizes)))])
    row, w64 = (1, TILE), rounded(master, (TILE, TILE))[0]
    assert_same_numerics(y, rounded(x, row)[0], w64, functools.partial(np.einsum, "rg,rd,gdf->rf", member), terms=d)
    assert_same_numerics(dx, rounded(dy, row)[0], w64, functools.partial(np.einsum, "rg,rf,gdf->rd", member), terms=f)
    weight = functools.partial(np.einsum, "rg,rd,rf->gdf", member)
    assert_same_numerics(dw, rounded(x, (TILE, 1))[0], rounded(dy, (TILE, 1))[0], weight, terms=rows)
    assert counts[:, 0].tolist() == [used * d, used * f]


def test_counts_come_out_of_scanned_and_recomputed_layers():
    rng = np.random.default_rng(4)
    x, w = (
        rng.uniform(0.5, 2, (1, 32, 64)).astype(np.float32),
        np.stack([np.asarray(policy.straight_through(jnp.asarray(wide(rng, 64, 64)), "fp8")) for _ in range(3)]),
    )
    x[0, :, 0] = 460.0
    x[0, :, 1] = 2.0**-12

    def loss(x, w, probe):
        product = products.Fp8(probe)
        step = jax.checkpoint(lambda x, w: x + 0 * product.linear(x, w))
        return jnp.sum(jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0])

    counts = jax.jit(jax.grad(loss, argnums=2))(x, w, jnp.zeros(products.PROBE_SHAPE))
    assert counts[0].tolist() == [3 * x.size, 3 * 32, 3 * 32]
    assert counts[1, 0] == 3 * x.size


def test_nothing_is_rounded_in_the_compute_dtype():
    rng = np.random.default_rng(5)
    x, w = wide(rng, 1, 8, 32), wide(rng, 32, 16)
    np.testing.assert_allclose(products.Compute().linear(jnp.asarray(x), jnp.asarray(w)), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [(1, 1), (4, 1), (2, 3)], ids=str)
def test_groups_first_is_the_same_product_with_the_weights_on_the_right(rows):
    rng, (groups, d, f) = np.random.default_rng(5), (3, 40, 24)
    x, w = rng.standard_normal((*rows, groups, d), np.float32), rng.standard_normal((groups, d, f), np.float32)
    program = jax.jit(lambda x, w: products.GroupsFirst().linear(x, w)).lower(x, w)
    exact = np.einsum("bsgd,gdf->bsgf", x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(program.compile()(x, w), exact, rtol=1e-4, atol=1e-4)
    (product,) = [line for line in program.as_text().splitlines() if "dot_general" in line]
    assert product.rstrip().endswith(f"tensor<{groups}x{rows[0]}x{rows[1]}x{f}xf32>"), "what XLA makes of it depends on this order"
    np.testing.assert_allclose(products.GroupsFirst().linear(x[:, :, 0], w[0]), exact[:, :, 0], rtol=1e-4, atol=1e-4)
