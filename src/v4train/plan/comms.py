"""What a step sends between devices: bytes by mesh axis, and how long a network takes for them.

Bytes are those which one device must send at least, as `collectives` counts them in a compiled program: of an operand of n bytes in a group
of g an all-gather sends n (g-1), a reduce-scatter and an all-to-all n (g-1)/g, an all-reduce twice that, a permutation n. Per microbatch:

* a parameter is gathered from where it is stored to where it is used, once forward and once more if its layer is computed again; its
  gradient, if it moves, is scattered the same way back, and summed over the data-parallel axes that do not store it (`replica`);
* routed tokens travel to their experts and back (`exchange`);
* with `context`, a layer sends its left neighbour's window and tokens of straddling blocks, and gathers compressed entries and index keys
  only; with `tensor` it sums its output projections.

Once a step, Newton-Schulz brings each matrix that is stored in parts to one device, and takes the result back (`optim.stacking`).

Time. On GPUs the members of a group that share a domain split what comes from outside among their network cards and pass it on inside: a
gather is as fast as the slower of ``outside / members / card`` and ``all / NVLink``. An all-to-all has nothing to share. On a torus a
group of n spans as many dimensions as its share of the machine has, with two links in each; a group shorter than a ring has no way
round. An all-to-all is bound by the links across the middle: ``side / 8`` link times of what a device sends.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from v4train import recipe as recipe_lib
from v4train.core import hardware
from v4train.data import phases
from v4train.model import config as model_config
from v4train.plan import activations, exchange, machine, memory, weights

AXES = ("replica", "fsdp", "expert", "context", "tensor")
_DATA = ("replica", "fsdp", "expert", "context")

EFFICIENCY = 0.8
"""Share of a network's bandwidth that large transfers reach."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives of one purpose in one step, as one device sees them.

    Attributes:
        what: purpose, a key of `PURPOSES`.
        kind: ``all-gather``, ``reduce-scatter``, ``all-reduce``, ``all-to-all`` or ``permute``.
        axes: mesh axes, in the mesh's order.
        sent: bytes that one device sends in the step.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    sent: float


PURPOSES: dict[str, str] = {
    "gather": "parameters to the layers",
    "scatter": "gradients back",
    "experts": "routed tokens, there and back",
    "context": "windows and compressed entries",
    "tensor": "sums of projections",
    "optimizer": "matrices for Newton-Schulz",
}


def of_step(recipe: recipe_lib.Recipe, placed: list[weights.Weight], *, shape: phases.Shape, platform: str) -> list[Transfer]:
    """All transfers of a training step.

    Args:
        recipe: all settings.
        placed: its parameters on its mesh.
        shape: of the global batch.
        platform: ``cpu``, ``gpu`` or ``tpu``. The CPU's compiler sums dense gradients whole and lets each device keep its part: twice
            the bytes.
    """
    place = memory.place_of(recipe, shape)
    found = [
        *_parameters(recipe, placed, place, platform),
        *_experts(recipe, place, platform),
        *_context(recipe, shape, place),
        *_tensor(recipe, shape, place),
        *_optimizer(recipe, placed),
    ]
    merged: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for one in found:
        key = one.what, one.kind, one.axes
        merged[key] = merged.get(key, 0.0) + one.sent
    return [Transfer(*key, sent) for key, sent in sorted(merged.items(), key=lambda item: -item[1]) if sent and key[2]]


def _live(axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that have more than one device, in the mesh's order."""
    wanted = set(axes)
    return tuple(name for name in AXES if name in wanted and sizes[name] > 1)


def _parameters(recipe: recipe_lib.Recipe, placed: list[weights.Weight], place: activations.Place, platform: str) -> list[Transfer]:
    sizes, micro, width = recipe.mesh.sizes, recipe.train.microbatches, place.dtype.itemsize
    again, heads = 0 if recipe.model.remat == "none" else 1, 2 if recipe.model.mtp else 1
    found, moving = [], {w.path for w in weights.moving(placed, recipe.model)}
    for w in placed:
        if not w.declaration.trained:
            continue
        each = width if w.declaration.precision == "compute" else 4
        over = _live(w.gathered_over, sizes)
        parts = weights.size(over, sizes)
        if "looked_up" in w.declaration.tags:
            found += _looked_up(recipe, w, place, moves=w.path in moving)
            continue
        passes = 1 + again * w.path.startswith(("stack/", "mtp/block/"))
        if w.path == "head":
            passes = heads if recipe.model.warming_up else 2 * heads - 1 + (heads == 1)
        found.append(Transfer("gather", "all-gather", over, micro * passes * each * w.used * (parts - 1) / parts))
        if w.path not in moving:
            continue
        summed = _live((name for name in _DATA if not w.routed or name != "expert"), sizes)
        scattered, copied = _live((n for n in over if n in summed), sizes), _live((n for n in summed if n not in over), sizes)
        explicit = w.routed or w.path == "head"
        if platform == "cpu" and not explicit:
            n = weights.size(summed, sizes)
            found.append(Transfer("scatter", "all-reduce", summed, micro * 2 * each * w.used * (n - 1) / n))
            continue
        n, r = weights.size(scattered, sizes), weights.size(copied, sizes)
        uses = heads if w.path == "head" else 1
        found.append(Transfer("scatter", "reduce-scatter", scattered, micro * uses * each * w.used * (n - 1) / n))
        found.append(Transfer("scatter", "all-reduce", copied, micro * uses * 2 * each * w.used / n * (r - 1) / r))
    return [one for one in found if one.axes]


def _looked_up(recipe: recipe_lib.Recipe, w: weights.Weight, place: activations.Place, *, moves: bool) -> list[Transfer]:
    """The token table stays where it is: ids go to its parts, and columns of the tokens come back (`ops.lookup`)."""
    sizes = recipe.mesh.sizes
    others, copied = _live((n for n in w.gathered_over if n in _DATA), sizes), _live((n for n in _DATA if n in w.copied_over), sizes)
    k, r, micro = weights.size(others, sizes), weights.size(copied, sizes), recipe.train.microbatches
    row = recipe.model.hidden * place.dtype.itemsize
    return [
        Transfer("gather", "all-gather", others, micro * place.count * 4 * (k - 1)),
        Transfer("gather", "all-to-all", others, micro * (1 + moves) * place.count * row * (k - 1) / k),
        Transfer("scatter", "all-reduce", copied, moves * micro * 2 * place.dtype.itemsize * w.stored * (r - 1) / r),
    ]


def _layers(recipe: recipe_lib.Recipe) -> list[str]:
    return [*recipe.model.layer_kinds, *(["window"] if recipe.model.mtp else [])]


def _experts(recipe: recipe_lib.Recipe, place: activations.Place, platform: str) -> list[Transfer]:
    one = exchange.of(recipe, platform=platform, tokens=place.count)
    if one.devices == 1:
        return []
    sent = recipe.train.microbatches * one.passes * len(_layers(recipe)) * one.sent
    return [Transfer("experts", "all-gather" if one.transport == "gathered" else "all-to-all", one.axes, sent)]


def _context(recipe: recipe_lib.Recipe, shape: phases.Shape, place: activations.Place) -> list[Transfer]:
    c = recipe.mesh.context
    if c == 1:
        return []
    model, a, width, rows = recipe.model, recipe.model.attention, place.dtype.itemsize, place.rows
    forward, backward = 1 if model.remat == "none" else 2, not model.warming_up
    permuted, gathered, scattered = 0.0, 0.0, 0.0
    for name in _layers(recipe):
        kind = model.kind(name)
        permuted += rows * (a.window - 1) * a.head_dim * width * (forward + backward)
        if not kind.ratio or kind.ratio > shape.sequence_length:
            continue
        overlap = isinstance(kind, model_config.CompressedSparseConfig)
        indexed = kind.index_head_dim if isinstance(kind, model_config.CompressedSparseConfig) and kind.phase != "dense" else 0
        entries = math.ceil(place.tokens / kind.ratio)
        for size, learns in ((a.head_dim, backward), (indexed, True)):
            gathered += rows * entries * size * width * (c - 1) * forward
            scattered += learns * rows * entries * size * 4 * (c - 1)
            halo = (2 * kind.ratio - 1 if overlap else kind.ratio - 1) * size * (2 if overlap else 1)
            permuted += rows * halo * (width + 4) * (forward + learns)
    if model.mtp:
        permuted += rows * model.hidden * width * (1 + backward)
    axes, micro = _live(("context",), recipe.mesh.sizes), recipe.train.microbatches
    return [
        Transfer("context", "permute", axes, micro * permuted),
        Transfer("context", "all-gather", axes, micro * gathered),
        Transfer("context", "reduce-scatter", axes, micro * scattered),
    ]


def _tensor(recipe: recipe_lib.Recipe, shape: phases.Shape, place: activations.Place) -> list[Transfer]:
    """Sums of partial results: of three projections a layer forward (attention's output, shared and routed experts) and of the gradients of
    what all heads and all parts of an expert read: streams, latents, raw keys, entries and what they and the indexer are made of. In the
    indexer's warm-up, which has hardly any of the latter, this is too much."""
    t = recipe.mesh.tensor
    if t == 1:
        return []
    model, a, width, tokens = recipe.model, recipe.model.attention, place.dtype.itemsize, place.count
    forward = 1 if model.remat == "none" else 2
    sums = (1 + 1 + (2 if model.mtp else 1)) * tokens * model.hidden * width  # the embedding, the loss's input
    sums += 3 * 4 * tokens * (2 if model.mtp else 1)
    for name in _layers(recipe):
        kind = model.kind(name)
        sums += 3 * (forward + 1) * tokens * model.hidden * width + tokens * (a.query_rank + a.head_dim) * width
        if not kind.ratio or kind.ratio > shape.sequence_length:
            continue
        entries = place.rows * (shape.sequence_length // kind.ratio)
        sums += (entries * a.head_dim + 2 * tokens * a.head_dim) * width
        if isinstance(kind, model_config.CompressedSparseConfig):
            sums += 2 * tokens * a.head_dim * width
            if kind.phase != "dense":
                picked = min(kind.top_k, shape.sequence_length // kind.ratio)
                sums += tokens * (kind.index_heads + 4) * kind.index_head_dim * width + entries * kind.index_head_dim * width
                sums += forward * 4 * tokens * picked
    return [Transfer("tensor", "all-reduce", _live(("tensor",), recipe.mesh.sizes), recipe.train.microbatches * sums * 2 * (t - 1) / t)]


def _optimizer(recipe: recipe_lib.Recipe, placed: list[weights.Weight]) -> list[Transfer]:
    """Parts of matrices to one device and back; copies share the matrices, and the results are gathered (`optim.stacking`)."""
    if recipe.optimizer.muon is None:
        return []
    sizes, width = recipe.mesh.sizes, recipe.optimizer.muon.element_bytes
    found = []
    for stack in weights.stacks(weights.moving(placed, recipe.model), sizes=sizes):
        for axes in filter(None, (stack.rows, stack.columns)):
            k = weights.size(axes, sizes)
            found.append(Transfer("optimizer", "all-to-all", _live(axes, sizes), 2 * width * stack.dealt * (k - 1) / k))
        if stack.copies:
            r = weights.size(stack.copies, sizes)
            found.append(Transfer("optimizer", "all-gather", _live(stack.copies, sizes), width * stack.dealt * (r - 1)))
    return found


def seconds(transfer: Transfer, *, sizes: Mapping[str, int], on: machine.Machine) -> float:
    """How long a transfer takes if nothing else is on the network.

    Args:
        transfer: of one step.
        sizes: mesh axis -> size, in the mesh's order: the last axis has neighbouring devices.
        on: the machine.
    """
    network, n = on.chip.network, weights.size(transfer.axes, sizes)
    if n == 1 or not transfer.sent:
        return 0.0
    if on.slices > 1 and "replica" in transfer.axes:
        return transfer.sent / (EFFICIENCY * network.card)
    if isinstance(network, hardware.Domains):
        r = _members(transfer.axes, sizes, domain=network.size)
        outside = transfer.sent * (n - r) / (n - 1)
        if transfer.kind in ("all-to-all", "permute"):
            card, fast = outside, transfer.sent - outside
        else:
            card, fast = outside / r, transfer.sent * (r > 1)
        return max(card / network.card, fast / network.bandwidth) / EFFICIENCY
    each = on.devices // on.slices
    side = max(2.0, each ** (1 / network.dimensions))
    spanned = min(network.dimensions, math.log(n) / math.log(side))
    if transfer.kind == "all-to-all":
        return transfer.sent * min(side, n) / 8 / (EFFICIENCY * network.link)
    links = 2 * spanned if spanned >= 1 else 1
    return transfer.sent / (links * EFFICIENCY * network.link)


def _members(axes: Iterable[str], sizes: Mapping[str, int], *, domain: int) -> int:
    """Members of a group that share a domain of neighbouring devices."""
    stride, members = 1, 1
    for name in reversed(list(sizes)):
        if name in axes:
            members *= min(sizes[name], max(1, domain // stride))
        stride *= sizes[name]
    return members
