"""Block-scaled rounding against the numpy code that writes files, against casts of ml_dtypes, and against the formats' definitions."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4train.interop import quantised
from v4train.numerics import scaled

ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


def wide(shape, *, seed=0, octaves=4.0):
    """Numbers of very different sizes, with zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * octaves)
    return np.where(rng.random(shape) < 0.02, 0, x).astype(np.float32)


def run(x, fmt=scaled.E4M3, block=SQUARE):
    return np.asarray(jax.jit(lambda x: scaled.rounded(x, fmt, block=block))(jnp.asarray(x)))


def blocks(shape, block):
    """The slices of all blocks of the last two axes."""
    for i in range(0, shape[-2], block[0]):
        for j in range(0, shape[-1], block[1]):
            yield (..., slice(i, i + block[0]), slice(j, j + block[1]))


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (48, 32), (128, 1)])
def test_what_training_rounds_to_is_what_a_file_stores(shape):
    x = wide(shape)
    stored = quantised.fp8_quantise(x)
    np.testing.assert_array_equal(run(x), quantised.fp8_dequantise(stored.values, scale=stored.scale))


def test_fp4_is_what_a_file_stores():
    x = wide((40, 128), octaves=2.0)
    stored = quantised.mxfp4_pack(x)
    np.testing.assert_array_equal(run(x, scaled.E2M1, (1, 32)), quantised.mxfp4_unpack(stored.values, scale=stored.scale))


@pytest.mark.parametrize("block", [ROW, COLUMN, SQUARE])
def test_each_block_is_a_cast_to_fp8_of_its_scaled_values(block):
    x = wide((200, 160))
    got = run(x, block=block)
    for at in blocks(x.shape, block):
        amax = np.abs(x[at]).max()
        scale = 2.0 ** min(e for e in range(-60, 60) if amax <= 464 * 2.0**e)
        np.testing.assert_array_equal(got[at], (x[at] / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)


@pytest.mark.parametrize(("fmt", "block"), [(scaled.E4M3, ROW), (scaled.E4M3, SQUARE), (scaled.E2M1, (32, 1))])
def test_rounding_again_changes_nothing_and_values_are_exact_in_bf16(fmt, block):
    once = run(wide((160, 256)), fmt, block)
    np.testing.assert_array_equal(run(once, fmt, block), once)
    np.testing.assert_array_equal(once.astype(ml_dtypes.bfloat16).astype(np.float32), once)


@pytest.mark.parametrize(("fmt", "relative", "absolute"), [(scaled.E4M3, 2.0**-4, 2.0**-10), (scaled.E2M1, 2.0**-2, 2.0**-2)])
def test_the_error_is_at_most_half_a_step(fmt, relative, absolute):
    """The bounds of the module's table: of the value, and of the scale below the normal numbers."""
    x = wide((8, 4096))
    exponent = scaled.exponents(jnp.asarray(x), fmt, block=(1, 32))
    scale = np.repeat(np.asarray(scaled.power_of_two(exponent)), 32, axis=1)
    error = np.abs(run(x, fmt, (1, 32)) - x)
    assert np.all(error <= np.maximum(relative * np.abs(x), absolute * scale))
    assert np.any(error > 0.9 * relative * np.abs(x))


def test_bf16_and_other_leading_axes_give_the_same():
    x = np.asarray(wide((3, 5, 7, 256)).astype(ml_dtypes.bfloat16))
    got = run(x, block=ROW)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), run(x.astype(np.float32).reshape(-1, 256), block=ROW).reshape(x.shape))


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    assert not run(np.zeros((4, 256), np.float32)).any()
    x = wide((2, 128))
    x[0, 3], x[1, 5] = np.inf, np.nan
    got = run(x, block=ROW)
    assert np.isinf(got[0, 3])
    assert np.isnan(got[1, 5])
    tiny = run(np.full((1, 8), 2.0**-120, np.float32))
    assert np.isfinite(tiny).all()


@pytest.mark.parametrize(
    ("fmt", "largest", "codes"), [(scaled.E4M3, 448, ml_dtypes.float8_e4m3fn), (scaled.E2M1, 6, ml_dtypes.float4_e2m1fn)]
)
def test_counts_are_those_of_a_loop(fmt, largest, codes):
    x = wide((6, 300), octaves=7.0)
    x[0, :4] = [450, -460, 448, 2.0**-30]
    x[0, 4:128] = 0
    got = np.asarray(scaled.count(jnp.asarray(x), fmt, block=ROW))
    saturated = vanished = 0
    for at in blocks(x.shape, ROW):
        for row in x[at]:
            scale = 2.0 ** int(scaled.exponents(jnp.asarray(row[None]), fmt, block=(1, len(row)))[0, 0])
            saturated += np.sum(np.abs(row) > largest * scale)
            vanished += np.sum((row != 0) & ((row / scale).astype(codes).astype(np.float32) == 0))
    assert got.tolist() == [x.size, saturated, vanished]
    assert saturated >= (2 if largest == 448 else 1)
    assert vanished > 100


def test_a_saturated_element_loses_no_more_than_half_a_step():
    x = np.zeros((1, 128), np.float32)
    x[0, :2] = [464, 1]
    assert run(x, block=ROW)[0, :2].tolist() == [448, 1]
    x[0, 0] = np.nextafter(np.float32(464), np.float32(500))
    assert run(x, block=ROW)[0, 0] == 480  # the next power of two: 240 times 2
