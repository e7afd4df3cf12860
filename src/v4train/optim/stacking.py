"""Matrices of many parameters as few arrays.

Newton-Schulz treats every matrix alone, so matrices of one shape, from whatever parameter, layer or expert, can go through one
batched loop. That turns one loop per parameter into one per shape, which is what compile time is made of, and gives the hardware
large batches. A matrix and its transpose have the same orthogonal factor up to transposition, so tall matrices join the wide ones.

Each parameter ``[..., n, m]`` becomes ``[X, n, m]``, ``n <= m``; then the parameters are merged along X. Two details keep this free of
needless communication when the arrays are spread over devices (`constrain` spreads X; nothing here knows a mesh):

* The leading axes are flattened in reverse, ``[L, E, n, m] -> [E L, n, m]``. A reshape keeps a sharding only if the split axis is the
  major one, and of layers and experts it is the experts that are split.
* A concatenation along a split axis moves everything. So X is cut into ``shards`` equal runs and the parameters are joined *within*
  each run, ``[shards, X/shards, n, m]`` along axis 1, where nothing is split. Parameters that do not divide are first joined to each
  other, and padded with zero matrices, for which Newton-Schulz gives zeros.

Rejected: a loop per parameter (40 parameters of 7 matrix shapes take twice as long to compile on a CPU, three times if the loop is
unrolled, too), and padding near-equal shapes into one stack (saves one small loop, costs arithmetic cubic in the padding).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

Constrain = Callable[[Array], Array]
"""Takes and gives an array ``[X, n, m]`` of independent matrices; says how X is spread over devices."""
Matrices = Float[Array, "... n m"]
Stack = Float[Array, "X n m"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the caller wants stacks laid out.

    Attributes:
        constrain: applied to every stack, before and after the loop.
        shards: number of devices that ``constrain`` splits X over. Any number gives the same result; the true one gives the least
            communication.
    """

    constrain: Constrain = lambda x: x
    shards: int = 1


def map_matrices(function: Callable[[Stack], Stack], parameters: Sequence[Matrices], *, spread: Spread) -> list[Matrices]:
    """Applies ``function`` to all matrices of all parameters, one call per shape (up to transposition).

    Args:
        function: maps ``[X, n, m]``, ``n <= m``, to the same shape, each matrix alone and zero to zero.
        parameters: arrays ``[..., n, m]``.
        spread: layout of the stacks.

    Returns:
        The results, in the shapes and the order of ``parameters``.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for index, parameter in enumerate(parameters):
        members.setdefault(tuple(sorted(parameter.shape[-2:])), []).append(index)
    results: dict[int, Matrices] = {}
    for indices in members.values():
        stacks = _map_stacks(function, [_to_stack(parameters[i]) for i in indices], spread=spread)
        results |= {i: _from_stack(stack, shape=parameters[i].shape) for i, stack in zip(indices, stacks, strict=True)}
    return [results[i] for i in range(len(parameters))]


def _order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that reverses the leading axes and lays a tall matrix down. It is its own inverse."""
    lead = len(shape) - 2
    matrix = (lead, lead + 1) if shape[-2] <= shape[-1] else (lead + 1, lead)
    return (*reversed(range(lead)), *matrix)


def _to_stack(parameter: Matrices) -> Stack:
    laid = parameter.transpose(_order(parameter.shape))
    return laid.reshape(-1, *laid.shape[-2:])


def _from_stack(stack: Stack, *, shape: tuple[int, ...]) -> Matrices:
    order = _order(shape)
    return stack.reshape([shape[axis] for axis in order]).transpose(order)


def _map_stacks(function: Callable[[Stack], Stack], stacks: list[Stack], *, spread: Spread) -> list[Stack]:
    """One call of ``function`` for stacks of one matrix shape."""
    ragged = [i for i, stack in enumerate(stacks) if len(stack) % spread.shards]
    blocks = [stack for i, stack in enumerate(stacks) if i not in ragged]
    if ragged:
        joined = jnp.concatenate([stacks[i] for i in ragged])
        blocks.append(jnp.pad(joined, ((0, -len(joined) % spread.shards), (0, 0), (0, 0))))
    results = _map_blocks(function, blocks, spread=spread)
    if not ragged:
        return results
    ends = [sum(len(stacks[i]) for i in ragged[: k + 1]) for k in range(len(ragged))]
    parts = dict(zip(ragged, jnp.split(results.pop()[: ends[-1]], ends[:-1]), strict=True))
    whole = iter(results)
    return [parts[i] if i in parts else next(whole) for i in range(len(stacks))]


def _map_blocks(function: Callable[[Stack], Stack], blocks: list[Stack], *, spread: Spread) -> list[Stack]:
    """One call of ``function`` for stacks whose lengths are multiples of the number of shards."""
    matrix = blocks[0].shape[-2:]
    lead = (spread.shards, -1) if spread.shards > 1 else (-1,)  # an axis of 1 would cost compile time
    joined = len(lead) - 1
    runs = [spread.constrain(block).reshape(*lead, *matrix) for block in blocks]
    merged = spread.constrain(jnp.concatenate(runs, axis=joined).reshape(-1, *matrix))
    done = spread.constrain(function(merged)).reshape(*lead, *matrix)
    ends = [sum(run.shape[joined] for run in runs[: k + 1]) for k in range(len(runs))]
    return [spread.constrain(part.reshape(-1, *matrix)) for part in jnp.split(done, ends[:-1], axis=joined)]
