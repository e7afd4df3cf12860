"""Carry every token to its experts and the results back, over the mesh axis that the experts are placed on.

Each device holds T tokens and a contiguous share of the experts: with E experts on ``ep`` devices, device j holds
``[j E/ep, (j+1) E/ep)``. A token asks for k experts; each (token, choice) pair is a *slot*. The exchange is dropless and exact:

1. sort the T k slots by expert, so that the rows for one expert, and for one device, are contiguous;
2. gather everybody's counts per expert: an [ep, ep, E/ep] table from which every device computes all offsets of the whole exchange;
3. send the rows with a ragged all-to-all, one *slice* for each (device, expert of that device). Each slice is written directly
   where the receiver wants it: its buffer is ordered by expert, then by source. Hence no second sort, no second permutation of the
   (large) buffer, and the experts' rows are grouped when they arrive;
4. run the experts; send the rows back by the same table read from the other side; add up each token's k results with its weights.

The buffer of step 3 holds the worst case, ``ep T k`` rows: every slot of every device may choose the same expert. Its unused rows are
zero, and `grouped_matmul` does no work for them, but they take memory; a caller for whom that is too much scans over chunks of tokens.
(The rejected alternative, a smaller buffer, drops tokens when the routing is skewed, and makes the result depend on the mesh.)

Every movement of rows is a gather or an exchange in both directions: a permutation is differentiated as the gather by its inverse, an
exchange as the exchange with the two sides swapped. So there is no scatter-add, and two runs agree bit for bit.

Transports: ``ragged`` is `jax.lax.ragged_all_to_all` (TPU, GPU). XLA:CPU cannot run it, so ``emulated`` does the same with
a padded all-to-all: two devices never exchange more rows than the smaller of their two buffers has, which bounds the padding.
Everything else, the offsets above all, is the same code on every platform. (Rejected: all-gather and select, as short, but on the way
back it would hold ``ep^2 T k`` rows.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Transport = Literal["ragged", "emulated"]

ExpertFn = Callable[[Array, Array], Array]
"""``(rows [R, d], group_sizes i32[E_local]) -> [R, d]``: the local experts on rows sorted by expert; rows past the sum are zero."""


def route_through_experts(
    x: Float[Array, "T d"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    expert_fn: ExpertFn,
    *,
    num_experts: int,
    axis_name: str | None,
    transport: Transport,
) -> Float[Array, "T d"]:
    """The weighted sum of each token's experts. Differentiable in ``x``, ``weights`` and what ``expert_fn`` closes over.

    Call it inside `jax.shard_map`, where all arrays are one device's part, or with ``axis_name=None`` on one device.

    Args:
        x: this device's tokens.
        expert_ids: global expert numbers; ``num_experts`` means *nowhere*: the slot is not sent and adds nothing (padding).
        weights: factor of each slot, fp32.
        expert_fn: applies this device's experts. What it returns past the last used row must be finite, and is not used.
        num_experts: E, over all devices; a multiple of the axis size.
        axis_name: mesh axis that the experts are split over; None (or an axis of size 1) exchanges nothing.
        transport: how rows travel; `ops.select` knows which one suits a platform.

    Returns:
        ``sum over k of weights * expert(x)``, accumulated in fp32, in the dtype of ``x``.

    Raises:
        ValueError: unknown transport, or the experts do not divide evenly over the axis.
    """
    if transport not in get_args(Transport):
        raise ValueError(f"expert_exchange: unknown transport {transport!r}; choose one of {', '.join(get_args(Transport))}")
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if num_experts % devices:
        raise ValueError(
            f"{num_experts} experts cannot be split evenly over mesh axis {axis_name!r} of size {devices}; make one divide the other"
        )
    shapes = x.shape, expert_ids.shape, weights.shape
    assert expert_ids.shape == weights.shape == (len(x), expert_ids.shape[-1]), shapes

    slot_expert = expert_ids.reshape(-1)
    order = jnp.argsort(slot_expert)
    place = jnp.argsort(order)
    counts = jnp.sum(slot_expert[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)

    rows = _gather(x, order, place, expert_ids.shape[1])
    if devices == 1:
        rows = expert_fn(rows, counts)
    else:
        assert axis_name is not None
        sources, holders = _sides(counts, axis_name)
        there = _Link(len(rows), devices * len(rows), axis_name, transport)
        arrived = _exchange(rows, sources, holders, there)
        rows = _exchange(expert_fn(arrived, holders.sizes.sum(0)), holders, sources, there.reversed())
    rows = _gather(rows, place, order, 1).reshape(*expert_ids.shape, -1)

    weights = jnp.where(expert_ids < num_experts, weights, 0)
    return jnp.sum(weights[:, :, None] * rows.astype(jnp.float32), axis=1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(x: Array, order: Array, place: Array, copies: int) -> Array:
    """``repeat(x, copies)[order]``; ``place`` is the inverse of the permutation ``order``."""
    return _rows(x, order // copies)


def _gather_forward(x: Array, order: Array, place: Array, copies: int) -> tuple[Array, Array]:
    return _gather(x, order, place, copies), place


def _gather_backward(copies: int, place: Array, dy: Array) -> tuple[Array, None, None]:
    dx = _rows(dy, place).reshape(-1, copies, dy.shape[-1])
    return dx.sum(1, dtype=jnp.float32).astype(dy.dtype), None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Side:
    """Where this device's slices lie, i32[ep, E/ep] each: by the other device, then by expert.

    Attributes:
        offsets: first row of the slice in the buffer of this side.
        sizes: rows.
        remote_offsets: first row of the slice in the other device's buffer of the other side.
    """

    offsets: Array
    sizes: Array
    remote_offsets: Array


def _sides(counts: Array, axis_name: str) -> tuple[_Side, _Side]:
    """This device as a source of tokens and as a holder of experts, from its counts per (global) expert."""
    devices = lax.axis_size(axis_name)
    table = lax.all_gather(counts, axis_name).reshape(devices, devices, -1)  # [source, holder, expert]
    sent = _starts(table)
    landed = _starts(table.transpose(1, 2, 0)).transpose(2, 0, 1)
    here = lax.axis_index(axis_name)
    row, column = (functools.partial(lax.dynamic_index_in_dim, index=here, axis=axis, keepdims=False) for axis in (0, 1))
    return _Side(row(sent), row(table), row(landed)), _Side(column(landed), column(table), column(sent))


def _starts(sizes: Array) -> Array:
    """First row of each slice if those of a device [the first axis] follow each other in the order of the other axes."""
    flat = sizes.reshape(len(sizes), -1)
    return (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


@dataclasses.dataclass(frozen=True)
class _Link:
    """What is static about an exchange: rows of the buffer here and of the one there, and the way."""

    rows_here: int
    rows_there: int
    axis_name: str
    transport: Transport

    def reversed(self) -> "_Link":
        return dataclasses.replace(self, rows_here=self.rows_there, rows_there=self.rows_here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(rows: Array, here: _Side, there: _Side, link: _Link) -> Array:
    """Sends the slices of side ``here`` into a buffer laid out as side ``there``, whose other rows are zero."""
    assert len(rows) == link.rows_here, (rows.shape, link)
    if link.transport == "emulated":
        return _emulated(rows, here, there, link)
    slices = [a.reshape(-1) for a in (here.offsets, here.sizes, here.remote_offsets, there.sizes)]
    buffer = jnp.zeros_like(rows, shape=(link.rows_there, rows.shape[1]))
    return lax.ragged_all_to_all(rows, buffer, *slices, axis_name=link.axis_name)


def _exchange_forward(rows: Array, here: _Side, there: _Side, link: _Link) -> tuple[Array, tuple[_Side, _Side]]:
    return _exchange(rows, here, there, link), (here, there)


def _exchange_backward(link: _Link, sides: tuple[_Side, _Side], dy: Array) -> tuple[Array, None, None]:
    here, there = sides
    return _exchange(dy, there, here, link.reversed()), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _emulated(rows: Array, here: _Side, there: _Side, link: _Link) -> Array:
    """The same by a dense all-to-all of one slab for each device, in which the slices for that device follow each other."""
    slab_rows = min(link.rows_here, link.rows_there)
    slab_starts = slab_rows * jnp.arange(len(here.sizes))[:, None]
    packed, unpacked = _starts(here.sizes), _starts(there.sizes) + slab_starts
    source = _translate(jnp.arange(slab_rows)[None], packed[:, None], here.sizes[:, None], here.offsets[:, None])
    slabs = lax.all_to_all(_rows_or_zero(rows, source.reshape(-1)), link.axis_name, 0, 0, tiled=True)
    flat = (a.reshape(1, -1) for a in (there.offsets, there.sizes, unpacked))
    return _rows_or_zero(slabs, _translate(jnp.arange(link.rows_there), *flat))


_NOWHERE = 2**30
"""Beyond any buffer, and still an i32 when a row number is added."""


def _translate(row: Array, starts: Array, sizes: Array, targets: Array) -> Array:
    """Maps row ``starts[s] + i`` to ``targets[s] + i`` for i < sizes[s], and rows outside of every slice s (last axis) to beyond _NOWHERE."""
    row = row[..., None]
    inside = (row >= starts) & (row < starts + sizes)
    return _NOWHERE + jnp.sum(jnp.where(inside, targets - starts - _NOWHERE, 0), axis=-1) + row[..., 0]


def _rows_or_zero(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
