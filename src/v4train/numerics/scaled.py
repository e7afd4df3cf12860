"""Numbers of few bits that share a scale: FP8 E4M3 and FP4 E2M1 in blocks, as values of an ordinary array.

A block of an array (``(1, 128)`` of the last two axes, say) has one scale, a power of two, and its elements are codes times that scale:

====== ================================= ============================ =====================================
format codes                             block                        relative error of one rounding
====== ================================= ============================ =====================================
E4M3   4 bits exponent, 3 mantissa, 448  1 x 128 or 128 x 128         2^-4, or 2^-10 scales where that is more
E2M1   2 bits exponent, 1 mantissa, 6    32 along the input (MXFP4)   2^-2, or a quarter of a scale
====== ================================= ============================ =====================================

The scale is the smallest power of two for which the block's largest magnitude, *once rounded*, is a code: the rule of the files that we
write (`interop.quantised` has the reasons), so what training rounds a weight to is what an export stores. Three things follow:

* *Everything is exact but the one rounding.* A power of two changes no mantissa, and a code has at most 4 significant bits, so a rounded
  value is exact in bf16, and a product of two is exact in fp32. Hence a matmul of rounded values in bf16, accumulated in fp32, is the FP8
  matmul, up to the order of the sums: that is what "emulated" means here, on any hardware.
* *Rounding again changes nothing*, bit for bit. So a matmul may round weights that were rounded before (`policy.cast_for_compute`).
* *No value is ever clipped by more than half a step*: between 448 and 464 times the scale an element is rounded down to 448. These
  elements are counted as saturated (`count`). Those that are not zero and become zero, because they are at most 2^-10 of the scale in E4M3
  or a quarter of it in E2M1, are counted as underflowing.

Elements are rounded where they are: to a multiple of the step that their exponent and the block's scale give, to nearest, ties to even.
It needs no type of 8 bits, which a CPU converts slowly. A last block that the edge cuts off is smaller.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BIAS = 127  # of the exponents of fp32
_LEAST = -100
"""Exponent of the least scale: with it all codes are normal numbers of bf16, whose exponents are those of fp32."""

FP8_BLOCK = (128, 128)
FP8_TILE = 128
FP4_GROUP = 32


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format, as far as rounding to it needs to know it.

    Attributes:
        mantissa: stored bits.
        least: exponent of the smallest normal code; below it the step stays.
        top: exponent of the largest code.
        largest: code.
        reach: of the mantissa bits of fp32, at exponent ``top``: the most that still rounds to the largest code.
    """

    mantissa: int
    least: int
    top: int
    largest: float
    reach: int


E4M3 = Format(mantissa=3, least=-6, top=8, largest=448.0, reach=0x680000)  # 464, a tie that goes to 448
E2M1 = Format(mantissa=1, least=0, top=2, largest=6.0, reach=0x5FFFFF)  # the last before 7, a tie that goes to 8


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """``2.0 ** exponent`` in fp32, exactly, for exponents of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + _BIAS) << 23, jnp.float32)


def exponents(x: Float[Array, "..."], fmt: Format, *, block: tuple[int, ...]) -> Int[Array, "..."]:
    """The exponent of each block's scale; 0 for a block of zeros.

    Args:
        x: any float dtype.
        fmt: of the codes.
        block: sizes along the last axes; the result has ``ceil(n / size)`` entries along each of them.
    """
    amax = jnp.abs(x.astype(jnp.float32))
    for axis, size in zip(range(x.ndim - len(block), x.ndim), block, strict=True):
        amax = _largest(amax, axis=axis, size=size)
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    exponent = (bits >> 23) - _BIAS - fmt.top + ((bits & 0x7FFFFF) > fmt.reach)
    return jnp.where(amax > 0, jnp.maximum(exponent, _LEAST), 0)


def _largest(x: Array, *, axis: int, size: int) -> Array:
    length = x.shape[axis]
    if size == 1:
        return x
    if length <= size:
        return jnp.max(x, axis=axis, keepdims=True)
    spare = -length % size
    if spare:
        x = jnp.pad(x, [(0, spare) if i == axis else (0, 0) for i in range(x.ndim)])
    return jnp.max(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis=axis + 1)


def spread(per_block: Array, *, shape: tuple[int, ...], block: tuple[int, ...]) -> Array:
    """One value a block -> one an element; axes that broadcast are left at 1."""
    for axis, size in zip(range(len(shape) - len(block), len(shape)), block, strict=True):
        if size > 1 and per_block.shape[axis] > 1:
            per_block = jnp.repeat(per_block, size, axis=axis, total_repeat_length=shape[axis] + -shape[axis] % size)
            per_block = jax.lax.slice_in_dim(per_block, 0, shape[axis], axis=axis)
    return per_block


def round_with(x: Float[Array, "..."], exponent: Int[Array, "..."], fmt: Format) -> Float[Array, "..."]:
    """The nearest code times ``2 ** exponent`` of each element, in the dtype of ``x``; ``exponent`` broadcasts against it."""
    x32 = x.astype(jnp.float32)
    own = (jax.lax.bitcast_convert_type(x32, jnp.int32) >> 23 & 0xFF) - _BIAS
    step = jnp.maximum(own, fmt.least + exponent) - fmt.mantissa
    return (jnp.round(x32 * power_of_two(-step)) * power_of_two(step)).astype(x.dtype)


def rounded(x: Float[Array, "..."], fmt: Format, *, block: tuple[int, ...]) -> Float[Array, "..."]:
    """``x`` with every element rounded to a code times its block's scale, in the dtype of ``x``.

    Args:
        x: any shape, at least as many axes as ``block``.
        fmt: of the codes.
        block: sizes along the last axes: elements that share a scale.
    """
    return round_with(x, spread(exponents(x, fmt, block=block), shape=x.shape, block=block), fmt)


def count(x: Float[Array, "..."], fmt: Format, *, block: tuple[int, ...]) -> Float[Array, "3"]:
    """How many elements there are, how many of them saturate, and how many that are not zero become zero."""
    exponent = spread(exponents(x, fmt, block=block), shape=x.shape, block=block)
    magnitude = jnp.abs(x.astype(jnp.float32))
    saturated = magnitude > fmt.largest * power_of_two(exponent)
    vanished = (magnitude > 0) & (round_with(magnitude, exponent, fmt) == 0)
    sums = [jnp.sum(which, dtype=jnp.float32) for which in (saturated, vanished)]
    return jnp.stack([jnp.full((), x.size, jnp.float32), *sums])
