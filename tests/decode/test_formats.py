"""Formats of entries against ml_dtypes and plain numpy in fp64."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4train.decode import formats

V4 = formats.of_entries("fp8", width=512, rope_dim=64)
KEY = formats.of_index_keys("fp8", width=128)


def plain(entries: np.ndarray, *, kept: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and values read back, one block after another, in fp64."""
    small = entries.shape[-1] - kept
    scales, back = [], entries.astype(np.float64).copy()
    for row, first in itertools.product(range(len(entries)), range(0, small, block)):
        span = slice(first, min(first + block, small))
        x = entries[row, span].astype(np.float64)
        scale = 2.0 ** math.ceil(math.log2(max(np.abs(x).max() / 448, 1e-4)))
        scales.append(scale)
        back[row, span] = (x / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    back[:, small:] = entries[:, small:].astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.array(scales).reshape(len(entries), -1), back


@pytest.mark.parametrize(
    ("as_format", "kept", "block"),
    [
        (V4, 64, 64),
        (KEY, 0, 128),
        (formats.of_entries("fp8", width=96, rope_dim=16), 16, 64),
        (formats.of_entries("fp8", width=16, rope_dim=8), 8, 64),
    ],
    ids=["v4", "index key", "a short last block", "tiny"],
)
def test_fp8_is_what_plain_arithmetic_gives(as_format, kept, block):
    rng = np.random.default_rng(0)
    entries = (rng.standard_normal((40, as_format.width)) * 10.0 ** rng.uniform(-6, 4, (40, 1))).astype(np.float32)
    entries[0], entries[1, :3] = 0, [448, -448, 1e-3]
    stored = jax.jit(as_format.encode)(entries)
    scales, expected = plain(entries, kept=kept, block=block)
    exponents = np.asarray(stored["scale"])[:, : scales.shape[1]].astype(int) - 127
    np.testing.assert_array_equal(2.0**exponents, scales)
    for dtype in (jnp.float32, jnp.bfloat16):  # what is read back is exact in bf16
        back = jax.jit(lambda s, dtype=dtype: as_format.decode(s, dtype=dtype))(stored)
        np.testing.assert_array_equal(np.asarray(back).astype(np.float64), expected)


def test_every_byte_is_read_as_the_e4m3_it_is():
    """Subnormal numbers, both zeros and what is not a number included."""
    codes = np.arange(256, dtype=np.uint8)
    stored = {"data": np.broadcast_to(codes[:, None], (256, 128)), "scale": np.full((256, 1), 127 + 3, np.uint8)}
    back = np.asarray(jax.jit(lambda s: KEY.decode(s, dtype=jnp.float32))(stored))
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None] * np.full(128, 8, np.float32)
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(expected))


def test_scales_at_and_beside_powers_of_two():
    """A logarithm, or a multiplication with 1 / 448, goes wrong here."""
    exact = 448.0 * 2.0 ** np.arange(-10, 11)
    amax = np.concatenate(
        [exact, np.nextafter(exact.astype(np.float32), np.float32(np.inf)), np.nextafter(exact.astype(np.float32), np.float32(0))]
    )
    expected = [*range(-10, 11), *range(-9, 12), *range(-10, 11)]
    assert jax.jit(formats.exponents)(amax.astype(np.float32)).tolist() == expected
    assert formats.exponents(jnp.asarray([0.0, 1e-30, 0.05, 0.06])).tolist() == [-13, -13, -13, -12]


def test_nothing_overflows_and_the_error_is_bounded():
    entries = np.random.default_rng(1).standard_t(2, (4000, 512)).astype(np.float32)
    back = np.asarray(V4.decode(V4.encode(jnp.asarray(entries)), dtype=jnp.float32))
    assert np.isfinite(back).all()
    scale = np.repeat(plain(entries, kept=64, block=64)[0], 64, axis=1)
    allowed = np.maximum(np.abs(entries[:, :448]) / 16, scale * 2.0**-10)
    assert (np.abs(back - entries)[:, :448] <= allowed).all()
    assert (np.abs(back - entries)[:, 448:] <= np.abs(entries[:, 448:]) / 256).all()


def test_bytes_of_the_released_geometry():
    def size(as_format: formats.Format) -> int:
        return sum(x.size * x.dtype.itemsize for x in as_format.structure(()).values())

    assert {name: x.shape for name, x in V4.structure((7, 64)).items()} == {"data": (7, 64, 576), "scale": (7, 64, 8)}
    assert (size(V4), size(KEY)) == (584, 129)
    assert [size(formats.of_entries(kind, width=512, rope_dim=64)) for kind in ("fp32", "bf16")] == [2048, 1024]


@pytest.mark.parametrize(("kind", "allowed"), [("fp32", 0.0), ("bf16", 2.0**-8)])
def test_plain_formats(kind, allowed):
    entries = np.random.default_rng(2).standard_normal((5, 3, 16)).astype(np.float32)
    as_format = formats.of_entries(kind, width=16, rope_dim=8)
    stored = as_format.encode(jnp.asarray(entries))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stored) == jax.tree.map(lambda x: (x.shape, x.dtype), as_format.structure((5, 3)))
    np.testing.assert_allclose(np.asarray(as_format.decode(stored, dtype=jnp.float32)), entries, rtol=allowed, atol=0)
