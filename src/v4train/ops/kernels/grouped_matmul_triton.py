"""Grouped matrix products on a GPU: two Pallas kernels, compiled by Triton.

`rows_by_matrices` is forward and, with the matrices transposed, the gradient of the rows; `rows_by_rows` is the gradient of the
matrices. What is ragged is only the rows; the question is how to lay tiles over groups whose sizes are data.

**Rows by matrices.** Each group is cut into tiles of `BLOCK_ROWS` rows from its own first row on; the last tile of a group is masked at
its end. So a tile belongs to one group, and no row to two tiles: there is nothing to add up, no atomics, and the result does not depend
on the order in which tiles run. With R rows and G groups there are never more than ``R / BLOCK_ROWS + G + 1`` tiles, the number that is
launched; group, first and last row of each are computed outside, and tiles without rows return at once. The rows that belong to no
group are a group of their own, whose tiles have an empty inner loop and write zeros: the output needs no second pass.

**Rows by rows.** One program for each group and tile of its matrix; it loops over the group's rows, a trip count that is data. An empty
group writes zeros. Groups of different sizes take different times; that evens out, because a matrix of d x f has (d / 128) (f / 128)
tiles, hundreds of them for every group.

Both accumulate in fp32 and write once, in the input's dtype. fp32 inputs are multiplied in fp32, not TF32.

Rejected: `jax.lax.ragged_dot`, which XLA expands on GPUs to one dense product over all groups (compiled for an H100, 16,384 rows and 24
groups of 5,632 x 2,560: 8.9 GB of temporary memory forward and backward, these kernels: none); aligning groups to tiles by padding
(another copy of the rows, before and after); JAX's example kernels for Mosaic GPU, which are for Hopper alone and want rows that begin at
aligned places for the gradient of the matrices. They would be faster there.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

BLOCK_ROWS = 128
"""Rows of a tile. Each group wastes half a tile on average."""

BLOCK_COLUMNS = 128

_BLOCK_BYTES = 128
"""Of the contracted dimension in the inner loop of `rows_by_matrices`: 64 elements of bf16."""


def rows_by_matrices(
    x: Float[Array, "R d"], w: Float[Array, "G d f"], group_sizes: Int[Array, "G"], *, transposed: bool = False, interpret: bool = False
) -> Float[Array, "R f"]:
    """``y[r] = x[r] @ w[group of r]``; zero for rows past the sum.

    Args:
        x: rows sorted by group.
        w: one matrix a group; ``[G, f, d]`` if ``transposed``.
        group_sizes: rows of each group.
        transposed: multiply by the transposed matrices.
        interpret: run without a GPU, slowly.
    """
    rows, depth = x.shape
    columns = w.shape[1 if transposed else 2]
    block_rows, block_columns = _block(rows, BLOCK_ROWS), _block(columns, BLOCK_COLUMNS)
    known, first, last = tiles(group_sizes, rows=rows, block_rows=block_rows)
    kernel = functools.partial(
        _rows_by_matrices,
        transposed=transposed,
        blocks=(block_rows, block_columns, _block(depth, _BLOCK_BYTES // x.dtype.itemsize)),
        precision=_precision(x.dtype),
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(columns, block_columns), len(known)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        interpret=interpret,
        name="rows_by_matrices",
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    )(known, first, last, x, w)


def tiles(group_sizes: Int[Array, "G"], *, rows: int, block_rows: int) -> tuple[Int[Array, "t"], Int[Array, "t"], Int[Array, "t"]]:
    """The tiles of `rows_by_matrices`: group, first row, and the end of the group's rows. Rows of no group are group ``G``; tiles that are
    launched in vain have no rows."""
    groups = len(group_sizes)
    sizes = jnp.concatenate([group_sizes, (rows - group_sizes.sum())[None]]).astype(jnp.int32)
    counts = lax.div(sizes + (block_rows - 1), block_rows)
    tile = jnp.arange(rows // block_rows + groups + 1, dtype=jnp.int32)
    tile_ends, row_ends = jnp.cumsum(counts, dtype=jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= tile_ends[None], axis=1, dtype=jnp.int32)
    known = jnp.minimum(group, groups)
    first = (row_ends - sizes)[known] + (tile - (tile_ends - counts)[known]) * block_rows
    return known, first, jnp.where(group > groups, 0, row_ends[known])


def _rows_by_matrices(group_ref, first_ref, last_ref, x_ref, w_ref, y_ref, *, transposed: bool, blocks: tuple[int, int, int], precision):
    block_rows, block_columns, block_depth = blocks
    depth, groups = x_ref.shape[1], w_ref.shape[0]
    tile = pl.program_id(1)
    group, last = group_ref[tile], last_ref[tile]
    row = first_ref[tile] + jnp.arange(block_rows)
    column = pl.program_id(0) * block_columns + jnp.arange(block_columns)
    row_inside, column_inside = row < last, column < y_ref.shape[1]
    used = (group < groups) & (first_ref[tile] < last)
    steps = used.astype(jnp.int32) * pl.cdiv(depth, block_depth)  # a select of two constants is lowered to a bound of the wrong type

    def step(i, total):
        k = i * block_depth + jnp.arange(block_depth)
        inside = k < depth
        x = plgpu.load(x_ref.at[row[:, None], k[None, :]], mask=row_inside[:, None] & inside[None, :], other=0.0)
        if transposed:
            w = plgpu.load(w_ref.at[group, column[:, None], k[None, :]], mask=column_inside[:, None] & inside[None, :], other=0.0)
        else:
            w = plgpu.load(w_ref.at[group, k[:, None], column[None, :]], mask=inside[:, None] & column_inside[None, :], other=0.0)
        return total + plgpu.dot(x, w, trans_b=transposed, precision=precision)

    total = lax.fori_loop(0, steps, step, jnp.zeros((block_rows, block_columns), jnp.float32))
    mask = row_inside[:, None] & column_inside[None, :]
    plgpu.store(y_ref.at[row[:, None], column[None, :]], total.astype(y_ref.dtype), mask=mask)


def rows_by_rows(
    x: Float[Array, "R d"], dy: Float[Array, "R f"], group_sizes: Int[Array, "G"], *, interpret: bool = False
) -> Float[Array, "G d f"]:
    """``dw[g] = sum over the rows r of g of outer(x[r], dy[r])``, in the dtype of ``x``."""
    depth, columns = x.shape[1], dy.shape[1]
    block_depth, block_columns = _block(depth, BLOCK_ROWS), _block(columns, BLOCK_COLUMNS)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    kernel = functools.partial(
        _rows_by_rows,
        blocks=(_block(len(x), _BLOCK_BYTES // x.dtype.itemsize), block_depth, block_columns),
        precision=_precision(x.dtype),
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(columns, block_columns), pl.cdiv(depth, block_depth), len(group_sizes)),
        out_shape=jax.ShapeDtypeStruct((len(group_sizes), depth, columns), x.dtype),
        interpret=interpret,
        name="rows_by_rows",
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    )(ends - group_sizes.astype(jnp.int32), ends, x, dy)


def _rows_by_rows(first_ref, last_ref, x_ref, dy_ref, dw_ref, *, blocks: tuple[int, int, int], precision):
    block_rows, block_depth, block_columns = blocks
    group = pl.program_id(2)
    first, last = first_ref[group], last_ref[group]
    k = pl.program_id(1) * block_depth + jnp.arange(block_depth)
    column = pl.program_id(0) * block_columns + jnp.arange(block_columns)
    k_inside, column_inside = k < x_ref.shape[1], column < dy_ref.shape[1]

    def step(i, total):
        row = first + i * block_rows + jnp.arange(block_rows)
        inside = (row < last)[:, None]
        x = plgpu.load(x_ref.at[row[:, None], k[None, :]], mask=inside & k_inside[None, :], other=0.0)
        dy = plgpu.load(dy_ref.at[row[:, None], column[None, :]], mask=inside & column_inside[None, :], other=0.0)
        return total + plgpu.dot(x, dy, trans_a=True, precision=precision)

    steps = lax.div(last - first + (block_rows - 1), block_rows)
    total = lax.fori_loop(0, steps, step, jnp.zeros((block_depth, block_columns), jnp.float32))
    mask = k_inside[:, None] & column_inside[None, :]
    plgpu.store(dw_ref.at[group, k[:, None], column[None, :]], total.astype(dw_ref.dtype), mask=mask)


def _block(size: int, largest: int) -> int:
    """A power of two: Triton's products want 16 at least."""
    return max(min(pl.next_power_of_2(size), largest), 16)


def _precision(dtype) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
