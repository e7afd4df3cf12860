"""Number formats against closed forms, exact integers, brute force in fp64 and, where it is installed, PyTorch."""

import math
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from v4train.interop import quantised

E8M0, E4M3 = quantised.E8M0, quantised.E4M3


def e4m3_values():
    """By code, from the definition: sign, 4 bits of exponent (bias 7), 3 of mantissa; S.1111.111 is NaN."""
    values = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    values[127] = math.nan
    return np.array(values + [-value for value in values])


def e2m1_values():
    values = [0, 0.5, *((2 + m) * 2.0 ** (e - 2) for e in (1, 2, 3) for m in (0, 1))]
    return np.array(values + [-value for value in values])


def brute_force(x, *, values):
    """The nearest code: all distances in fp64, ties to the even code, the sign of zero kept."""
    half = len(values) // 2
    magnitudes = np.nan_to_num(values[:half], nan=np.inf)
    distance = np.abs(np.abs(np.float64(x))[:, None] - magnitudes)
    nearest = distance.min(axis=1, keepdims=True)
    code = np.array([max(np.flatnonzero(row), key=lambda code: code % 2 == 0) for row in distance == nearest])
    return code + np.where(np.signbit(x), half, 0)


def awkward(values, *, limit):
    """Codes, midpoints and their neighbours among the float32, both signs; spread and tiny magnitudes."""
    rng = np.random.default_rng(0)
    finite = np.sort(values[: len(values) // 2][np.isfinite(values[: len(values) // 2])])
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    spread = np.exp2(rng.uniform(-30, math.log2(limit), 4000)).astype(np.float32)
    tiny = np.array([2.0**-126, 2.0**-130, 2.0**-149], np.float32)
    everything = np.concatenate([points, spread, tiny])
    everything = everything[(everything >= 0) & (everything <= limit)]
    return np.concatenate([everything, -everything])


def bits(array):
    return array.view(np.uint8)


def assert_same(left, right):
    np.testing.assert_array_equal(bits(left.values), bits(right.values))
    np.testing.assert_array_equal(bits(left.scale), bits(right.scale))


def unpacked_codes(packed):
    pairs = bits(packed)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)


def packed_codes(codes):
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8).view(np.int8)


def spread_weights(shape, *, seed=0, low=-20, high=4):
    """Every magnitude between two powers of two as likely per octave, with zeros of both signs and an empty corner."""
    rng = np.random.default_rng(seed)
    weight = np.exp2(rng.uniform(low, high, shape)) * rng.choice([-1, 1], shape)
    weight *= np.exp2(rng.integers(-40, 40, (shape[0], 1)))
    weight[rng.random(shape) < 0.05] = 0.0
    weight[rng.random(shape) < 0.05] = -0.0
    weight[: shape[0] // 2, -32:] = 0.0
    return weight.astype(np.float32)


def test_codes_mean_what_the_formats_define():
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    codes[codes & 127 == 127] = 0
    read = quantised.fp8_dequantise(codes.view(E4M3), scale=np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(read, e4m3_values()[codes].astype(np.float32))
    assert np.signbit(read[1, 0])
    low, high = np.arange(256) % 16, np.arange(256) // 16
    read = quantised.mxfp4_unpack(
        np.arange(256, dtype=np.uint8).view(np.int8).reshape(16, 16), scale=np.full((16, 1), 127, np.uint8).view(E8M0)
    )
    np.testing.assert_array_equal(read[:, 0::2].ravel(), e2m1_values()[low])
    np.testing.assert_array_equal(read[:, 1::2].ravel(), e2m1_values()[high])
    assert np.signbit(read[0, 16])  # byte 8: low nibble is the negative zero of an even column


def test_the_low_nibble_is_the_even_column():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = [0.5, 1.0, -6.0]
    stored = quantised.mxfp4_pack(weight)
    assert bits(stored.values)[0, :2].tolist() == [0x21, 0x0F]
    assert bits(stored.scale).tolist() == [[127]]


def test_rounding_is_to_the_nearest_fp8_code_ties_to_even():
    x = awkward(e4m3_values(), limit=464)
    weight = np.full((len(x), 2), 448, np.float32)  # fixes the scale of each row at 1
    weight[:, 1] = x
    stored = quantised.fp8_quantise(weight, block=(1, 2))
    assert (bits(stored.scale) == 127).all()
    np.testing.assert_array_equal(bits(stored.values)[:, 1], brute_force(x, values=e4m3_values()))


def test_rounding_is_to_the_nearest_fp4_code_ties_to_even():
    x = awkward(e2m1_values(), limit=np.nextafter(np.float32(7), np.float32(0)))
    weight = np.full((len(x), 32), 6, np.float32)
    weight[:, 5] = x
    stored = quantised.mxfp4_pack(weight)
    assert (bits(stored.scale) == 127).all()
    np.testing.assert_array_equal(unpacked_codes(stored.values)[:, 5], brute_force(x, values=e2m1_values()))


@pytest.mark.parametrize(("last", "following", "even"), [(448, 480, True), (6, 8, False)])
def test_the_scale_is_the_smallest_for_which_the_rounded_maximum_is_a_code(last, following, even):
    """The rule in exact arithmetic, over maxima around every boundary and at both ends of float32."""
    rng = np.random.default_rng(1)
    near = [np.float32(m) * np.float32(2.0**e) for m in (224, 232, 3, 3.5, 1) for e in (-120, -12, 0, 100)]
    near = [value for x in near for value in (x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf)))]
    ends = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 2.0**-149, 2.0**-140, 448 * 2.0**-127, 464 * 2.0**-128]
    maxima = np.array([*near, *ends, *np.exp2(rng.uniform(-149, 127.9, 500))], np.float32)
    midpoint = Fraction(last + following, 2)

    def fits(value, exponent):
        return value < midpoint * Fraction(2) ** exponent or (even and value == midpoint * Fraction(2) ** exponent)

    expected = [next(e for e in range(-127, 128) if fits(Fraction(float(value)), e)) for value in maxima]
    weight = np.zeros((len(maxima), 32), np.float32)
    weight[:, 7] = -maxima
    stored = quantised.fp8_quantise(weight, block=(1, 32)) if last == 448 else quantised.mxfp4_pack(weight)
    np.testing.assert_array_equal(bits(stored.scale)[:, 0].astype(int) - 127, expected)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 257), (127, 5), (5, 700), (300, 40), (2, 4096), (0, 7), (3, 0)])
def test_fp8_read_and_written_again_has_the_same_bits(shape):
    for seed in range(3):
        weight = spread_weights(shape, seed=seed)
        stored = quantised.fp8_quantise(weight)
        assert stored.values.shape == shape
        assert stored.scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
        read = quantised.fp8_dequantise(stored.values, scale=stored.scale)
        assert_same(quantised.fp8_quantise(read), stored)


@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (129, 96), (3, 8192), (0, 32), (4, 0)])
def test_fp4_read_and_written_again_has_the_same_bits(shape):
    for seed in range(3):
        stored = quantised.mxfp4_pack(spread_weights(shape, seed=seed, low=-4))
        assert stored.values.shape == (shape[0], shape[1] // 2)
        assert stored.scale.shape == (shape[0], shape[1] // 32)
        read = quantised.mxfp4_unpack(stored.values, scale=stored.scale)
        assert_same(quantised.mxfp4_pack(read), stored)


def test_every_maximum_survives_a_round_trip():
    """Where the maximum is just above half of the last code, `2**ceil(log2(amax / last))` finds another scale the second time."""
    maxima = np.linspace(1, 2, 4097, dtype=np.float32)[:, None]
    weight = maxima * np.linspace(-1, 1, 32, dtype=np.float32)
    fp8 = quantised.fp8_quantise(weight, block=(1, 32))
    assert_same(quantised.fp8_quantise(quantised.fp8_dequantise(fp8.values, scale=fp8.scale, block=(1, 32)), block=(1, 32)), fp8)
    fp4 = quantised.mxfp4_pack(weight)
    assert_same(quantised.mxfp4_pack(quantised.mxfp4_unpack(fp4.values, scale=fp4.scale)), fp4)
    assert (bits(fp8.values)[:, -1] > 0x76).all()  # above 224
    assert (unpacked_codes(fp4.values)[:, -1] >= 6).all()


def test_zeros_keep_their_sign_under_the_scale_one():
    weight = np.zeros((130, 160), np.float32)
    weight[:, 1] = -0.0
    fp8, fp4 = quantised.fp8_quantise(weight), quantised.mxfp4_pack(weight)
    assert (bits(fp8.scale) == 127).all()
    assert (bits(fp4.scale) == 127).all()
    assert (bits(fp8.values)[:, :3] == [0, 0x80, 0]).all()
    assert (bits(fp4.values)[:, :2] == [0x80, 0]).all()


def test_any_codes_with_a_full_block_come_back_bit_for_bit():
    """Subnormal, saturated and negative-zero codes under every scale that stays within float32."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (240, 256), dtype=np.uint8)
    codes[codes & 127 == 127] = 0x80
    codes[np.arange(0, 240, 1), rng.integers(0, 256, 240)] = rng.choice([0x77, 0x7E, 0xF7, 0xFE], 240)  # 240 and 448 in each block of a row
    scale = np.arange(240, dtype=np.uint8)[:, None]
    given = quantised.Quantised(codes.view(E4M3), scale.view(E8M0))
    read = quantised.fp8_dequantise(given.values, scale=given.scale, block=(1, 256))
    assert_same(quantised.fp8_quantise(read, block=(1, 256)), given)
    codes = rng.integers(0, 16, (240, 64), dtype=np.uint8)
    codes[:, [3, 40]] = rng.choice([6, 7, 14, 15], (240, 2))
    given = quantised.Quantised(packed_codes(codes), np.repeat(scale, 2, axis=1).view(E8M0))
    assert_same(quantised.mxfp4_pack(quantised.mxfp4_unpack(given.values, scale=given.scale)), given)


def test_any_codes_keep_their_values_and_with_their_scales_their_bits():
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x78, (200, 300), dtype=np.uint8) >> rng.integers(0, 7, (200, 300), dtype=np.uint8)  # small: no block is full
    codes |= rng.integers(0, 2, codes.shape, dtype=np.uint8) << 7
    scales = rng.integers(20, 230, (2, 3), dtype=np.uint8).view(E8M0), np.exp(rng.normal(0, 9, (2, 3))).astype(np.float32)
    for scale in scales:
        given = quantised.Quantised(codes.view(E4M3), scale)
        read = quantised.fp8_dequantise(given.values, scale=scale)
        assert_same(quantised.fp8_quantise(read, scale=scale), given)
    read = quantised.fp8_dequantise(codes.view(E4M3), scale=scales[0])
    again = quantised.fp8_quantise(read)
    assert (bits(again.scale) <= bits(scales[0])).all()
    np.testing.assert_array_equal(bits(quantised.fp8_dequantise(again.values, scale=again.scale)), bits(read))

    codes = rng.integers(0, 16, (90, 96), dtype=np.uint8) & 0b1011  # at most 1.5
    given = quantised.Quantised(packed_codes(codes), rng.integers(20, 230, (90, 3), dtype=np.uint8).view(E8M0))
    read = quantised.mxfp4_unpack(given.values, scale=given.scale)
    assert_same(quantised.mxfp4_pack(read, scale=given.scale), given)
    again = quantised.mxfp4_pack(read)
    assert (bits(again.scale) <= bits(given.scale)).all()
    np.testing.assert_array_equal(bits(quantised.mxfp4_unpack(again.values, scale=again.scale)), bits(read))


@pytest.mark.parametrize(("last", "share"), [(448.0, math.log2(232 / 224)), (6.0, math.log2(3.5 / 3))])
def test_the_rule_of_the_released_kernels_differs_only_where_its_own_result_is_not_stable(last, share):
    """Theirs: float32 product with the rounded reciprocal, then the exponent of the next power of two, from the bits."""
    maxima = np.exp2(np.linspace(-10, 10, 200_001)).astype(np.float32)[:, None]
    ratio = (maxima * np.float32(1 / last)).view(np.uint32)
    theirs = (ratio >> 23).astype(np.uint8) + ((ratio & 0x7FFFFF) != 0)
    weight = np.repeat(maxima, 32, axis=1) * np.linspace(0.3, 1, 32, dtype=np.float32)
    if last == 448:
        weight, theirs = weight.T, theirs.T  # blocks side by side are worked on together
        ours = quantised.fp8_quantise(weight, block=(32, 1))
        read = quantised.fp8_dequantise(ours.values, scale=ours.scale, block=(32, 1))
        kernel = quantised.fp8_quantise(weight, block=(32, 1), scale=theirs.view(E8M0))
        kernel_read = quantised.fp8_dequantise(kernel.values, scale=kernel.scale, block=(32, 1))
    else:
        ours = quantised.mxfp4_pack(weight)
        read = quantised.mxfp4_unpack(ours.values, scale=ours.scale)
        kernel = quantised.mxfp4_pack(weight, scale=theirs.view(E8M0))
        kernel_read = quantised.mxfp4_unpack(kernel.values, scale=kernel.scale)
    differs = bits(ours.scale) != theirs
    largest_read = kernel_read[-1:] if last == 448 else kernel_read[:, -1:]
    np.testing.assert_array_equal(differs, largest_read <= np.exp2(np.float32(theirs) - 127) * np.float32(last / 2))
    np.testing.assert_array_equal((theirs - bits(ours.scale))[differs], 1)
    assert abs(differs.mean() - share) < 1e-3
    assert (np.abs(read - weight) <= np.abs(kernel_read - weight)).all()


def test_groups_of_fp4_expand_to_fp8_without_loss():
    """If the scales of a block are within 2**6 of each other: 6 * 2**6 is still a code of E4M3, and 0.5 * 2**0 too."""
    rng = np.random.default_rng(4)
    given = packed_codes(rng.integers(0, 16, (128, 128), dtype=np.uint8)), rng.integers(110, 117, (128, 4), dtype=np.uint8)
    read = quantised.mxfp4_unpack(given[0], scale=given[1])
    stored = quantised.fp8_quantise(read)
    np.testing.assert_array_equal(quantised.fp8_dequantise(stored.values, scale=stored.scale), read)


def test_memory_order_and_narrow_floats_make_no_difference():
    weight = spread_weights((160, 288)).astype(ml_dtypes.bfloat16)
    for quantise in (quantised.fp8_quantise, quantised.mxfp4_pack):
        expected = quantise(weight.astype(np.float32))
        assert_same(quantise(weight), expected)
        assert_same(quantise(np.asfortranarray(weight.astype(np.float32))), expected)


def test_base_checkpoints_with_float32_scales_are_read():
    codes = np.full((130, 129), 0x38, np.uint8).view(E4M3)  # 1.0
    scale = np.array([[0.3, 0.7], [1.1, 1e-4]], np.float32)
    read = quantised.fp8_dequantise(codes, scale=scale)
    np.testing.assert_array_equal(read, np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:130, :129])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "store", [quantised.fp8_quantise, quantised.mxfp4_pack, quantised.to_bf16, quantised.require_finite], ids=lambda f: f.__name__
)
def test_what_is_not_finite_is_refused_by_name(store, poison):
    weight = np.ones((160, 160), np.float32)
    for fine in (weight, weight.T, weight.astype(ml_dtypes.bfloat16)):
        store(fine, name="fine")
    weight[159, 150] = poison
    for same in (weight, weight.T, weight.astype(ml_dtypes.bfloat16)):
        with pytest.raises(ValueError, match=r"layers\.1\.ffn: there is (NaN|an infinite value)"):
            store(same, name="layers.1.ffn")


def test_bf16_is_rounded_to_even_and_does_not_become_infinite():
    assert quantised.to_bf16(np.array([1 + 2**-8, 1 + 3 * 2**-8, -0.0], np.float32)).astype(np.float32).tolist() == [1.0, 1 + 2**-6, -0.0]
    with pytest.raises(ValueError, match="w: there is an infinite"):
        quantised.to_bf16(np.array([np.finfo(np.float32).max], np.float32), name="w")
    assert quantised.to_bf16(np.zeros((0, 3), np.float32)).shape == (0, 3)


def codes(*shape, fill=0x38, dtype=E4M3):
    return np.full(shape, fill, np.uint8).view(dtype)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: quantised.fp8_quantise(np.zeros(3, np.float32), name="w"), r"w: only matrices .* \[3\]"),
        (lambda: quantised.fp8_dequantise(codes(2, 2, dtype=np.int8), scale=np.ones((1, 1), np.float32), name="w"), "w: .*not int8"),
        (lambda: quantised.fp8_dequantise(codes(2, 129), scale=np.ones((1, 1), np.float32), name="w"), r"shape \[1, 1\], not \[1, 2\]"),
        (lambda: quantised.fp8_dequantise(codes(2, 2), scale=np.ones((1, 1), np.int32), name="w"), "w: scales are .* not int32"),
        (lambda: quantised.fp8_dequantise(codes(2, 2), scale=codes(1, 1, fill=255, dtype=E8M0), name="w"), "w: .* not positive and finite"),
        (lambda: quantised.fp8_dequantise(codes(2, 2), scale=-np.ones((1, 1), np.float32), name="w"), "w: .* not positive and finite"),
        (lambda: quantised.fp8_dequantise(codes(2, 2, fill=255), scale=np.ones((1, 1), np.float32), name="w"), "w: there are NaN"),
        (
            lambda: quantised.fp8_dequantise(codes(2, 2, fill=0x7E), scale=codes(1, 1, fill=250, dtype=E8M0), name="w"),
            "w: .* beyond float32",
        ),
        (lambda: quantised.mxfp4_unpack(codes(2, 16), scale=codes(2, 1, dtype=E8M0), name="w"), "w: .*not float8_e4m3fn"),
        (lambda: quantised.mxfp4_unpack(codes(2, 15, dtype=np.int8), scale=codes(2, 1, dtype=E8M0), name="w"), "w: rows of 30 values"),
        (lambda: quantised.mxfp4_unpack(codes(2, 16, dtype=np.int8), scale=codes(2, 2, dtype=E8M0), name="w"), r"\[2, 2\], not \[2, 1\]"),
        (lambda: quantised.mxfp4_pack(np.ones((2, 40), np.float32), name="w"), "w: rows of 40 values are no multiple of 32"),
        (
            lambda: quantised.mxfp4_pack(np.full((1, 32), 7, np.float32), scale=np.ones((1, 1), np.float32), name="w"),
            "w: a value is too large",
        ),
        (
            lambda: quantised.fp8_quantise(np.full((1, 1), 465, np.float32), scale=np.ones((1, 1), np.float32), name="w"),
            "w: a value is too l",
        ),
    ],
)
def test_what_cannot_be_is_said_by_name(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (100, 384), (130, 128), (128, 200), (200, 200), (256, 129), (7, 1000)])
def test_blocks_that_a_division_of_the_shapes_finds_are_told_from_others(shape):
    codes, scales = quantised.fp8_shapes(shape)
    same = all(size % count == 0 and size // count == min(size, 128) for size, count in zip(codes, scales, strict=True))
    assert quantised.tiles_evenly(shape) == same


def test_deviations_add_up():
    rng = np.random.default_rng(5)
    source = rng.normal(size=(300, 2000)).astype(np.float32)
    stored = source + rng.normal(size=source.shape).astype(np.float32) * np.float32(0.1)
    whole = quantised.compare(source, stored=stored)
    parts = quantised.compare(source[:100], stored=stored[:100]) + quantised.compare(source[100:], stored=stored[100:])
    error, exact = np.float64(stored) - source, np.float64(source)
    assert whole.count == parts.count == source.size
    assert whole.relative_rms == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact), rel=1e-12)
    assert parts.relative_rms == pytest.approx(whole.relative_rms, rel=1e-12)
    assert (whole.max_error, whole.max_source) == (parts.max_error, parts.max_source) == (np.abs(error).max(), np.abs(exact).max())
    assert quantised.Deviation().relative_rms == 0
    assert quantised.compare(np.zeros(3), stored=np.ones(3)).relative_rms == math.inf
    assert quantised.compare(np.float32(2), stored=np.float32(1)).relative_rms == 0.5


def test_scratch_memory_does_not_grow_with_the_matrix():
    weight = np.random.default_rng(6).normal(size=(2048, 8192)).astype(np.float32)  # 64 MiB
    fp8, fp4, narrow = quantised.fp8_quantise(weight), quantised.mxfp4_pack(weight), weight.astype(ml_dtypes.bfloat16)
    acts = {
        "fp8 write": (lambda: quantised.fp8_quantise(weight), weight.size),
        "fp8 read": (lambda: quantised.fp8_dequantise(fp8.values, scale=fp8.scale), 4 * weight.size),
        "fp4 write": (lambda: quantised.mxfp4_pack(weight), weight.size * 17 // 32),
        "fp4 read": (lambda: quantised.mxfp4_unpack(fp4.values, scale=fp4.scale), 4 * weight.size),
        "compare": (lambda: quantised.compare(weight, stored=weight), 0),
        "finite": (lambda: quantised.require_finite(weight.T), 0),
        "narrow": (lambda: quantised.require_finite(narrow.T), 0),
        "transposed fp8": (lambda: quantised.fp8_quantise(weight.T), weight.size),
        "transposed fp4": (lambda: quantised.mxfp4_pack(weight.T), weight.size * 17 // 32),
    }
    scratch = {}
    for name, (act, result) in acts.items():
        tracemalloc.start()
        act()
        scratch[name] = (tracemalloc.get_traced_memory()[1] - result) / 2**20
        tracemalloc.stop()
    assert max(scratch.values()) < 12, scratch


def test_pytorch_reads_the_same_values_and_writes_the_same_codes():
    torch = pytest.importorskip("torch")
    weight = spread_weights((130, 256))
    stored = quantised.fp8_quantise(weight)
    codes = torch.from_numpy(bits(stored.values)).view(torch.float8_e4m3fn).to(torch.float32)
    scale = torch.from_numpy(bits(stored.scale)).view(torch.float8_e8m0fnu).to(torch.float32)
    scale = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    np.testing.assert_array_equal((codes * scale).numpy(), quantised.fp8_dequantise(stored.values, scale=stored.scale))
    theirs = (torch.from_numpy(weight) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(theirs.numpy(), bits(stored.values))
