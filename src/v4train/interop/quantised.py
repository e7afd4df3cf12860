"""The number formats of released checkpoints, both ways: blocks of FP8 E4M3, groups of FP4 E2M1, their power-of-two scales.

A matrix ``[out, in]`` is stored as codes and scales; a value is code times scale:

====== ============================ ================================== ===============================
format codes                        one scale for                      used for
====== ============================ ================================== ===============================
FP8    E4M3 ``[out, in]``           128 x 128 values, edges cut off    attention, shared experts; Base: routed experts too
FP4    E2M1 ``i8[out, in / 2]``,    32 values along ``in``             routed experts
       low nibble = even column
====== ============================ ================================== ===============================

Scales are UE8M0: a byte ``b`` is ``2**(b - 127)``, 255 is NaN. They are called ``X.scale`` beside ``X.weight``; `names` knows the
other spellings. Some checkpoints hold the scales of FP8 as FP32, and then not as powers of two; those are read too.

**The scale** is the smallest power of two for which the block's largest magnitude, *once rounded*, is a code: ``amax <= 464 * 2**e`` for
FP8, whose last code is 448 and whose next would be 480, and ``amax < 7 * 2**e`` for FP4, between 6 and 8. A power of two changes no
mantissa, thus dividing by it is exact and each value is rounded once, to nearest even. From the rule follows:

* Reading back what was written and writing it again gives the same bits. The largest code is in (224, 448] (FP4: 4 or 6), because with a
  larger scale than the rule's it would be half, so the scale is found again, and with it every code. Zeros keep their sign; a block of
  zeros has the scale 1.
* Any tensor of the format, whoever wrote it, keeps its *values*: its writer's scale was not smaller than ours, and dividing by less moves
  codes up, where E4M3 and E2M1 lose nothing (subnormal codes become normal).

Its *bits* cannot be kept by any rule that sees only values: codes (1, 2) with scale 2 and codes (2, 4) with scale 1 are the same numbers.
So where the file must come back bit for bit from weights that did not change, pass the scales it came with: ``scale=``.

DeepSeek's kernels take ``2**ceil(log2(amax / 448))`` (FP4: 6), the smallest scale for which the largest magnitude fits *before* rounding.
What is just above 224 times the scale (FP4: 3) then becomes the code 224 (3), and writing it again gives half the scale and twice the
codes: the same values, other bits, for one block of twenty and one FP4 group of five where magnitudes are spread evenly over the
octaves. In these blocks our grid is the finer one, in all others the two rules agree: our error is never the larger. Their kernels
also raise ``amax`` to at least 1e-4 (FP4: ``6 * 2**-126``) against divisions by zero in activations; in weights that floor would push
small blocks into the subnormals of E4M3. The OCP standard for microscaling takes ``floor(log2(amax)) - 2`` for FP4, which clips
everything from 7 to 8 times the scale to 6.

Everything here works on a few rows at a time: scratch memory is some megabytes, whatever the size of the matrix.
"""

import dataclasses
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3_MAX, E2M1_MAX = 448.0, 6.0
# The largest float32 that still rounds to the last code: 464 is a tie that goes to 448, 7 is one that goes to 8.
_E4M3_REACH, _E2M1_REACH = np.float32(464), np.nextafter(np.float32(7), np.float32(0))
FP8_BLOCK = (128, 128)
FP4_GROUP = 32

# Values worked on at once: the scratch arrays of one step stay in the second-level cache.
_CHUNK = 2**18

_BYTES = np.arange(256, dtype=np.uint8)
_E4M3_VALUES = _BYTES.view(E4M3).astype(np.float32)
_E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# One byte holds two values; eight bytes taken at once are two float32.
_E2M1_PAIRS = np.stack([_E2M1_VALUES[_BYTES & 15], _E2M1_VALUES[_BYTES >> 4]], axis=1).view(np.uint64)[:, 0].copy()
_SCALES = np.ldexp(np.float32(1), np.arange(256) - 127, where=_BYTES < 255, out=np.full(256, np.nan, np.float32))
_INVERSES = np.ldexp(np.float32(1), 127 - np.arange(256), where=_BYTES < 255, out=np.full(256, np.nan, np.float32))


def _rounding_table(codes: type) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return (np.arange(2**16, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(codes).view(np.uint8)


_TO_E4M3 = _rounding_table(ml_dtypes.float8_e4m3fn)
_TO_E2M1 = _rounding_table(ml_dtypes.float4_e2m1fn)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix in one of the formats: what is stored under ``X.weight`` and ``X.scale``."""

    values: np.ndarray
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far stored values are from their source. Deviations of several tensors add up to that of all of them together."""

    count: int = 0
    squared_error: float = 0.0
    squared_source: float = 0.0
    max_error: float = 0.0
    max_source: float = 0.0

    def __add__(self, other: "Deviation") -> "Deviation":
        return Deviation(
            self.count + other.count,
            self.squared_error + other.squared_error,
            self.squared_source + other.squared_source,
            max(self.max_error, other.max_error),
            max(self.max_source, other.max_source),
        )

    @property
    def relative_rms(self) -> float:
        """Norm of the error over norm of the source; 0 where there is no error."""
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_source) if self.squared_source else math.inf


def fp8_shapes(shape: tuple[int, int], *, block: tuple[int, int] = FP8_BLOCK) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the codes and of the scales of an FP8 matrix, edges included."""
    rows, columns = shape
    return (rows, columns), (-(-rows // block[0]), -(-columns // block[1]))


def tiles_evenly(shape: tuple[int, int], *, block: tuple[int, int] = FP8_BLOCK) -> bool:
    """Whether every reader finds the same blocks in an FP8 matrix.

    The format lets the edge cut off the last blocks, and so do we. `transformers` takes the size of a block from the division of the two
    shapes: it refuses 130 rows with 2 rows of scales, and reads 200 rows with 2 rows of scales as blocks of 100, that is, wrongly.
    """
    return all(size <= width or size % width == 0 for size, width in zip(shape, block, strict=True))


def mxfp4_shapes(shape: tuple[int, int], *, name: str = "the matrix") -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the codes and of the scales of an FP4 matrix.

    Raises:
        ValueError: the rows are not a whole number of groups, which the format cannot express.
    """
    rows, columns = shape
    if columns % FP4_GROUP:
        raise ValueError(
            f"{name}: rows of {columns} values are no multiple of {FP4_GROUP}, so they have no FP4 form; store it as FP8 or BF16"
        )
    return (rows, columns // 2), (rows, columns // FP4_GROUP)


def fp8_quantise(
    weight: np.ndarray, *, block: tuple[int, int] = FP8_BLOCK, scale: np.ndarray | None = None, name: str = "the matrix"
) -> Quantised:
    """Rounds a matrix to FP8 E4M3 with a scale for each block.

    Args:
        weight: f32 (or bf16, f16) ``[out, in]``, of any memory order.
        block: rows and columns that share a scale; the last ones may be cut off by the edge.
        scale: scales to use instead of those of the rule, E8M0 or f32 ``[ceil(out / block), ceil(in / block)]``: those that the matrix was
            read with, so that unchanged weights give unchanged bits.
        name: for messages.

    Returns:
        Codes e4m3 ``[out, in]`` and scales, E8M0 unless given otherwise.

    Raises:
        ValueError: a value is NaN or infinite, or does not fit the given scale; the message names the matrix.
    """
    values_shape, scale_shape = fp8_shapes(_matrix_shape(weight, name=name), block=block)
    values = np.empty(values_shape, np.uint8)
    scales = np.empty(scale_shape, np.uint8) if scale is None else scale
    factors = None if scale is None else _factors(scale, shape=scale_shape, name=name)
    for band in range(scale_shape[0]):
        rows = slice(band * block[0], min((band + 1) * block[0], values_shape[0]))
        for columns in _column_chunks(values_shape, block=block):
            piece = _row_major(weight[rows, columns])
            blocks = slice(columns.start // block[1], -(-columns.stop // block[1]))
            largest = _block_maxima(piece, width=block[1])
            _require_finite(largest, name=name)
            if factors is None:
                scales[band, blocks] = exponent = _scale_bytes(largest, reach=_E4M3_REACH)
                scaled = piece * _along_columns(_INVERSES.take(exponent), width=block[1], columns=piece.shape[1])
            else:
                _require_fit(largest, factors[band, blocks], limit=E4M3_MAX, name=name)
                scaled = piece / _along_columns(factors[band, blocks], width=block[1], columns=piece.shape[1])
            values[rows, columns] = _nearest(scaled, table=_TO_E4M3)
    return Quantised(values.view(E4M3), scales.view(E8M0) if scale is None else scales)


def fp8_dequantise(values: np.ndarray, *, scale: np.ndarray, block: tuple[int, int] = FP8_BLOCK, name: str = "the matrix") -> np.ndarray:
    """Reads an FP8 matrix.

    Args:
        values: e4m3 ``[out, in]``.
        scale: ``[ceil(out / block), ceil(in / block)]``, E8M0 (also as its bytes, u8) or f32.
        block: rows and columns that share a scale.
        name: for messages.

    Returns:
        f32 ``[out, in]``; exact where the scales are powers of two.

    Raises:
        ValueError: other dtypes or shapes, NaN among the codes or scales, or a product beyond float32; the message names the matrix.
    """
    if values.dtype != E4M3:
        raise ValueError(f"{name}: FP8 codes are {E4M3}, not {values.dtype}")
    values_shape, scale_shape = fp8_shapes(_matrix_shape(values, name=name), block=block)
    factors, codes = _factors(scale, shape=scale_shape, name=name), values.view(np.uint8)
    out = np.empty(values_shape, np.float32)
    for band in range(scale_shape[0]):
        rows = slice(band * block[0], min((band + 1) * block[0], values_shape[0]))
        for columns in _column_chunks(values_shape, block=block):
            piece = codes[rows, columns]
            if (piece & 127 == 127).any():
                raise ValueError(f"{name}: there are NaN among the FP8 codes of rows {rows.start} to {rows.stop - 1}")
            product = _E4M3_VALUES.take(piece)
            blocks = slice(columns.start // block[1], -(-columns.stop // block[1]))
            _multiply(product, _along_columns(factors[band, blocks], width=block[1], columns=piece.shape[1]), name=name)
            out[rows, columns] = product
    return out


def mxfp4_pack(weight: np.ndarray, *, scale: np.ndarray | None = None, name: str = "the matrix") -> Quantised:
    """Rounds a matrix to FP4 E2M1, two values to a byte, with a scale for every 32 values along the input.

    Args:
        weight: f32 (or bf16, f16) ``[out, in]``, of any memory order; ``in`` a multiple of 32.
        scale: E8M0 or f32 ``[out, in / 32]`` to use instead of those of the rule, see `fp8_quantise`.
        name: for messages.

    Returns:
        Codes i8 ``[out, in / 2]``, the even column in the low nibble, and scales E8M0 ``[out, in / 32]`` unless given otherwise.

    Raises:
        ValueError: see `fp8_quantise`; or ``in`` is not a multiple of 32.
    """
    values_shape, scale_shape = mxfp4_shapes(_matrix_shape(weight, name=name), name=name)
    values = np.empty(values_shape, np.uint8)
    scales = np.empty(scale_shape, np.uint8) if scale is None else scale
    factors = None if scale is None else _factors(scale, shape=scale_shape, name=name)
    for rows in _row_chunks(weight.shape):
        piece = _row_major(weight[rows])
        grouped = piece.reshape(len(piece), scale_shape[1], FP4_GROUP)
        largest = np.maximum.reduceat(np.abs(piece).ravel(), np.arange(0, piece.size, FP4_GROUP)) if piece.size else piece[:0]
        largest = largest.reshape(len(piece), scale_shape[1])
        _require_finite(largest, name=name)
        if factors is None:
            scales[rows] = exponent = _scale_bytes(largest, reach=_E2M1_REACH)
            scaled = grouped * _INVERSES.take(exponent)[..., None]
        else:
            _require_fit(largest, factors[rows], limit=E2M1_MAX, name=name)
            scaled = grouped / factors[rows][..., None]
        codes = _nearest(scaled.reshape(piece.shape), table=_TO_E2M1)
        values[rows] = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return Quantised(values.view(np.int8), scales.view(E8M0) if scale is None else scales)


def mxfp4_unpack(values: np.ndarray, *, scale: np.ndarray, name: str = "the matrix") -> np.ndarray:
    """Reads an FP4 matrix.

    Args:
        values: i8 (or u8) ``[out, in / 2]``, the even column in the low nibble.
        scale: ``[out, in / 32]``, E8M0 (also as its bytes, u8) or f32.
        name: for messages.

    Returns:
        f32 ``[out, in]``; exact where the scales are powers of two.

    Raises:
        ValueError: see `fp8_dequantise`.
    """
    if values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"{name}: packed FP4 codes are int8, not {values.dtype}")
    rows_of_values, half = _matrix_shape(values, name=name)
    _, scale_shape = mxfp4_shapes((rows_of_values, 2 * half), name=name)
    factors, codes = _factors(scale, shape=scale_shape, name=name), values.view(np.uint8)
    out = np.empty((rows_of_values, 2 * half), np.float32)
    for rows in _row_chunks(out.shape):
        product = _E2M1_PAIRS.take(codes[rows]).view(np.float32).reshape(rows.stop - rows.start, scale_shape[1], FP4_GROUP)
        _multiply(product, factors[rows][..., None], name=name)
        out[rows] = product.reshape(out[rows].shape)
    return out


def to_bf16(weight: np.ndarray, *, name: str = "the tensor") -> np.ndarray:
    """Rounds f32 to BF16, to nearest even.

    Raises:
        ValueError: a value is NaN or infinite, or becomes infinite; the message names the tensor.
    """
    with np.errstate(over="ignore"):
        _require_finite(_extremes(weight).astype(BF16).astype(np.float32), name=name)
        return weight.astype(BF16)


def require_finite(weight: np.ndarray, *, name: str = "the tensor") -> None:
    """Refuses floats (of any dtype up to f32) that no model can have learnt.

    Raises:
        ValueError: a value is NaN or infinite; the message names the tensor.
    """
    _require_finite(_extremes(weight), name=name)


def compare(source: np.ndarray, *, stored: np.ndarray) -> Deviation:
    """Measures stored values (read back) against their source, both of the same shape and of any float dtype; sums are taken in f64."""
    assert source.shape == stored.shape, (source.shape, stored.shape)
    total = Deviation()
    left, right = np.atleast_2d(source), np.atleast_2d(stored)
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    for rows in _row_chunks(left.shape):
        a = np.asarray(left[rows], np.float64)
        if a.size:
            error = np.abs(a - np.asarray(right[rows], np.float64))
            largest = float(error.max()), float(max(a.max(), -a.min()))
            total += Deviation(a.size, float(np.square(error).sum()), float(np.square(a).sum()), *largest)
    return total


def _nearest(scaled: np.ndarray, *, table: np.ndarray) -> np.ndarray:
    """The nearest code, ties to even, of f32 within the format's range.

    A table over the upper half of a float32 suffices if the lower half leaves its trace in the last bit of the upper one (rounding to odd):
    seven mantissa bits are more than two beyond the three (one) that the format keeps, so no second rounding error can arise. It takes a
    fifth of the time of the cast that ml_dtypes does value by value; that cast fills the table.
    """
    bits = scaled.view(np.uint32)
    upper = bits & np.uint32(0xFFFF)
    upper += np.uint32(0xFFFF)
    upper |= bits
    upper >>= np.uint32(16)
    return table.take(upper)


def _row_major(piece: np.ndarray) -> np.ndarray:
    """As f32 in rows. Our own matrices come transposed; in narrow strips their cache lines stay until used, twice as fast."""
    if piece.strides[0] >= piece.strides[1]:
        return np.ascontiguousarray(piece, dtype=np.float32)
    rows = np.empty(piece.shape, np.float32)
    for start in range(0, piece.shape[1], 32):
        rows[:, start : start + 32] = piece[:, start : start + 32]
    return rows


def _scale_bytes(largest: np.ndarray, *, reach: np.float32) -> np.ndarray:
    """UE8M0 of the smallest power of two that brings the largest magnitude within reach. From the parts of the float: logarithms round."""
    fraction, exponent = np.frexp(largest)
    fraction_of_reach, exponent_of_reach = np.frexp(reach)
    exponent = exponent - exponent_of_reach + (fraction > fraction_of_reach)
    return np.where(largest > 0, np.maximum(exponent, -127) + 127, 127).astype(np.uint8)


def _factors(scale: np.ndarray, *, shape: tuple[int, int], name: str) -> np.ndarray:
    if scale.shape != shape:
        raise ValueError(f"{name}: the scales have the shape {list(scale.shape)}, not {list(shape)}")
    if scale.dtype in (E8M0, np.dtype(np.uint8)):
        factors = _SCALES.take(scale.view(np.uint8))
    elif scale.dtype in (np.dtype(np.float32), BF16, np.dtype(np.float16)):
        factors = scale.astype(np.float32)
    else:
        raise ValueError(f"{name}: scales are {E8M0} or float32, not {scale.dtype}")
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"{name}: there are scales that are not positive and finite")
    return factors


def _multiply(product: np.ndarray, factors: np.ndarray, *, name: str) -> None:
    with np.errstate(over="ignore"):
        product *= factors
    # 448 * 2**119 is the last product below the end of float32.
    if factors.size and factors.max() > 2.0**119 and not np.isfinite(product).all():
        raise ValueError(f"{name}: code times scale is beyond float32 (the largest scale is {factors.max():g})")


def _extremes(weight: np.ndarray) -> np.ndarray:
    """The largest and the smallest values, NaN if there is one. Narrow floats are compared as f32: their own comparisons are slow."""
    if not weight.size:
        return np.zeros(0, np.float32)
    rows = weight.reshape(1, -1) if weight.ndim < 2 else weight
    step = len(rows) if weight.dtype == np.float32 else max(1, _CHUNK * len(rows) // weight.size)
    with np.errstate(invalid="ignore"):
        pieces = (rows[start : start + step].astype(np.float32, copy=False) for start in range(0, len(rows), step))
        return np.array([extreme for piece in pieces for extreme in (piece.max(), piece.min())], np.float32)


def _block_maxima(piece: np.ndarray, *, width: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        of_columns = np.maximum(piece.max(axis=0), -piece.min(axis=0))
        return np.maximum.reduceat(of_columns, np.arange(0, len(of_columns), width))


def _along_columns(of_blocks: np.ndarray, *, width: int, columns: int) -> np.ndarray:
    return np.repeat(of_blocks, width)[None, :columns]


def _column_chunks(shape: tuple[int, int], *, block: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _CHUNK // (block[0] * block[1])) * block[1]
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _matrix_shape(matrix: np.ndarray, *, name: str) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise ValueError(f"{name}: only matrices have a quantised form, and its shape is {list(matrix.shape)}")
    return matrix.shape[0], matrix.shape[1]


def _require_finite(largest: np.ndarray, *, name: str) -> None:
    if not np.isfinite(largest).all():
        what = "NaN" if np.isnan(largest).any() else "an infinite value"
        raise ValueError(f"{name}: there is {what} in it; a model that holds one is broken, and the format cannot store it")


def _require_fit(largest: np.ndarray, factors: np.ndarray, *, limit: float, name: str) -> None:
    if not (largest <= limit * factors).all():
        raise ValueError(f"{name}: a value is too large for the scale that was given; the weights have changed, so let the rule choose")
