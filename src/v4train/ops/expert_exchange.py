"""Carry every token to its experts and the results back, over the mesh axis that the experts are placed on.

Each device holds T tokens and a contiguous share of the experts: with E experts on ``ep`` devices, device j holds
``[j E/ep, (j+1) E/ep)``. A token asks for k experts; each (token, choice) pair is a *slot*. The exchange is dropless and exact:

1. sort the T k slots by expert, so that the rows for one expert, and for one device, are contiguous;
2. gather everybody's counts per expert: an [ep, ep, E/ep] table from which every device computes all offsets of the whole exchange;
3. send the rows with a ragged all-to-all, one *slice* for each (device, expert of that device). Each slice is written directly
   where the receiver wants it: its buffer is ordered by expert, then by source. Hence no second sort, no second permutation of the
   (large) buffer, and the experts' rows are grouped when they arrive;
4. run the experts; send the rows back by the same table read from the other side; add up each token's k results with its weights.

The buffer of step 3 holds the worst case, ``ep T k`` rows: every slot of every device may choose the same expert. `grouped_matmul` does no
work for its unused rows, but they take memory; a caller for whom that is too much scans over chunks of tokens.
(The rejected alternative, a smaller buffer, drops tokens when the routing is skewed, and makes the result depend on the mesh.)

Every movement of rows is a gather or an exchange in both directions: a permutation is differentiated as the gather by its inverse, an
exchange as the exchange with the two sides swapped. So there is no scatter-add, and two runs agree bit for bit.

Transports: ``ragged`` is `jax.lax.ragged_all_to_all` (TPU, GPU). XLA:CPU cannot run it, so ``emulated`` does the same with
a padded all-to-all: two devices never exchange more rows than the smaller of their two buffers has, which bounds the padding.
Everything else, the offsets above all, is the same code on every platform. (Rejected: all-gather and select, as short, but on the way
back it would hold ``ep^2 T k`` rows.)
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Transport = Literal["ragged", "emulated"]

ExpertFn = Callable[[Array, Array], Array]
"""``(rows [R, d], group_sizes i32[E_local]) -> [R, d]``: the local experts on rows sorted by expert; rows past the sum hold anything."""


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
        expert_fn: applies this device's experts. What it returns past the last used row is not used.
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
    place = jnp.argsort(order).reshape(expert_ids.shape)
    counts = jnp.sum(slot_expert[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)

    rows = _gather(x, order, place)
    if devices == 1:
        rows = expert_fn(rows, counts)
    else:
        assert axis_name is not None
        slots = len(rows)
        group_sizes, there, back = _plans(counts, slots, transport, axis_name)
        link = _Link(slots, devices * slots, transport, axis_name)
        rows = expert_fn(_exchange(rows, there, back, link), group_sizes)
        rows = _exchange(rows, back, there, link.reversed())
    rows = _gather(rows, place.reshape(-1), order[:, None]).reshape(*expert_ids.shape, -1)

    rows = jnp.where(expert_ids[:, :, None] < num_experts, rows, 0)
    return jnp.sum(weights[:, :, None] * rows.astype(jnp.float32), axis=1).astype(x.dtype)


@jax.custom_vjp
def _gather(x: Array, order: Array, place: Array) -> Array:
    """``repeat(x, k)[order]``; ``place`` [len(x), k] is the inverse of the permutation ``order``."""
    return _rows(x, lax.div(order, place.shape[1]))


def _gather_forward(x: Array, order: Array, place: Array) -> tuple[Array, Array]:
    return _gather(x, order, place), place


def _gather_backward(place: Array, dy: Array) -> tuple[Array, None, None]:
    return _rows(dy, place).sum(1, dtype=jnp.float32).astype(dy.dtype), None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


Plan = tuple[Array, ...]
"""What a transport needs to know to move rows in one direction; both directions' plans are made once, and swapped to differentiate."""


def _plans(counts: Array, slots: int, transport: Transport, axis_name: str) -> tuple[Array, Plan, Plan]:
    """From this device's counts per expert: the group sizes of its own experts, and the plans of the ways there and back.

    A device appears on both sides: as a *source* of tokens and as a *holder* of experts. On either side its slices are tables [ep, E/ep]:
    by the other device, then by expert.
    """
    devices = lax.axis_size(axis_name)
    here = lax.axis_index(axis_name)
    table = lax.all_gather(counts, axis_name).reshape(devices, devices, -1)  # [source, holder, expert]
    in_source = _starts(table)
    in_holder = _starts(table.transpose(1, 2, 0)).transpose(2, 0, 1)
    mine = [lax.dynamic_index_in_dim(t, here, 0, keepdims=False) for t in (table, in_source, in_holder)]
    held = [lax.dynamic_index_in_dim(t, here, 1, keepdims=False) for t in (table, in_holder, in_source)]
    group_sizes = held[0].sum(0)
    if transport == "ragged":
        return group_sizes, _ragged_plan(mine, held), _ragged_plan(held, mine)
    pack_source, unpack_source = _slab_maps(mine[0], mine[1], rows=slots, slab_rows=slots)
    pack_holder, unpack_holder = _slab_maps(held[0], held[1], rows=devices * slots, slab_rows=slots)
    return group_sizes, (pack_source, unpack_holder), (pack_holder, unpack_source)


def _ragged_plan(here: list[Array], there: list[Array]) -> Plan:
    sizes, offsets, remote_offsets = (t.reshape(-1) for t in here)
    return offsets, sizes, remote_offsets, there[0].reshape(-1)


def _starts(sizes: Array) -> Array:
    """First row of each slice, if those of a device [the first axis] follow each other in the order of the other axes."""
    flat = sizes.reshape(len(sizes), -1)
    return (jnp.cumsum(flat, axis=1) - flat).reshape(sizes.shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Link:
    """What is static about an exchange: the rows of the buffer here and of the one there, and the way between them."""

    rows_here: int
    rows_there: int
    transport: Transport
    axis_name: str

    def reversed(self) -> "_Link":
        return dataclasses.replace(self, rows_here=self.rows_there, rows_there=self.rows_here)


@jax.custom_vjp
def _exchange(rows: Array, plan: Plan, reverse: Plan, link: _Link) -> Array:
    """Moves rows into a buffer on the other side; its rows that nothing is sent to are zero."""
    assert len(rows) == link.rows_here, (rows.shape, link)
    if link.transport == "emulated":
        pack, unpack = plan
        return _rows_or_zero(lax.all_to_all(_rows(rows, pack), link.axis_name, 0, 0, tiled=True), unpack)
    buffer = jnp.zeros_like(rows, shape=(link.rows_there, rows.shape[1]))
    return lax.ragged_all_to_all(rows, buffer, *plan, axis_name=link.axis_name)


def _exchange_forward(rows: Array, plan: Plan, reverse: Plan, link: _Link) -> tuple[Array, tuple[Plan, Plan, _Link]]:
    return _exchange(rows, plan, reverse, link), (plan, reverse, link)


def _exchange_backward(saved: tuple[Plan, Plan, _Link], dy: Array) -> tuple[Array, None, None, None]:
    plan, reverse, link = saved
    return _exchange(dy, reverse, plan, link.reversed()), None, None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _slab_maps(sizes: Array, offsets: Array, *, rows: int, slab_rows: int) -> tuple[Array, Array]:
    """For the emulation, where a buffer is exchanged as one slab [slab_rows] for each other device, holding its slices one after the other.

    Args:
        sizes: rows of each slice, i32[ep, E/ep].
        offsets: their first rows in the buffer.
        rows: of the buffer.
        slab_rows: of a slab.

    Returns:
        The buffer's row for each row of the slabs (0 where there is none: nobody reads it), and the slabs' row for each row of the
        buffer (beyond the end where there is none).
    """
    devices = len(sizes)
    in_slab = _starts(sizes)
    pack = _translate(jnp.arange(slab_rows)[None, :, None], in_slab[:, None], sizes[:, None], offsets[:, None], otherwise=0)
    in_slabs = in_slab + slab_rows * jnp.arange(devices)[:, None]
    flat = (t.reshape(1, -1) for t in (offsets, sizes, in_slabs))
    unpack = _translate(jnp.arange(rows)[:, None], *flat, otherwise=devices * slab_rows)
    return pack.reshape(-1), unpack


def _translate(row: Array, starts: Array, sizes: Array, targets: Array, *, otherwise: int) -> Array:
    """Maps row ``starts + i`` to ``targets + i`` for 0 <= i < sizes; the slices, disjoint, are the last axis."""
    into = row - starts
    inside = (into >= 0) & (into < sizes)
    return otherwise + jnp.sum(jnp.where(inside, into + (targets - otherwise), 0), axis=-1)


def _rows_or_zero(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
