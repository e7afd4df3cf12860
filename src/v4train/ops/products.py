"""Products of activations with weights, in the compute dtype or in FP8, forward and backward.

``y = x @ w`` is three products in training. In FP8 each of them has both factors in E4M3 (`numerics.scaled`), with scales of

=========== ==================== =============================== ==============================================
product     contracted over      activations, gradients          the other factor
=========== ==================== =============================== ==============================================
y = x w     input, d             x: 1 x 128 along d              w: blocks of 128 x 128
dx = dy w^T output, f            dy: 1 x 128 along f             w: the same blocks, the same codes
dw = x^T dy tokens               x: 128 tokens x 1               dy: 128 tokens x 1
=========== ==================== =============================== ==============================================

Every scale is constant along 128 steps of the contraction, which is what a kernel needs: it multiplies 128 steps in FP8 units, scales the
sum and adds it in fp32. The format is that of DeepSeek-V3's report (3.3), which V4 keeps; scales that are powers of two are as in V4's
files. Chosen here, where the reports are silent:

* Tiles along tokens do not cross a row of the batch: what one row's gradient is rounded with does not depend on its neighbours, nor on the
  mesh, as long as a context shard is a multiple of 128.
* For dw, x is rounded anew from the compute dtype (DeepSeek-V3 keeps the E4M3 tiles of the forward pass and rounds those a second time: a
  byte less an element to keep, one more rounding error).
* Experts, and projections by kernels: each device rounds what it has: where `tensor` splits a width to less than a multiple of 128, or
  `context` a row, tiles end where the shard does.
* Experts: tiles of dw are 128 places of the buffer of sorted rows, wherever a group ends. A tile at a border is shared by two experts,
  which costs range, never correctness; groups padded to 128 would cost rows, a scale for each row could not leave the sum.

**Weights come rounded**: `policy.cast_for_compute` has rounded the fp32 master once a step, so that the blocks are those of the whole
matrix on every mesh, and the gradient goes straight through to the master.

**Units.** ``emulated`` multiplies the rounded values in the compute dtype and accumulates in fp32, on any hardware. The values are exact in
bf16, so this is the same arithmetic up to the order of sums. GPUs multiply the codes in FP8 units instead
(`ops.kernels.fp8_matmul_triton`; `ops.select`, rows ``fp8_linear`` and ``fp8_experts``): XLA's own FP8 matmul takes one scale for a whole
matrix. The partitioner, which divides emulated projections over a mesh, cannot divide a kernel: `ops.linear_codes` does.

**Counting.** How many elements saturate and vanish is wanted of activations and of gradients, deep in scanned, rematerialised and
sharded code that returns nothing but activations. So the counts leave the way gradients do: a product takes an array of zeros, the
*probe*, that it does not use, and its derivative rule gives the counts as the probe's gradient. Autodiff adds them up over all layers.
"""

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.numerics import scaled
from v4train.ops import grouped_matmul, linear_codes, select
from v4train.sharding import constrain

Kernel = Literal["fp8_triton", "fp8_interpreted"]
"""In FP8 units; interpreted: the same kernels without a GPU, far too slowly for anything but tests."""
_Units = grouped_matmul.Implementation | Kernel

PROBE_SHAPE = (2, 3)
"""Activations and gradients, each: elements, saturated, vanished."""

_ALONG_WIDTH = (1, scaled.FP8_TILE)
_ALONG_ROWS = (scaled.FP8_TILE, 1)


class Formats(Protocol):
    """How activations are multiplied with weights. A tree of arrays, so that it can be handed into mapped and recomputed functions."""

    def linear(self, x: Float[Array, "b s *g d"], w: Float[Array, "*g d f"], *, letters: str | None = None) -> Float[Array, "b s *g f"]:
        """``x @ w``, in the dtype of ``x``.

        Args:
            x: activations.
            w: a matrix, or one for each group.
            letters: of the axes of ``w``: how a mesh splits it. None: it is whole on every device.
        """
        ...

    def grouped(
        self,
        x: Float[Array, "R d"],
        w: Float[Array, "G d f"],
        *,
        group_sizes: Int[Array, "G"],
        implementation: grouped_matmul.Implementation,
    ) -> Float[Array, "R f"]:
        """`grouped_matmul.grouped_matmul`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compute:
    """In the dtype that the factors have."""

    def linear(self, x, w, *, letters=None):
        return x @ w if w.ndim == 2 else jnp.einsum("bsgd,gdf->bsgf", x, w)

    def grouped(self, x, w, *, group_sizes, implementation):
        return grouped_matmul.grouped_matmul(x, w, group_sizes, implementation=implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupsFirst(Compute):
    """As `Compute`, the activations' groups moved to the front first: for the few rows of a decode step.

    The axes of a product in the order of `Compute` have XLA make the weights its left factor, contracted along their rows. Its CPU
    backend reads 1.6 GB/s of weights then, and 10 in this order: 13 ms of a core instead of 82 for 16 tokens and V4-Flash's 8 matrices of
    4,096 x 1,024.
    """

    def linear(self, x, w, *, letters=None):
        return x @ w if w.ndim == 2 else jnp.moveaxis(jnp.einsum("gbsd,gdf->gbsf", jnp.moveaxis(x, 2, 0), w), 0, 2)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["probe"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Fp8:
    """In E4M3, with weights that hold values of E4M3 in blocks.

    Attributes:
        probe: zeros of `PROBE_SHAPE`, whose gradient is the counts; None: nothing is counted.
    """

    probe: Float[Array, "2 3"] | None

    def linear(self, x, w, *, letters=None):
        units = select.implementation("fp8_linear")
        if units == "emulated":
            return _linear(x, w, self.probe, None)
        split = constrain.evenly(letters or " ".join("_" * w.ndim), shape=w.shape)
        return _linear(x, w, self.probe, linear_codes.Products(split, interpret=units == "fp8_interpreted"))

    def grouped(self, x, w, *, group_sizes, implementation):
        units = select.implementation("fp8_experts")
        return _grouped(x, w, group_sizes, self.probe, implementation if units == "emulated" else units)


def _rounded(x: Array, tile: tuple[int, int]) -> Array:
    return scaled.rounded(x, scaled.E4M3, block=tile)


def _counts(x: Array, *, rows: Array | None = None) -> Array:
    """Of the elements of ``x``, of which only some rows count: the others are zero."""
    counts = scaled.count(x, scaled.E4M3, block=_ALONG_WIDTH)
    return counts if rows is None else counts.at[0].set(rows.astype(jnp.float32) * x.shape[1])


def _along_tokens(x: Float[Array, "b s *g d"]) -> Array:
    """Rounded with one scale for 128 tokens of a row and one channel."""
    flat = x.reshape(*x.shape[:2], -1)
    return _rounded(flat, _ALONG_ROWS).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, w: Array, probe: Array | None, codes: linear_codes.Products | None) -> Array:
    if codes is not None:
        return codes.forward(x, w)
    g = "g" * (w.ndim - 2)
    return jnp.einsum(f"bs{g}d,{g}df->bs{g}f", _rounded(x, _ALONG_WIDTH), w)


def _linear_forward(x: Array, w: Array, probe: Array | None, codes: linear_codes.Products | None):
    return _linear(x, w, probe, codes), (x, w, None if probe is None else _counts(x))


def _linear_backward(codes: linear_codes.Products | None, saved: tuple[Array, Array, Array | None], dy: Array):
    x, w, counts = saved
    if codes is not None:
        dx, dw = codes.of_input(dy, w), codes.of_weight(x, dy)
    else:
        g = "g" * (w.ndim - 2)
        dx = jnp.einsum(f"bs{g}f,{g}df->bs{g}d", _rounded(dy, _ALONG_WIDTH), w)
        dw = jnp.einsum(f"bs{g}d,bs{g}f->{g}df", _along_tokens(x), _along_tokens(dy))
    return dx, dw.astype(w.dtype), None if counts is None else jnp.stack([counts, _counts(dy)])


_linear.defvjp(_linear_forward, _linear_backward)


def _by_matrices(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False, implementation: _Units) -> Array:
    if implementation == "fp8_triton" or implementation == "fp8_interpreted":
        from v4train.ops.kernels import fp8_matmul_triton  # Pallas takes a third of a second to import

        interpret = implementation == "fp8_interpreted"
        return fp8_matmul_triton.rows_by_matrices(x, w, group_sizes, transposed=transposed, interpret=interpret)
    x = _rounded(x, _ALONG_WIDTH)
    return grouped_matmul.by_matrices(x, w, group_sizes, transposed=transposed, implementation=implementation)


def _by_rows(x: Array, dy: Array, group_sizes: Array, *, implementation: _Units) -> Array:
    if implementation == "fp8_triton" or implementation == "fp8_interpreted":
        from v4train.ops.kernels import fp8_matmul_triton

        return fp8_matmul_triton.rows_by_rows(x, dy, group_sizes, interpret=implementation == "fp8_interpreted")
    return grouped_matmul.by_rows(_rounded(x, _ALONG_ROWS), _rounded(dy, _ALONG_ROWS), group_sizes, implementation=implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x: Array, w: Array, group_sizes: Array, probe: Array | None, implementation: _Units) -> Array:
    return _by_matrices(grouped_matmul.zero_past_end(x, group_sizes), w, group_sizes, implementation=implementation)


def _grouped_forward(x: Array, w: Array, group_sizes: Array, probe: Array | None, implementation: _Units):
    x = grouped_matmul.zero_past_end(x, group_sizes)
    counts = None if probe is None else _counts(x, rows=group_sizes.sum())
    return _grouped(x, w, group_sizes, probe, implementation), (x, w, group_sizes, counts)


def _grouped_backward(implementation: _Units, saved: tuple, dy: Array):
    x, w, group_sizes, counts = saved
    dy = grouped_matmul.zero_past_end(dy, group_sizes)
    dx = _by_matrices(dy, w, group_sizes, transposed=True, implementation=implementation)
    dw = _by_rows(x, dy, group_sizes, implementation=implementation)
    probe = None if counts is None else jnp.stack([counts, _counts(dy, rows=group_sizes.sum())])
    return dx, dw.astype(w.dtype), None, probe


_grouped.defvjp(_grouped_forward, _grouped_backward)
