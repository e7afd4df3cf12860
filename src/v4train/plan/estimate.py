"""The plan of a recipe on a machine: everything that can be said before a device is started."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from v4train import recipe as recipe_lib
from v4train.core import hardware, param
from v4train.data import phases
from v4train.model import config as model_config
from v4train.model import count, transformer
from v4train.optim import groups
from v4train.plan import activations, comms, cost, low_precision, machine, memory, timing, weights
from v4train.sharding import mesh as mesh_lib


class Part(NamedTuple):
    """What the steps of a part of a run have in common.

    Attributes:
        shape: of the global batch.
        model: in its stage.
    """

    shape: phases.Shape
    model: model_config.ModelConfig

    @property
    def attention(self) -> str | None:
        """Phase of the CSA layers; None without any."""
        return getattr(self.model.kind("csa"), "phase", None)

    def of(self, recipe: recipe_lib.Recipe) -> recipe_lib.Recipe:
        """The recipe with the attention of this part; a recipe that differs in other things keeps them."""
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"kinds": self.model.kinds})})


@dataclasses.dataclass(frozen=True)
class Phase:
    """A shape of batch and a model that a run has, and what a step takes.

    Attributes:
        model: in its stage.
        shape: of the global batch.
        steps: of it in the run.
        memory: bytes on one device.
        transfers: between devices.
        timing: seconds.
    """

    model: model_config.ModelConfig
    shape: phases.Shape
    steps: int
    memory: memory.Memory
    transfers: list[comms.Transfer]
    timing: timing.Timing

    @property
    def attention(self) -> str | None:
        """Phase of the CSA layers; None without any."""
        return Part(self.shape, self.model).attention


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A recipe on a machine.

    Attributes:
        recipe: all settings.
        on: the machine.
        parameters: total and active.
        stored_by_kind: parameters on one device.
        phases: in the order in which the run first has them.
        assumed: of the step's time.
        bill: for the whole run.
        price: dollars for a chip hour.
    """

    recipe: recipe_lib.Recipe
    on: machine.Machine
    parameters: count.ParameterCount
    stored_by_kind: dict[str, int]
    phases: list[Phase]
    assumed: timing.Assumptions
    bill: cost.Bill
    price: float

    @property
    def worst(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def main(self) -> Phase:
        """The phase with most tokens."""
        return max(self.phases, key=lambda phase: phase.steps * phase.shape.places)

    def chip_hours(self, *, mfu: float) -> float:
        """Of the same tokens at another MFU."""
        credited = sum(phase.steps * phase.timing.flops for phase in self.phases)
        own = sum(phase.steps * phase.shape.places for phase in self.phases)
        return cost.chip_hours(tokens=self.bill.tokens, flops_per_token=credited / own, peak=self.on.chip.bf16_flops, mfu=mfu)

    @property
    def fits(self) -> bool:
        return self.worst.memory.total <= self.on.usable_bytes


def platform_of(on: machine.Machine) -> str:
    """The column of `ops.select` that a chip has."""
    return "tpu" if isinstance(on.chip.network, hardware.Torus) else "gpu"


def declarations_of(recipe: recipe_lib.Recipe) -> dict:
    """All parameters of a recipe's model, as its optimizer treats them."""
    return groups.assign(recipe.optimizer, _declarations(recipe.model.model_dump_json()))


@functools.lru_cache(maxsize=8)
def _declarations(model: str) -> dict:
    return param.declarations(transformer.Transformer(model_config.ModelConfig.model_validate_json(model)))


def check(recipe: recipe_lib.Recipe, *, on: machine.Machine) -> None:
    """Refuses a machine that the recipe's mesh or its formats are not for.

    Raises:
        ValueError: another number of devices, slices that the mesh does not keep apart, or a chip without units for FP8 codes where
            kernels multiply them; with what would do.
    """
    low_precision.check(recipe, on=on, platform=platform_of(on))
    mesh = recipe.mesh
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.sizes.items() if size > 1) or "1 device"
    if mesh.devices != on.devices:
        copies = f"copy it with --set mesh.replica={mesh.replica * on.devices // mesh.devices}, " if on.devices % mesh.devices == 0 else ""
        raise ValueError(
            f"the recipe's mesh ({sizes}) is for {mesh.devices:,} devices, but {on.option} has {on.devices:,}; name as many with "
            f"{on.option}, {copies}or let --search find a mesh"
        )
    if mesh.replica % on.slices:
        raise ValueError(
            f"{on.option} has {on.slices} slices and only mesh.replica goes across them, but mesh.replica {mesh.replica} is no multiple of "
            f"it; set mesh.replica={on.slices} and divide another axis, or let --search find a mesh"
        )


def parts_of(recipe: recipe_lib.Recipe) -> dict[Part, int]:
    """The shapes of batches that a run has, with the attention of its stages, and the steps of each. Weights of losses take nothing."""
    data = recipe.data.schedule(batch_rows=recipe.train.batch_rows)
    stages = recipe.train.course(model=recipe.model, phases=data)
    edges = sorted({*(phase.first_step for phase in data.phases), *stages.first_steps, recipe.train.steps})
    edges = [edge for edge in edges if edge <= recipe.train.steps]
    found: dict[Part, int] = {}
    for first, end in itertools.pairwise(edges):
        stage = stages.at(first)._replace(mtp_weight=stages.at(0).mtp_weight)
        part = Part(data.at(first).shape, stage.model(recipe.model))
        found[part] = found.get(part, 0) + end - first
    return found


def shapes_of(recipe: recipe_lib.Recipe) -> dict[phases.Shape, int]:
    """The shapes of batches that a run has, and the steps of each."""
    found: dict[phases.Shape, int] = {}
    for part, steps in parts_of(recipe).items():
        found[part.shape] = found.get(part.shape, 0) + steps
    return found


def kept_by_kind(recipe: recipe_lib.Recipe, *, shape: phases.Shape) -> dict[str, activations.Kept]:
    """What a layer of each kind keeps on one device."""
    place = memory.place_of(recipe, shape)
    kinds = {*recipe.model.layer_kinds, *(["window"] if recipe.model.mtp else [])}
    return {kind: activations.of_layer(recipe.model, kind, place=place) for kind in sorted(kinds)}


def of_phase(
    recipe: recipe_lib.Recipe,
    *,
    shape: phases.Shape,
    steps: int,
    on: machine.Machine,
    assumed: timing.Assumptions,
    platform: str | None = None,
    per_layer: dict[str, activations.Kept] | None = None,
    placed: list[weights.Weight] | None = None,
) -> Phase:
    """What one shape of batch takes.

    Args:
        recipe: all settings.
        shape: of the global batch.
        steps: of it in the run.
        on: the machine.
        assumed: of the step's time.
        platform: by default the chip's.
        per_layer: what a layer of each kind keeps; by default it is traced.
        placed: the parameters on the mesh, if they are known.
    """
    platform = platform or platform_of(on)
    placed = placed or weights.on_mesh(declarations_of(recipe), mesh=mesh_lib.abstract(recipe.mesh))
    per_layer = per_layer or kept_by_kind(recipe, shape=shape)
    held = memory.of_step(recipe, placed, shape=shape, platform=platform, per_layer=per_layer)
    transfers = comms.of_step(recipe, placed, shape=shape, platform=platform)
    times = timing.of_step(recipe, placed, transfers, shape=shape, on=on, platform=platform, assumed=assumed)
    return Phase(recipe.model, shape, steps, held, transfers, times)


def estimate(
    recipe: recipe_lib.Recipe,
    *,
    on: machine.Machine,
    price: float = cost.DEFAULT_PRICE,
    tokens: float | None = None,
    assumed: timing.Assumptions | None = None,
) -> Estimate:
    """The plan.

    Args:
        recipe: all settings; its mesh must be for the machine.
        on: the machine.
        price: dollars for a chip hour.
        tokens: to train on; by default those of the recipe's steps, padding included.
        assumed: of the step's time.

    Raises:
        ValueError: the mesh is for another number of devices, or a nonsensical price or number of tokens.
    """
    check(recipe, on=on)
    if not (price >= 0 and math.isfinite(price)):
        raise ValueError(f"--price {price} must be dollars for a chip hour, 0 or more")
    if tokens is not None and not (tokens > 0 and math.isfinite(tokens)):
        raise ValueError(f"--tokens {tokens} must be more than 0")
    assumed = assumed or timing.Assumptions()
    parts = parts_of(recipe).items()
    found = [of_phase(part.of(recipe), shape=part.shape, steps=steps, on=on, assumed=assumed) for part, steps in parts]
    own = sum(phase.steps * phase.shape.places for phase in found)
    seconds = sum(phase.steps * phase.timing.step for phase in found) * ((tokens or own) / own)
    declared = declarations_of(recipe)
    placed = weights.on_mesh(declared, mesh=mesh_lib.abstract(recipe.mesh))
    by_kind: dict[str, int] = {}
    for w in placed:
        if w.declaration.trained:
            by_kind[w.kind] = by_kind.get(w.kind, 0) + w.stored
    return Estimate(
        recipe=recipe,
        on=on,
        parameters=count.parameters(declared, top_k=recipe.model.moe.top_k),
        stored_by_kind=by_kind,
        phases=found,
        assumed=assumed,
        bill=cost.bill(tokens=tokens or own, hours=seconds * on.devices / 3600, chips=on.devices, price=price),
        price=price,
    )
