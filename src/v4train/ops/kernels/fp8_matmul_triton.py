"""Products of FP8 codes with block scales on a GPU: `grouped_matmul_triton`'s two kernels, with factors of 8 bits (Hopper and later).

The tiling over groups is that module's, and so are its reasons. What is new is the inner loop. A turn takes 128 steps of the contraction,
over which every scale is constant, so it is

    total += dot(codes of x, codes of w) * scale of x[row] * scale of w[this block]

with a dot that starts from zero in the FP8 units and a total in fp32 registers: the tensor cores of Hopper add up FP8 products with about
14 bits, and 128 steps are as far as that carries (DeepSeek-V3 3.3.2). A matrix without groups is one group.

**Rows by matrices** has one scale of w for a turn and a tile of 128 columns, because its blocks are 128 x 128, and transposed likewise.
**Rows by rows** contracts over rows, whose scales belong to 128 aligned places of the buffer and one column. A group may begin and end
inside of such a tile; the loop runs over the aligned tiles that it touches and masks the rows of others.

Codes and scales are made outside (`encoded`), where XLA fuses it with whatever made the values.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from v4train.numerics import scaled
from v4train.ops.kernels import grouped_matmul_triton

TILE = scaled.FP8_TILE
BLOCK_ROWS = 128
_PARAMS = {"num_warps": 8, "num_stages": 3}


def encoded(x: Float[Array, "..."], *, block: tuple[int, int]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Codes in E4M3 and their blocks' scales in fp32; exact for values that are rounded already."""
    exponent = scaled.exponents(x, scaled.E4M3, block=block)
    values = scaled.round_with(x, scaled.spread(exponent, shape=x.shape, block=block), scaled.E4M3).astype(jnp.float32)
    codes = values * scaled.power_of_two(-scaled.spread(exponent, shape=x.shape, block=block))
    return codes.astype(jnp.float8_e4m3fn), scaled.power_of_two(exponent)


def rows_by_matrices(
    x: Float[Array, "R d"], w: Float[Array, "G d f"], group_sizes: Int[Array, "G"], *, transposed: bool = False, interpret: bool = False
) -> Float[Array, "R f"]:
    """``y[r] = x[r] @ w[group of r]`` with ``x`` rounded in tiles of 1 x 128 and ``w`` in blocks of 128 x 128; zero for rows past the sum.

    Args:
        x: rows sorted by group.
        w: one matrix a group; ``[G, f, d]`` if ``transposed``.
        group_sizes: rows of each group.
        transposed: multiply by the transposed matrices.
        interpret: run without a GPU, slowly.

    Returns:
        The products in the dtype of ``x``.
    """
    rows, depth = x.shape
    columns = w.shape[1 if transposed else 2]
    block_rows, block_columns = _block(rows, BLOCK_ROWS), _block(columns, TILE)
    tiles = grouped_matmul_triton.tiles(group_sizes, rows=rows, block_rows=block_rows)
    blocks = block_rows, block_columns, _block(depth, TILE)
    kernel = functools.partial(_rows_by_matrices, transposed=transposed, blocks=blocks, dot=_dot(interpret))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(columns, block_columns), len(tiles[0])),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        interpret=interpret,
        name="fp8_rows_by_matrices",
        compiler_params=plgpu.CompilerParams(**_PARAMS),
    )(*tiles, *encoded(x, block=(1, TILE)), *encoded(w, block=(TILE, TILE)))


def _rows_by_matrices(group_ref, first_ref, last_ref, x_ref, x_scale_ref, w_ref, w_scale_ref, y_ref, *, transposed: bool, blocks, dot):
    block_rows, block_columns, block_depth = blocks
    depth, groups = x_ref.shape[1], w_ref.shape[0]
    tile, side = pl.program_id(1), pl.program_id(0)
    group, last = group_ref[tile], last_ref[tile]
    row = first_ref[tile] + jnp.arange(block_rows)
    column = side * block_columns + jnp.arange(block_columns)
    row_inside, column_inside = row < last, column < y_ref.shape[1]
    used = (group < groups) & (first_ref[tile] < last)
    steps = used.astype(jnp.int32) * pl.cdiv(depth, block_depth)

    def step(i, total):
        k = i * block_depth + jnp.arange(block_depth)
        inside = k < depth
        x = plgpu.load(x_ref.at[row[:, None], k[None, :]], mask=row_inside[:, None] & inside[None, :], other=0.0)
        x_scale = plgpu.load(x_scale_ref.at[row, i], mask=row_inside, other=0.0)
        if transposed:
            w = plgpu.load(w_ref.at[group, column[:, None], k[None, :]], mask=column_inside[:, None] & inside[None, :], other=0.0)
            w_scale = w_scale_ref[group, side, i]
        else:
            w = plgpu.load(w_ref.at[group, k[:, None], column[None, :]], mask=inside[:, None] & column_inside[None, :], other=0.0)
            w_scale = w_scale_ref[group, i, side]
        return total + dot(x, w, trans_b=transposed) * (x_scale * w_scale)[:, None]

    total = lax.fori_loop(0, steps, step, jnp.zeros((block_rows, block_columns), jnp.float32))
    mask = row_inside[:, None] & column_inside[None, :]
    plgpu.store(y_ref.at[row[:, None], column[None, :]], total.astype(y_ref.dtype), mask=mask)


def rows_by_rows(
    x: Float[Array, "R d"], dy: Float[Array, "R f"], group_sizes: Int[Array, "G"], *, interpret: bool = False
) -> Float[Array, "G d f"]:
    """``dw[g] = sum over the rows r of g of outer(x[r], dy[r])``, both rounded in tiles of 128 rows x 1, in the dtype of ``x``."""
    depth, columns = x.shape[1], dy.shape[1]
    block_depth, block_columns = _block(depth, BLOCK_ROWS), _block(columns, TILE)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    kernel = functools.partial(_rows_by_rows, blocks=(_block(len(x), TILE), block_depth, block_columns), dot=_dot(interpret))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(columns, block_columns), pl.cdiv(depth, block_depth), len(group_sizes)),
        out_shape=jax.ShapeDtypeStruct((len(group_sizes), depth, columns), x.dtype),
        interpret=interpret,
        name="fp8_rows_by_rows",
        compiler_params=plgpu.CompilerParams(**_PARAMS),
    )(ends - group_sizes.astype(jnp.int32), ends, *encoded(x, block=(TILE, 1)), *encoded(dy, block=(TILE, 1)))


def _rows_by_rows(first_ref, last_ref, x_ref, x_scale_ref, dy_ref, dy_scale_ref, dw_ref, *, blocks: tuple[int, int, int], dot):
    block_rows, block_depth, block_columns = blocks
    group = pl.program_id(2)
    first, last = first_ref[group], last_ref[group]
    k = pl.program_id(1) * block_depth + jnp.arange(block_depth)
    column = pl.program_id(0) * block_columns + jnp.arange(block_columns)
    k_inside, column_inside = k < x_ref.shape[1], column < dy_ref.shape[1]

    def step(i, total):
        row = i * block_rows + jnp.arange(block_rows)
        inside = ((row >= first) & (row < last))[:, None]
        x = plgpu.load(x_ref.at[row[:, None], k[None, :]], mask=inside & k_inside[None, :], other=0.0)
        dy = plgpu.load(dy_ref.at[row[:, None], column[None, :]], mask=inside & column_inside[None, :], other=0.0)
        x_scale = plgpu.load(x_scale_ref.at[i, k], mask=k_inside, other=0.0)
        dy_scale = plgpu.load(dy_scale_ref.at[i, column], mask=column_inside, other=0.0)
        return total + dot(x, dy, trans_a=True) * x_scale[:, None] * dy_scale[None, :]

    start = lax.div(first, block_rows)
    stop = jnp.where(first < last, lax.div(last + (block_rows - 1), block_rows), start)
    total = lax.fori_loop(start, stop, step, jnp.zeros((block_depth, block_columns), jnp.float32))
    mask = k_inside[:, None] & column_inside[None, :]
    plgpu.store(dw_ref.at[group, k[:, None], column[None, :]], total.astype(dw_ref.dtype), mask=mask)


def _dot(interpret: bool):
    """The product of two tiles of codes. The interpreter runs on the CPU's compiler, which multiplies no FP8: there the codes are read as
    fp32, which holds them and their products exactly."""
    if not interpret:
        return plgpu.dot
    return lambda a, b, **which: plgpu.dot(a.astype(jnp.float32), b.astype(jnp.float32), **which)


def _block(size: int, largest: int) -> int:
    """A power of two: Triton's products of 8 bits want 32 at least."""
    return max(min(pl.next_power_of_2(size), largest), 32)
