"""How long a step takes: arithmetic, memory traffic and what communication is not hidden, each from its own count; and its MFU.

A device does three kinds of work one after the other: matrix products, bound by its units; vector work and small products, bound by its
memory; and it waits for what comes over the network and was not hidden behind the first two. Nothing here is fitted to a run of this
program. The assumptions are the constants below, each with the published figure behind it; whoever has measured better sets
them (`Assumptions`), and the report prints them beside the result.

MFU has our own FLOP count as its numerator (`model.flops`: sparse attention, no recomputation), never the compiler's, which counts
a scan's body once and, where a grouped product is expanded, every expert.
"""

import dataclasses
from typing import NamedTuple

from v4train import recipe as recipe_lib
from v4train.core import hardware
from v4train.data import phases
from v4train.model import config as model_config
from v4train.model import flops
from v4train.optim import flops as optim_flops
from v4train.plan import comms, exchange, low_precision, machine, memory, weights


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no configuration says.

    Attributes:
        matmul: share of the peak in dense products: Llama 2 70B trains at 65% of the peak on 512 v5p, all else included (MaxText).
        experts: in grouped products of routed experts, whose groups are uneven: models with experts train at about half the MFU of
            dense ones, fewer and larger groups above that.
        attention: in products with gathered keys: FlashMLA's sparse prefill has 65% of an H800, a backward pass a ninth of that.
        indexer: in index scores, large products with a narrow contraction.
        fp8: what products of FP8 codes reach of the FP8 peak, as a share of what those in bf16 reach of theirs: Llama 3.1 405B on 256
            Ironwood trains at 54.7% of the bf16 peak in bf16 and at 41.8% of the FP8 peak in FP8 (Google's recipes for that TPU).
        memory: share of memory bandwidth in vector work.
        hidden: share of a layer's arithmetic behind which its parameters are gathered and its gradients scattered.
    """

    matmul: float = 0.70
    experts: float = 0.55
    attention: float = 0.35
    indexer: float = 0.50
    fp8: float = 0.76
    memory: float = 0.80
    hidden: float = 0.80


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step.

    Attributes:
        products: matrix products of all microbatches, recomputation included.
        vector: what memory bandwidth bounds: streams, attention's logits and gathers, index scores, weights.
        network: of each purpose of `comms.PURPOSES`, if nothing hid it.
        exposed: of it what nothing hides.
        optimizer: Newton-Schulz, its exchange, and the update.
        update: FLOPs of the optimizer, all devices together and each matrix once.
        flops: credited, of all devices: `model.flops.training`.
        tokens: of the step, all devices.
        mfu: credited FLOP/s over the bf16 peak.
    """

    products: float
    vector: float
    network: dict[str, float]
    exposed: float
    optimizer: float
    update: optim_flops.Flops
    flops: float
    tokens: int
    mfu: float

    @property
    def step(self) -> float:
        return self.products + self.vector + self.exposed + self.optimizer


def of_step(
    recipe: recipe_lib.Recipe,
    placed: list[weights.Weight],
    transfers: list[comms.Transfer],
    *,
    shape: phases.Shape,
    on: machine.Machine,
    platform: str,
    assumed: Assumptions,
) -> Timing:
    """Of one training step on a machine."""
    tokens = shape.places
    share = tokens / recipe.mesh.devices
    roles = low_precision.of(recipe, platform=platform)
    products = share * _product_seconds(recipe.model, placed, roles, shape.sequence_length, on.chip, assumed)
    vector = _vector_bytes(recipe, placed, roles, shape) / (assumed.memory * on.chip.hbm_bandwidth)
    times: dict[str, float] = {}
    for one in transfers:
        times[one.what] = times.get(one.what, 0.0) + comms.seconds(one, sizes=recipe.mesh.sizes, on=on)
    weights_time = times.get("gather", 0.0) + times.get("scatter", 0.0)
    waves = exchange.of(recipe, platform=platform, tokens=memory.place_of(recipe, shape).count).waves
    exposed = max(0.0, weights_time - assumed.hidden * products)
    exposed += times.get("experts", 0.0) / waves + times.get("context", 0.0) + times.get("tensor", 0.0)
    optimizer = _optimizer_seconds(recipe, placed, on, platform, assumed) + times.get("optimizer", 0.0)
    credited = flops.training(recipe.model, length=shape.sequence_length).total * tokens
    step = products + vector + exposed + optimizer
    update = optim_flops.update(recipe.optimizer, {w.path: w.declaration for w in weights.moving(placed, recipe.model)})
    return Timing(
        products, vector, times, exposed, optimizer, update, credited, tokens, credited / step / recipe.mesh.devices / on.chip.bf16_flops
    )


class _Passes(NamedTuple):
    """Of a training step over a layer: forward passes, and whether a backward pass, which is two of them, goes through all of it."""

    forward: int
    backward: bool

    @classmethod
    def of(cls, model: model_config.ModelConfig) -> "_Passes":
        """Forward again where a layer is remembered by its input. In the indexer's warm-up only the indexer is differentiated."""
        return cls(1 if model.remat == "none" else 2, not model.warming_up)

    @property
    def all(self) -> int:
        return self.forward + 2 * self.backward


def _product_seconds(
    model: model_config.ModelConfig,
    placed: list[weights.Weight],
    roles: dict[str, low_precision.Role],
    length: int,
    chip: hardware.Chip,
    assumed: Assumptions,
) -> float:
    """Of one token on one device: forward, backward, and forward again where a layer is remembered by its input."""
    passes, learning = _Passes.of(model).all, _Passes.of(model).forward + 2
    dense = experts = attention = indexer = 0.0
    for name in (*model.layer_kinds, *(["window"] if model.mtp else [])):
        kind = model.kind(name) if name != "window" else model_config.WindowConfig()
        one = flops.layer(model, kind, length=length)
        dense += passes * one.projections
        experts += passes * one.experts
        attention += passes * (one.window + one.entries)
        sparse = isinstance(kind, model_config.CompressedSparseConfig) and kind.phase == "sparse"
        indexer += (learning - 2 if sparse else learning) * one.indexer
    heads = 2 if model.mtp else 1
    dense += (1 if model.warming_up else 4) * heads * 2.0 * model.hidden * model.vocab_size
    if model.warming_up:
        dense += 2 * flops.indexer(model)
    if model.mtp:
        dense += passes * 2.0 * (1 + model.hyper.streams) * model.hidden**2
    seconds = dense / assumed.matmul + experts / assumed.experts + attention / assumed.attention + indexer / assumed.indexer
    return seconds / chip.bf16_flops - passes * _saved_by_codes(model, placed, roles, chip, assumed)


def _saved_by_codes(
    model: model_config.ModelConfig,
    placed: list[weights.Weight],
    roles: dict[str, low_precision.Role],
    chip: hardware.Chip,
    assumed: Assumptions,
) -> float:
    """Seconds that FP8 units save of one forward pass of one token, against bf16."""
    saved = 0.0
    for name, role in roles.items():
        if role.units == "codes":
            of_shared = sum(2.0 * w.declaration.size for w in placed if w.kind == "shared_expert" and w.declaration.product == name)
            share = assumed.experts if name == "experts" else assumed.matmul
            products = low_precision.product_flops(placed, name, top_k=model.moe.top_k)
            in_bf16 = (products - of_shared) / share + of_shared / assumed.experts  # shared experts count as experts (`flops.layer`)
            saved += in_bf16 / chip.bf16_flops - products / (assumed.fp8 * share * chip.fp8_flops)
    return saved


def _vector_bytes(
    recipe: recipe_lib.Recipe, placed: list[weights.Weight], roles: dict[str, low_precision.Role], shape: phases.Shape
) -> float:
    """Memory traffic of all microbatches of a step on one device: each pass reads and writes these arrays about so often."""
    model, a, place = recipe.model, recipe.model.attention, memory.place_of(recipe, shape)
    width, (forward, backward) = place.dtype.itemsize, _Passes.of(model)
    passes = forward + 2 * backward
    tokens = place.count * recipe.train.microbatches
    total = 0.0
    for name in (*model.layer_kinds, *(["window"] if model.mtp else [])):
        kind = model.kind(name)
        keys, picked, scored = float(a.window), 0, 0.0
        if kind.ratio:
            entries = shape.sequence_length / kind.ratio / 2
            keys += entries
            if isinstance(kind, model_config.CompressedSparseConfig) and kind.phase != "dense":
                scored = entries * kind.index_heads
                if kind.phase == "sparse":
                    picked = min(kind.top_k, shape.sequence_length // kind.ratio)
                    keys = a.window + min(entries, picked)
        streams = 2 * 4 * model.hyper.streams * model.hidden * width
        heads = a.heads / recipe.mesh.tensor
        total += passes * (streams + 4 * 4 * heads * keys + 4 * heads * a.head_dim * width + 3 * picked * a.head_dim * width)
        total += 2 * 2 * 4 * scored  # of the indexer, which also learns where nothing else does
        total += passes * model.moe.top_k * (4 * model.hidden + 6 * model.moe.ffn / recipe.mesh.tensor) * width
    used = sum(w.used for w in placed if w.declaration.trained)
    rounding = sum(
        low_precision.rounding_bytes(
            placed,
            role,
            top_k=model.moe.top_k,
            width=width,
            forward=forward,
            backward=backward,
            tokens=tokens,
            microbatches=recipe.train.microbatches,
        )
        for role in roles.values()
    )
    return total * tokens + recipe.train.microbatches * passes * width * used + rounding


def _optimizer_seconds(
    recipe: recipe_lib.Recipe, placed: list[weights.Weight], on: machine.Machine, platform: str, assumed: Assumptions
) -> float:
    muon, arithmetic, slower = recipe.optimizer.muon, 0.0, 1.0
    placed = weights.moving(placed, recipe.model)
    traffic = float(sum(w.stored * 4 * 8 for w in placed))
    if muon is not None:
        slower = {"gpu": 15.0, "tpu": 6.0}.get(platform, 1.0) if muon.ns_dtype == "float32" else 1.0
        for stack in weights.stacks(placed, sizes=recipe.mesh.sizes):
            arithmetic += optim_flops.newton_schulz(stack.shape, steps=len(muon.coefficients)) * stack.matrices
            traffic += stack.dealt * 4 * 6 * len(muon.coefficients)
    return arithmetic * slower / (assumed.matmul * on.chip.bf16_flops) + traffic / (assumed.memory * on.chip.hbm_bandwidth)
