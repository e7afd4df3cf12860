"""Matrix product of rows with the matrix of the group each row belongs to: the arithmetic of a mixture of experts.

The rows of ``x`` are sorted by group, ``group_sizes`` says how many rows each group has, and

    y[r] = x[r] @ w[group of r]

The number of rows of a group is data, so the shapes cannot say it. ``x`` is a buffer of R rows that holds the worst case; rows past
``sum(group_sizes)`` belong to no group: they come out as zero, whatever they hold, and neither receive nor give a gradient.

Implementations:

* ``dense``: the oracle. A one-hot matrix [R, G] and one einsum; G times the work.
* ``ragged_dot``: `jax.lax.ragged_dot_general`, native on TPU (exactly the useful FLOPs, forward and both gradients). On CPU and GPU
  XLA expands it into one dense product over all groups: G times the FLOPs and G times the memory.
* ``blocked``: for each group, a loop over blocks of rows whose trip count is read from ``group_sizes``, so the work follows the rows
  in use, not R. Groups need no alignment and no gather: a block may reach beyond the end of its group (or be moved back from the end of the
  buffer), the foreign rows are masked to zero and the product is *added* to the output, which leaves them as they are.
  The backward pass is one such loop for both gradients. It computes in fp32 inside, since XLA:CPU has no bf16 arithmetic and would
  convert the whole carried buffer once per block.

* ``triton``: kernels for GPUs (`ops.kernels.grouped_matmul_triton`): the useful FLOPs, and half a tile of rows a group. ``interpreted``
  runs the same kernels without a GPU, far too slowly for anything but tests.

Rejected for ``blocked``, measured on two CPU cores: gathering rows and weights into static blocks ``[n, b, d] x [n, d, f]`` and one einsum
(work and weight copies follow R; 6 to 10 times slower at R = 4 x used rows, d = f = 512), and one flat loop over the blocks of all groups
(copies a weight matrix per block: up to 1.5 times slower, and a third more operations to compile).

All but the oracle have their own derivative rule, so that both gradients are grouped products in the input's dtype:
``dx[r] = dy[r] @ w[g].T`` and ``dw[g] = sum over r in g of outer(x[r], dy[r])``. Products accumulate in fp32. `ragged_dot` is not *asked*
for fp32, because its units accumulate in fp32 anyway: an fp32 result would be stored in full before it is rounded (compiled for a
v5p, a layer of three products took 6.3 instead of 3.9 GB).
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Implementation = Literal["dense", "ragged_dot", "blocked", "triton", "interpreted"]

BLOCK_ROWS = 64
"""Rows of a block of ``blocked``: larger ones waste work on small groups, smaller ones pay more loop overhead."""


def grouped_matmul(
    x: Float[Array, "R d"], w: Float[Array, "G d f"], group_sizes: Int[Array, "G"], *, implementation: Implementation
) -> Float[Array, "R f"]:
    """Multiplies each row by its group's matrix.

    Args:
        x: rows, sorted by group.
        w: one matrix per group.
        group_sizes: rows of each group, in order; the sum is at most R. Rows past the sum give zero.
        implementation: see the module docstring; `ops.select` knows which one suits a platform.

    Returns:
        The products, accumulated in fp32, in the dtype of ``x``.

    Raises:
        ValueError: unknown implementation.
    """
    assert w.shape == (len(group_sizes), x.shape[1], w.shape[2]), (x.shape, w.shape, group_sizes.shape)
    match implementation:
        case "dense":
            return _dense(x, w, group_sizes)
        case "ragged_dot":
            return _ragged_dot(*_varying_alike(x, w, group_sizes))
        case "blocked":
            return _blocked(*_varying_alike(x, w, group_sizes))
        case "triton" | "interpreted":
            return _kernel(x, w, group_sizes, _Where(interpret=implementation == "interpreted"))
        case _:
            raise ValueError(_unknown(implementation))


def by_matrices(
    x: Float[Array, "R d"],
    w: Float[Array, "G d f"],
    group_sizes: Int[Array, "G"],
    *,
    transposed: bool = False,
    implementation: Implementation,
) -> Float[Array, "R f"]:
    """`grouped_matmul` without its derivative rule, and if ``transposed`` with matrices ``[G, f, d]``: a part of other rules."""
    x, w, group_sizes = _varying_alike(x, w, group_sizes)
    match implementation:
        case "dense":
            return _dense(x, w.swapaxes(1, 2) if transposed else w, group_sizes)
        case "ragged_dot":
            return _ragged_by_matrices(x, w, group_sizes, transposed=transposed)
        case "blocked":
            return _blocked_by_matrices(x, w, group_sizes, transposed=transposed)
        case "triton" | "interpreted":
            from v4train.ops.kernels import grouped_matmul_triton  # Pallas takes a third of a second to import

            interpret = implementation == "interpreted"
            return grouped_matmul_triton.rows_by_matrices(x, w, group_sizes, transposed=transposed, interpret=interpret)
    raise ValueError(_unknown(implementation))


def by_rows(
    x: Float[Array, "R d"], dy: Float[Array, "R f"], group_sizes: Int[Array, "G"], *, implementation: Implementation
) -> Float[Array, "G d f"]:
    """``dw[g] = sum over the rows r of g of outer(x[r], dy[r])``, in the dtype of ``x``. Rows past the sum are zero in both."""
    x, dy, group_sizes = _varying_alike(x, dy, group_sizes)
    match implementation:
        case "dense":
            member = _member(len(x), group_sizes).astype(x.dtype)
            return jnp.einsum("rg,rd,rf->gdf", member, x, dy, preferred_element_type=jnp.float32).astype(x.dtype)
        case "ragged_dot":
            return lax.ragged_dot_general(x, dy, group_sizes, _OVER_ROWS, preferred_element_type=x.dtype)
        case "blocked":
            return _blocked_by_rows(x, dy, group_sizes)
        case "triton" | "interpreted":
            from v4train.ops.kernels import grouped_matmul_triton

            return grouped_matmul_triton.rows_by_rows(x, dy, group_sizes, interpret=implementation == "interpreted")
    raise ValueError(_unknown(implementation))


def _unknown(implementation: str) -> str:
    return f"grouped_matmul: unknown implementation {implementation!r}; choose one of {', '.join(get_args(Implementation))}"


def _member(rows: int, group_sizes: Array) -> Array:
    """Whether a row is of a group, [R, G]."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)[:, None]
    return (row >= (ends - group_sizes)[None]) & (row < ends[None])


def _dense(x: Array, w: Array, group_sizes: Array) -> Array:
    member = _member(len(x), group_sizes).astype(x.dtype)
    x = zero_past_end(x, group_sizes)
    y = jnp.einsum("rg,rd,gdf->rf", member, x, w, preferred_element_type=jnp.float32)
    return zero_past_end(y.astype(x.dtype), group_sizes)


def zero_past_end(rows: Float[Array, "R d"], group_sizes: Int[Array, "G"]) -> Float[Array, "R d"]:
    """The rows that are of a group; zeros in place of the others, whatever they hold."""
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], rows, 0)


def _varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Marks all arrays as varying over the same mesh axes.

    Inside a `shard_map` that checks replication, a derivative rule must return gradients as varying as their inputs; the cast's own
    transpose is the sum over the axes that an input (replicated weights) did not vary over.
    """
    axes = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    every = frozenset().union(*axes)
    return tuple(lax.pcast(a, tuple(every - own), to="varying") if own != every else a for a, own in zip(arrays, axes, strict=True))


_BY_TRANSPOSED = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,))
_OVER_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=())


def _ragged_by_matrices(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False) -> Array:
    if transposed:
        y = lax.ragged_dot_general(x, w, group_sizes, _BY_TRANSPOSED, preferred_element_type=x.dtype)
    else:
        y = lax.ragged_dot(x, w, group_sizes, preferred_element_type=x.dtype)
    return zero_past_end(y, group_sizes)


@jax.custom_vjp
def _ragged_dot(x: Array, w: Array, group_sizes: Array) -> Array:
    return _ragged_by_matrices(x, w, group_sizes)


def _ragged_dot_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _ragged_dot(x, w, group_sizes), (x, w, group_sizes)


def _ragged_dot_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = saved
    dw = lax.ragged_dot_general(x, dy, group_sizes, _OVER_ROWS, preferred_element_type=w.dtype)
    return _ragged_by_matrices(dy, w, group_sizes, transposed=True).astype(x.dtype), dw, None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


@jax.custom_vjp
def _blocked(x: Array, w: Array, group_sizes: Array) -> Array:
    return _blocked_by_matrices(x, w, group_sizes)


def _blocked_by_matrices(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False) -> Array:
    rows = x.astype(jnp.float32)

    def group(y: Array, per_group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_g, size, end = per_group
        w_g = w_g.astype(jnp.float32)
        w_g = w_g.T if transposed else w_g

        def block(i: Array, y: Array) -> Array:
            start, mine = _block(i, size, end, len(y))
            return _add(y, _take(rows, start, mine) @ w_g, start)

        return lax.fori_loop(0, _blocks(size, len(y)), block, y), None

    y = jnp.zeros_like(rows, shape=(x.shape[0], w.shape[1 if transposed else 2]))
    return lax.scan(group, y, (w, group_sizes, jnp.cumsum(group_sizes)))[0].astype(x.dtype)


def _blocked_by_rows(x: Array, dy: Array, group_sizes: Array) -> Array:
    rows, dy = x.astype(jnp.float32), dy.astype(jnp.float32)

    def group(_: None, per_group: tuple[Array, Array]) -> tuple[None, Array]:
        size, end = per_group

        def block(i: Array, dw_g: Array) -> Array:
            start, mine = _block(i, size, end, len(rows))
            return dw_g + _take(rows, start, mine).T @ _take(dy, start, mine)

        zeros = jnp.zeros_like(rows, shape=(rows.shape[1], dy.shape[1]))
        return None, lax.fori_loop(0, _blocks(size, len(rows)), block, zeros).astype(x.dtype)

    return lax.scan(group, None, (group_sizes, jnp.cumsum(group_sizes)))[1]


def _blocked_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _blocked(x, w, group_sizes), (x, w, group_sizes)


def _blocked_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = saved
    rows, dy = x.astype(jnp.float32), dy.astype(jnp.float32)

    def group(dx: Array, per_group: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        w_g, size, end = per_group
        w_g = w_g.astype(jnp.float32)

        def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dw_g = carry
            start, mine = _block(i, size, end, len(dx))
            dy_b = _take(dy, start, mine)
            return _add(dx, dy_b @ w_g.T, start), dw_g + _take(rows, start, mine).T @ dy_b

        dx, dw_g = lax.fori_loop(0, _blocks(size, len(dx)), block, (dx, jnp.zeros_like(dx, shape=w_g.shape)))
        return dx, dw_g.astype(w.dtype)

    dx, dw = lax.scan(group, jnp.zeros_like(rows), (w, group_sizes, jnp.cumsum(group_sizes)))
    return dx.astype(x.dtype), dw, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Where:
    interpret: bool


@jax.custom_vjp
def _kernel(x: Array, w: Array, group_sizes: Array, where: _Where) -> Array:
    from v4train.ops.kernels import grouped_matmul_triton  # Pallas takes a third of a second to import

    return grouped_matmul_triton.rows_by_matrices(x, w, group_sizes, interpret=where.interpret)


def _kernel_forward(x: Array, w: Array, group_sizes: Array, where: _Where) -> tuple[Array, tuple[Array, Array, Array, _Where]]:
    return _kernel(x, w, group_sizes, where), (x, w, group_sizes, where)


def _kernel_backward(saved: tuple[Array, Array, Array, _Where], dy: Array) -> tuple[Array, Array, None, None]:
    from v4train.ops.kernels import grouped_matmul_triton

    x, w, group_sizes, where = saved
    dx = grouped_matmul_triton.rows_by_matrices(dy, w, group_sizes, transposed=True, interpret=where.interpret)
    dw = grouped_matmul_triton.rows_by_rows(x, dy, group_sizes, interpret=where.interpret)
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _blocks(size: Array, buffer_rows: int) -> Array:
    block_rows = min(BLOCK_ROWS, buffer_rows)
    return lax.div(size + (block_rows - 1), block_rows)


def _block(i: Array, size: Array, end: Array, buffer_rows: int) -> tuple[Array, Array]:
    """The first row of block ``i`` of the group that ends at ``end``, and which of its rows are the block's own [b, 1]."""
    block_rows = min(BLOCK_ROWS, buffer_rows)
    first = end - size + i * block_rows
    start = jnp.minimum(first, buffer_rows - block_rows)
    row = start + jnp.arange(block_rows)
    return start, ((row >= first) & (row < end))[:, None]


def _take(rows: Array, start: Array, mine: Array) -> Array:
    return jnp.where(mine, _slice(rows, start, len(mine)), 0)


def _add(rows: Array, block: Array, start: Array) -> Array:
    block = _slice(rows, start, len(block)) + block
    return lax.dynamic_update_slice_in_dim(rows, block, start, 0, allow_negative_indices=False)


def _slice(rows: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(rows, start, size, allow_negative_indices=False)
