"""Bytes on one device, by cause, at the moment of a step when they are most.

What a step holds for its whole time is the *state*: parameters in fp32, Muon's momentum or Adam's two moments, tables, the batch; from the
backward pass on also the gradients. A trillion parameters need 4 + 4 + 4 bytes each, spread over all devices that `sharding.rules` stores
them on. On top of that comes one of three moments, of which the largest counts:

* *a layer's backward pass*: every layer's input has been kept (mHC streams, `hyper.streams` times as wide as elsewhere), one layer is
  computed again with its weights gathered, and its routed tokens lie in the buffers of the exchange; with FP8 the factors of one
  product have been rounded (`low_precision`);
* *the loss*: the head gathered, and the logits of one chunk in fp32, thrice (scores, their exponentials, their gradient);
* *the optimizer*: what Newton-Schulz is given and what it gives, and its own buffers for one slice of the matrices.

Copies in the compute dtype (cast before the first layer) and the gradients as the layers give them, in that dtype, are there in the
first two moments.
"""

import dataclasses
import math

from v4train import recipe as recipe_lib
from v4train.data import phases
from v4train.model import config as model_config
from v4train.optim import config as optim_config
from v4train.optim import optimizer
from v4train.plan import activations, exchange, low_precision, weights

CAUSES: dict[str, str] = {
    "parameters": "parameters, fp32",
    "optimizer": "optimizer state, fp32",
    "tables": "router tables and biases, the batch",
    "gradients": "gradients, fp32",
    "copies": "parameters and gradients in the compute dtype",
    "streams": "mHC streams kept between layers",
    "activations": "other activations kept (remat)",
    "layer": "one layer computed again",
    "gathered": "its weights, gathered, and their gradient",
    "exchange": "routed tokens in exchange buffers",
    "rounded": "factors of one product, rounded to FP8",
    "logits": "logits of one chunk, and the head",
    "newton_schulz": "Newton-Schulz: input, output, one slice",
}
"""Key -> what it is."""

MOMENTS: dict[str, tuple[str, ...]] = {
    "a layer's backward pass": ("copies", "streams", "activations", "layer", "gathered", "exchange", "rounded"),
    "the loss": ("copies", "streams", "activations", "logits"),
    "the optimizer": ("newton_schulz",),
}
"""Moment -> what is there besides the state and the gradients."""

_STATE = ("parameters", "optimizer", "tables", "gradients")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parts: by cause, each at its own worst moment; keys of `CAUSES`.
        moment: when the sum is largest, a key of `MOMENTS`.
        evaluation: raw keys and compressed entries of all layers for the device's rows, if evaluation or decoding kept them (a cache).
    """

    parts: dict[str, float]
    moment: str
    evaluation: float

    @property
    def at_peak(self) -> dict[str, float]:
        """The parts that are there at the worst moment."""
        return {cause: self.parts[cause] for cause in (*_STATE, *MOMENTS[self.moment]) if self.parts[cause]}

    @property
    def state(self) -> float:
        """What a step is given: all that the compiler calls arguments."""
        return sum(self.parts[cause] for cause in ("parameters", "optimizer", "tables"))

    @property
    def total(self) -> float:
        return sum(self.at_peak.values())


def of_step(
    recipe: recipe_lib.Recipe, placed: list[weights.Weight], *, shape: phases.Shape, platform: str, per_layer: dict[str, activations.Kept]
) -> Memory:
    """Of a training step.

    Args:
        recipe: all settings.
        placed: its parameters on its mesh.
        shape: of the global batch.
        platform: ``cpu``, ``gpu`` or ``tpu``, which decides how routed tokens travel.
        per_layer: what a layer of each kind keeps, `activations.of_layer`; ``window`` for the MTP block.
    """
    place = place_of(recipe, shape)
    parts = _state(recipe, placed, shape) | _kept(recipe, placed, shape, place, per_layer) | _passing(recipe, placed, place, per_layer)
    exchanged, width = exchange.of(recipe, platform=platform, tokens=place.count), place.dtype.itemsize
    parts["exchange"] = exchanged.bytes
    rounded = {"width": width, "tokens": place.count, "rows": exchanged.rows}
    roles = low_precision.of(recipe, platform=platform).values()
    parts["rounded"] = max(low_precision.product_bytes(placed, role, **rounded) for role in roles)
    parts = {cause: float(parts[cause]) for cause in CAUSES}
    moment = max(MOMENTS, key=lambda name: sum(parts[cause] for cause in MOMENTS[name]))
    return Memory(parts, moment, _cache(recipe, shape, place))


def place_of(recipe: recipe_lib.Recipe, shape: phases.Shape) -> activations.Place:
    """The part of a microbatch that one device holds."""
    rows = shape.rows // (recipe.mesh.batch_shards * recipe.train.microbatches)
    return activations.Place(max(rows, 1), math.ceil(shape.sequence_length / recipe.mesh.context), recipe.numerics)


def _state(recipe: recipe_lib.Recipe, placed: list[weights.Weight], shape: phases.Shape) -> dict[str, float]:
    trained = [w for w in placed if w.declaration.trained]
    row = shape.sequence_length * (6 * 4 + 1) / recipe.mesh.context
    row += shape.max_patches * (3 * recipe.data.image_patch**2 + 4) + shape.max_audio_frames * 80
    return {
        "parameters": sum(4 * w.stored for w in trained),
        "optimizer": _moments(recipe, trained),
        "tables": sum(w.stored * w.declaration.dtype.itemsize for w in placed if not w.declaration.trained)
        + shape.rows * row / recipe.mesh.batch_shards,
        "gradients": sum(4 * w.stored for w in trained),
    }


def _moments(recipe: recipe_lib.Recipe, trained: list[weights.Weight]) -> float:
    """Momentum of Muon's parameters, two moments of the others. What transforms of optax remember is spread like the parameters."""
    if not isinstance(recipe.optimizer, optim_config.OptaxConfig):
        return sum((4 if w.declaration.group == "muon" else 8) * w.stored for w in trained)
    whole = optimizer.state_bytes(recipe.optimizer, {w.path: w.declaration for w in trained})
    return whole * sum(w.stored for w in trained) / sum(w.declaration.size for w in trained)


def _kept(
    recipe: recipe_lib.Recipe,
    placed: list[weights.Weight],
    shape: phases.Shape,
    place: activations.Place,
    per_layer: dict[str, activations.Kept],
) -> dict[str, float]:
    """What stays from the forward to the backward pass."""
    model, width = recipe.model, place.dtype.itemsize
    trained = [w for w in placed if w.declaration.trained]
    cast = sum(width * w.stored for w in trained if w.declaration.precision == "compute")
    given = sum(width * w.stored for w in trained)
    kinds = [*model.layer_kinds, *(["window"] if model.mtp else [])]
    streams = place.count * model.hyper.streams * model.hidden * width
    whole = 0.0
    if model.remat == "none":
        whole = sum(width * w.used for w in trained if w.gathered_over and w.group not in ("embedding", "head"))
        whole += exchange.of(recipe, platform="cpu", tokens=place.count).saved * len(kinds)
    copies = (cast if width < 4 else 0) + (given if width < 4 or recipe.train.microbatches > 1 else 0)
    return {
        "copies": copies,
        "streams": streams * (len(kinds) + (1 if model.mtp else 0)),
        "activations": sum(per_layer[kind].saved - streams for kind in kinds)
        + activations.of_media(model, patches=shape.max_patches, frames=shape.max_audio_frames, place=place)
        + place.count * model.hidden * width * 3
        + whole,
    }


def _passing(
    recipe: recipe_lib.Recipe, placed: list[weights.Weight], place: activations.Place, per_layer: dict[str, activations.Kept]
) -> dict[str, float]:
    """What comes and goes: a layer's own, the loss's and the optimizer's."""
    model, width, mesh = recipe.model, place.dtype.itemsize, recipe.mesh
    streams = place.count * model.hyper.streams * model.hidden * width
    inside = 0.0 if model.remat == "none" else max(kept.inside - streams for kept in per_layer.values())
    groups: dict[str, float] = {}
    for w in placed:
        if w.declaration.trained and w.gathered_over:
            bytes_each = width if w.declaration.precision == "compute" else 4
            groups[w.group] = groups.get(w.group, 0.0) + bytes_each * w.used / w.layers
    layers = {name: size for name, size in groups.items() if name not in ("embedding", "head")}
    chunk = min(model.loss_chunk, place.tokens)
    newton_schulz = 0
    if recipe.optimizer.muon is not None:
        at_once = weights.most_at_once(placed, sizes=mesh.sizes)
        whole = sum(w.stored for w in placed if w.declaration.group == "muon")
        newton_schulz = 2 * 4 * whole + 4 * recipe.optimizer.muon.element_bytes * at_once
    return {
        "layer": inside + 2 * streams + max(_chunk(recipe, kind, place) for kind in (*model.layer_kinds, "window")),
        "gathered": 2 * max(layers.values(), default=0.0),
        "logits": 3 * 4 * place.rows * chunk * model.vocab_size / mesh.tensor
        + 2 * groups.get("head", 0.0)
        + 2 * place.count * model.hidden * 4,
        "newton_schulz": newton_schulz,
    }


def _chunk(recipe: recipe_lib.Recipe, kind_name: str, place: activations.Place) -> float:
    """What attention needs for one chunk of queries and its derivative."""
    model, a = recipe.model, recipe.model.attention
    kind, length = model.kind(kind_name), place.tokens * recipe.mesh.context
    queries = place.rows * min(max(a.chunk, a.window), place.tokens)
    if place.tokens <= a.chunk and model.remat == "none":
        return 0.0  # one chunk: nothing is made again
    entries = length // kind.ratio if kind.ratio else 0
    keys, gathered, scores = a.window + min(a.chunk, place.tokens), 0.0, 0.0
    if isinstance(kind, model_config.CompressedSparseConfig) and kind.phase != "dense":
        block = entries
        if kind.phase == "sparse" and kind.top_k < entries:
            gathered = queries * kind.top_k * (a.head_dim + kind.index_head_dim) * place.dtype.itemsize * 2
            block, entries = min(4096, entries), kind.top_k
        scores = 2 * 4 * queries * block * kind.index_heads
    return 4 * 4 * queries * (a.heads // recipe.mesh.tensor) * (keys + entries) + gathered + scores


def _cache(recipe: recipe_lib.Recipe, shape: phases.Shape, place: activations.Place) -> float:
    model, a = recipe.model, recipe.model.attention
    per_row = 0.0
    for name in model.layer_kinds:
        kind = model.kind(name)
        per_row += min(a.window, shape.sequence_length) * a.head_dim
        if kind.ratio:
            width = a.head_dim + (kind.index_head_dim if isinstance(kind, model_config.CompressedSparseConfig) else 0)
            per_row += shape.sequence_length // kind.ratio * width
    return per_row * place.rows / recipe.mesh.context * place.dtype.itemsize
