"""Matrices of many parameters as few stacks, each matrix on one device.

Newton-Schulz treats every matrix alone and needs all of it. So matrices of one shape, from whatever parameter, layer or expert, can go
through one batched loop. That turns one loop per parameter into one per shape, which is what compile time is made of, and gives the
hardware large batches. A matrix and its transpose have the same orthogonal factor up to transposition, so tall matrices join the wide
ones.

On a mesh the work is divided by matrices: with N devices each takes 1 / N of those of a shape, and no matrix is computed twice. What has
to move follows from where a parameter is stored (`sharding.rules`), as shards of its leading axes and of its rows and columns:

* split over a leading axis (experts): the matrices are at home, and nothing moves;
* rows or columns split over k devices: an all-to-all among these; each gives parts of all matrices, and gets all parts of 1 / k of them;
* copies on r devices (replicas): each takes 1 / r of the matrices, and afterwards the results are gathered;

and the same way back. A device sends and receives (k - 1) / k of what it stores, twice, in the dtype of the iteration; an expert never
leaves the devices that hold its parts, and no array is gathered whole unless it is stored as copies. Stacks whose length does not divide
are padded with zero matrices, for which Newton-Schulz gives zeros. So when there are fewer matrices of a shape than devices, the spare
devices work on zeros while each of the others does one: the time of one matrix is the least there is.

All of this is written out in `jax.shard_map`. Rejected: to constrain the stacks and let the partitioner find the exchange (it replicated
whole expert stacks to reorder them); every device computing everything (N times the arithmetic); a loop per parameter (40
parameters of 7 matrix shapes take twice as long to compile on a CPU, three times if the loop is unrolled, too); padding near-equal shapes
into one stack (saves one small loop, costs arithmetic cubic in the padding).

Joining costs a copy. Parameters of more than `LARGEST_JOINED` elements on a device are therefore not joined with others but walked
through in slices of about that size, so that the iteration's buffers stay small beside what is stored.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from v4train.sharding import rules

Matrices = Float[Array, "... n m"]
Stack = Float[Array, "X n m"]

LARGEST_JOINED = 2**26
"""Elements of a stack on one device, above which it is worked through in slices."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the parameters are stored.

    Attributes:
        mesh: the devices.
        specs: the partition of each parameter.
    """

    mesh: jax.sharding.Mesh
    specs: Sequence[PartitionSpec]


def map_matrices(function: Callable[[Stack], Stack], parameters: Sequence[Matrices], *, placed: Placed | None) -> list[Matrices]:
    """Applies ``function`` to all matrices of all parameters, each once, on one device.

    Args:
        function: maps ``[X, n, m]``, ``n <= m``, to the same shape, each matrix alone and zero to zero.
        parameters: arrays ``[..., n, m]``.
        placed: where they are; None: on one device.

    Returns:
        The results, in the shapes, the order and the places of ``parameters``.
    """
    if not parameters:
        return []
    if placed is None:
        return _map_local(function, parameters, routes=[_Route()] * len(parameters), shapes=[p.shape[-2:] for p in parameters])
    routes = [_route(spec, shape=p.shape, mesh=placed.mesh) for p, spec in zip(parameters, placed.specs, strict=True)]
    shapes = [p.shape[-2:] for p in parameters]

    def local(*shards: Matrices) -> tuple[Matrices, ...]:
        return tuple(_map_local(function, shards, routes=routes, shapes=shapes))

    specs = tuple(placed.specs)
    return list(jax.shard_map(local, mesh=placed.mesh, in_specs=specs, out_specs=specs, check_vma=False)(*parameters))


@dataclasses.dataclass(frozen=True)
class _Route:
    """The mesh axes over which a stack is split or copied, laid down like its matrices; ``devices`` share its matrices."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    devices: int = 1

    def deal(self, stack: Stack) -> Stack:
        """Parts of all matrices -> all parts of this device's. The length is a multiple of ``devices``."""
        if self.copies:
            mine = len(stack) // lax.axis_size(self.copies)
            stack = lax.dynamic_slice_in_dim(stack, lax.axis_index(self.copies) * mine, mine)
        for axes, dimension in ((self.rows, 1), (self.columns, 2)):
            if axes:
                k = lax.axis_size(axes)
                parts = lax.all_to_all(stack.reshape(k, -1, *stack.shape[1:]), axes, split_axis=0, concat_axis=0)
                stack = jnp.moveaxis(parts, 0, dimension).reshape(_times(stack.shape, dimension, k))
        return stack

    def collect(self, stack: Stack) -> Stack:
        """The way back."""
        for axes, dimension in ((self.columns, 2), (self.rows, 1)):
            if axes:
                k = lax.axis_size(axes)
                *before, size = stack.shape[: dimension + 1]
                parts = jnp.moveaxis(stack.reshape(*before, k, size // k, *stack.shape[dimension + 1 :]), dimension, 0)
                stack = lax.all_to_all(parts, axes, split_axis=0, concat_axis=0).reshape(-1, *parts.shape[2:])
        if self.copies:
            stack = lax.all_gather(stack, self.copies, tiled=True)
        return stack


def _times(shape: tuple[int, ...], dimension: int, k: int) -> tuple[int, ...]:
    """``k`` parts of the matrices' ``dimension`` joined, for 1 / k of the matrices."""
    return (shape[0] // k, *(size * k if i == dimension else size for i, size in enumerate(shape[1:], 1)))


def _route(spec: PartitionSpec, *, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> _Route:
    *_, rows, columns = (rules.names(part) for part in (*spec, *(None,) * (len(shape) - len(spec))))
    if shape[-2] > shape[-1]:
        rows, columns = columns, rows
    used = {name for part in spec for name in rules.names(part)}
    copies = tuple(name for name, size in mesh.shape.items() if size > 1 and name not in used)
    return _Route(rows, columns, copies, math.prod(mesh.shape[name] for name in (*rows, *columns, *copies)))


def _map_local(
    function: Callable[[Stack], Stack], parameters: Sequence[Matrices], *, routes: Sequence[_Route], shapes: Sequence[tuple[int, ...]]
) -> list[Matrices]:
    """One device's part of `map_matrices`: one call of ``function`` per matrix shape, and one for each large parameter."""
    wide = [shape[-2] <= shape[-1] for shape in shapes]
    stacks = [_to_stack(p, wide=w) for p, w in zip(parameters, wide, strict=True)]
    done: dict[int, Stack] = {}
    members: dict[tuple[int, ...], dict[_Route, list[int]]] = {}
    for i, (stack, route) in enumerate(zip(stacks, routes, strict=True)):
        if stack.size > LARGEST_JOINED:
            done[i] = _map_slices(function, stack, route=route)
        else:
            members.setdefault(tuple(sorted(shapes[i])), {}).setdefault(route, []).append(i)
    for groups in members.values():
        joined = [_padded(jnp.concatenate([stacks[i] for i in group]), route.devices) for route, group in groups.items()]
        dealt = [route.deal(stack) for route, stack in zip(groups, joined, strict=True)]
        results = jnp.split(function(jnp.concatenate(dealt)), _ends(dealt))
        for (route, group), result in zip(groups.items(), results, strict=True):
            parts = jnp.split(route.collect(result)[: sum(len(stacks[i]) for i in group)], _ends([stacks[i] for i in group]))
            done |= dict(zip(group, parts, strict=True))
    return [_from_stack(done[i], shape=p.shape, wide=w) for i, (p, w) in enumerate(zip(parameters, wide, strict=True))]


def _map_slices(function: Callable[[Stack], Stack], stack: Stack, *, route: _Route) -> Stack:
    """One large parameter, in slices."""
    dealt = _padded(stack, route.devices)
    turns = len(dealt) // route.devices
    each = max(n for n in range(1, turns + 1) if turns % n == 0 and (n == 1 or n * route.devices * stack[0].size <= LARGEST_JOINED))
    slices = dealt.reshape(turns // each, each * route.devices, *stack.shape[1:])
    return lax.map(lambda part: route.collect(function(route.deal(part))), slices).reshape(dealt.shape)[: len(stack)]


def _padded(stack: Stack, multiple: int) -> Stack:
    return jnp.pad(stack, ((0, -len(stack) % multiple), (0, 0), (0, 0)))


def _ends(stacks: Sequence[Stack]) -> list[int]:
    """Where to split what was joined."""
    return [sum(map(len, stacks[: i + 1])) for i in range(len(stacks) - 1)]


def _to_stack(parameter: Matrices, *, wide: bool) -> Stack:
    stack = parameter.reshape(-1, *parameter.shape[-2:])
    return stack if wide else stack.swapaxes(1, 2)


def _from_stack(stack: Stack, *, shape: tuple[int, ...], wide: bool) -> Matrices:
    return (stack if wide else stack.swapaxes(1, 2)).reshape(shape)
