"""How an entry of the cache is stored, and read back.

`Plain` keeps an entry as it is, in fp32 (the oracle) or bf16. `Blocked` is FP8: the channels that do not rotate as E4M3 in blocks of 64
with
one scale each, the trailing channels that carry the rotation as bf16, because a rotation turns a small error of a large channel into a
large one of a small channel. For V4 this is the layout known as MODEL1: 448 + 2 x 64 = 576 bytes of data and 7 bytes of scales, padded to
8;
584 bytes instead of the 1,024 of bf16. Data and scales are two arrays, so that a row of data stays aligned to 16 bytes (584 is not a
multiple).
An index key is one block of 128 channels, none of them in bf16: 129 bytes.

A scale is a power of two, stored as its biased exponent in one byte (UE8M0). Dividing by it and multiplying with it is exact, so all of
the error is the
rounding to three bits of mantissa, at most 2^-4 of a value (while that is larger than 2^-9 of its scale), and a value read back is exact
in bf16.
``scale = 2^ceil(log2(max(amax / 448, 1e-4)))``, 448 being the largest E4M3; the exponent is computed on bits, because a logarithm, or a
compiler
that divides by multiplying with 1 / 448, may miss a power of two.
The rejected alternative, fp32 scales of amax / 448, gains half a bit for the largest value of a block, costs 3 more bytes a scale, and
makes
what is read back inexact in bf16.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from v4train.numerics import scaled

_BIAS = 127  # of the exponents of fp32 and of UE8M0
_LEAST = -13  # ceil(log2(1e-4))

Stored = dict[str, Array]
"""Entries as they lie in the cache: named arrays with the same leading axes."""


class Format(Protocol):
    """A way to store entries of ``width`` channels."""

    @property
    def width(self) -> int:
        """Channels of an entry."""
        ...

    def structure(self, lead: tuple[int, ...]) -> dict[str, Any]:
        """The arrays that hold entries of these leading axes."""
        ...

    def encode(self, entries: Float[Array, "... k"]) -> Stored:
        """Entries as stored."""
        ...

    def decode(self, stored: Stored, *, dtype: jnp.dtype) -> Float[Array, "... k"]:
        """Stored entries as numbers."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """One number a channel. A bf16 lies in the cache as its 16 bits: XLA's CPU backend scatters no bf16, and would make the whole pool
    fp32 and back for every entry that is written."""

    width: int
    dtype: jnp.dtype

    @property
    def _stored(self) -> jnp.dtype:
        return jnp.dtype(jnp.uint16) if self.dtype == jnp.bfloat16 else self.dtype

    def structure(self, lead: tuple[int, ...]) -> dict[str, Any]:
        return {"data": jax.ShapeDtypeStruct((*lead, self.width), self._stored)}

    def encode(self, entries: Float[Array, "... k"]) -> Stored:
        return {"data": jax.lax.bitcast_convert_type(entries.astype(self.dtype), self._stored)}

    def decode(self, stored: Stored, *, dtype: jnp.dtype) -> Float[Array, "... k"]:
        return jax.lax.bitcast_convert_type(stored["data"], self.dtype).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Blocked:
    """E4M3 in blocks with a UE8M0 scale each, then ``kept`` channels in bf16.

    Attributes:
        width: channels of an entry.
        kept: trailing channels that stay bf16.
        block: channels that share a scale; the last block may be shorter.
        align: the number of scale bytes is a multiple of this.
    """

    width: int
    kept: int
    block: int = 64
    align: int = 8

    @property
    def small(self) -> int:
        """Channels stored as E4M3."""
        return self.width - self.kept

    @property
    def scales(self) -> int:
        """Bytes of an entry's scales, padding included."""
        return -(-self._blocks // self.align) * self.align

    @property
    def _blocks(self) -> int:
        return -(-self.small // self.block)

    def structure(self, lead: tuple[int, ...]) -> dict[str, Any]:
        byte = jnp.dtype(jnp.uint8)
        return {
            "data": jax.ShapeDtypeStruct((*lead, self.small + 2 * self.kept), byte),
            "scale": jax.ShapeDtypeStruct((*lead, self.scales), byte),
        }

    def encode(self, entries: Float[Array, "... k"]) -> Stored:
        lead = entries.shape[:-1]
        whole = entries[..., : self.small].astype(jnp.float32)
        spare = self._blocks * self.block - self.small
        blocks = jnp.pad(whole, [(0, 0)] * len(lead) + [(0, spare)]).reshape(*lead, self._blocks, self.block)
        exponent = exponents(jnp.max(jnp.abs(blocks), axis=-1))
        rounded = (blocks * scaled.power_of_two(-exponent)[..., None]).reshape(*lead, -1)[..., : self.small].astype(jnp.float8_e4m3fn)
        data = jax.lax.bitcast_convert_type(rounded, jnp.uint8)
        kept = jax.lax.bitcast_convert_type(entries[..., self.small :].astype(jnp.bfloat16), jnp.uint8).reshape(*lead, 2 * self.kept)
        scale = jnp.pad((exponent + _BIAS).astype(jnp.uint8), [(0, 0)] * len(lead) + [(0, self.scales - self._blocks)])
        return {"data": jnp.concatenate([data, kept], axis=-1), "scale": scale}

    def decode(self, stored: Stored, *, dtype: jnp.dtype) -> Float[Array, "... k"]:
        data, lead = stored["data"], stored["data"].shape[:-1]
        small = _of_e4m3(data[..., : self.small]).astype(dtype)
        scale = scaled.power_of_two(stored["scale"][..., : self._blocks].astype(jnp.int32) - _BIAS).astype(dtype)
        spread = jnp.broadcast_to(scale[..., None], (*scale.shape, self.block)).reshape(*lead, -1)  # `jnp.repeat` gathers
        values = small * spread[..., : self.small]
        kept = jax.lax.bitcast_convert_type(data[..., self.small :].reshape(*lead, self.kept, 2), jnp.bfloat16)
        return jnp.concatenate([values, kept.astype(dtype)], axis=-1)


def _of_e4m3(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The numbers of E4M3 bytes, all 256 of them exactly, in fp32.

    XLA's CPU backend has no instruction for it and takes apart every byte in a dozen steps, a third of an index scan. Shifted into place,
    sign, exponent and mantissa are an fp16 of 2^-8 of the value, subnormal ones included, and fp16 to fp32 is one instruction.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    wide = codes.astype(jnp.uint16)
    size = wide & 0x7F
    bits = (wide & 0x80) << 8 | jnp.where(size == 0x7F, 0x7E00, size << 7)  # 0x7F is not a number
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * 256


def exponents(amax: Float[Array, "..."]) -> Int[Array, "..."]:
    """``ceil(log2(max(amax / 448, 1e-4)))``, exactly. 448 is 1.75 x 2^8, so the bits of ``amax`` tell on which side of it they lie."""
    bits = jax.lax.bitcast_convert_type(amax.astype(jnp.float32), jnp.int32)
    return jnp.maximum((bits >> 23) - _BIAS - 8 + ((bits & 0x7FFFFF) > 0x600000), _LEAST)


def of_entries(kind: str, *, width: int, rope_dim: int) -> Format:
    """The format of compressed entries when ``DecodeConfig.cache`` is ``kind``."""
    return Blocked(width, kept=rope_dim) if kind == "fp8" else _plain(kind, width)


def of_index_keys(kind: str, *, width: int) -> Format:
    """The format of index keys when ``DecodeConfig.cache`` is ``kind``: in FP8 one scale a key."""
    return Blocked(width, kept=0, block=width, align=1) if kind == "fp8" else _plain(kind, width)


def _plain(kind: str, width: int) -> Plain:
    return Plain(width, jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16}[kind]))
