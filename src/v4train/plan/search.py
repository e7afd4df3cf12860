"""Other settings of the same recipe: which meshes a machine could have, ranked, and the smallest change after which a recipe fits.

Every way to write the number of devices as a product of the five axes is tried; what the recipe's own checks refuse is left out (a mesh
whose shards do not divide the batch, more expert shards than experts). A mesh may have another number of microbatches: the fewest with
which it fits, because each microbatch gathers all weights once more. Meshes that fit come first, the fastest step first; then those that
do not, the one that lacks least first.

What a layer keeps is scaled with the tokens of a device instead of traced for every mesh.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from v4train import recipe as recipe_lib
from v4train.plan import activations, comms, estimate, low_precision, machine, memory, timing, weights
from v4train.sharding import mesh as mesh_lib

CHANGES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("model.remat", ("dots", "full")),
    ("model.loss_chunk", (512, 128)),
    ("model.moe.exchange.capacity", (2.0, 1.25)),
    ("model.moe.exchange.waves", (2, 4, 8)),
    ("optimizer.muon.ns_dtype", ("bfloat16",)),
)
"""Settings that trade time for memory; to these come more microbatches."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that make a recipe fit.

    Attributes:
        settings: ``train.microbatches=48`` and so on, as for --set.
        total: bytes on a device with them.
        step: seconds of a step with them.
        devices: of the machine; more than there are if nothing else helps.
    """

    settings: tuple[str, ...]
    total: float
    step: float
    devices: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what a step on it takes.

    Attributes:
        recipe: with this mesh and its microbatches.
        phase: the one with most tokens.
        total: bytes on a device in the phase that needs most, which may be another one.
        fits: in a device's memory.
    """

    recipe: recipe_lib.Recipe
    phase: estimate.Phase
    total: float
    fits: bool


def changed(recipe: recipe_lib.Recipe, settings: Mapping[str, Any]) -> recipe_lib.Recipe | None:
    """The recipe with other values at these paths, or None if they do not fit together."""
    values = recipe.model_dump(mode="json")
    for path, value in settings.items():
        *parents, last = path.split(".")
        at = values
        for name in parents:
            at = at[name]
        if at is None:
            return None
        at[last] = value
    try:
        found = recipe_lib.Recipe.model_validate(values)
    except ValueError:
        return None
    return None if any(check(found) for check in recipe_lib.CHECKS) else found


class _Scaled:
    """Phases of changed recipes, with what layers keep scaled from the original's."""

    def __init__(self, recipe: recipe_lib.Recipe, on: machine.Machine, assumed: timing.Assumptions):
        self.on, self.assumed = on, assumed
        self.platform = estimate.platform_of(on)
        self.parts = estimate.parts_of(recipe)
        self.shapes = {part.shape for part in self.parts}
        self.main = max(self.parts, key=lambda part: self.parts[part] * part.shape.places)
        self.recipe = recipe
        self._known: dict[tuple[str, estimate.Part], tuple[int, dict[str, activations.Kept]]] = {}
        self._placed: dict[tuple[int, ...], list[weights.Weight]] = {}

    def kept(self, recipe: recipe_lib.Recipe, part: estimate.Part) -> dict[str, activations.Kept]:
        """What a layer of each kind keeps."""
        key, shape = (recipe.model.remat, part), part.shape
        if key not in self._known:
            base = changed(self.recipe, {"model.remat": recipe.model.remat}) or self.recipe
            self._known[key] = memory.place_of(base, shape).count, estimate.kept_by_kind(part.of(base), shape=shape)
        tokens, kept = self._known[key]
        factor = memory.place_of(recipe, shape).count / tokens
        return {kind: activations.Kept(round(one.saved * factor), round(one.inside * factor)) for kind, one in kept.items()}

    def placed(self, recipe: recipe_lib.Recipe) -> list[weights.Weight]:
        """The parameters on a mesh."""
        sizes = tuple(recipe.mesh.sizes.values())
        if sizes not in self._placed:
            declared = estimate.declarations_of(recipe)
            self._placed = {sizes: weights.on_mesh(declared, mesh=mesh_lib.abstract(recipe.mesh))}
        return self._placed[sizes]

    def total(self, recipe: recipe_lib.Recipe) -> float:
        """Bytes on a device in the phase that needs most."""
        placed = self.placed(recipe)
        return max(
            memory.of_step(part.of(recipe), placed, shape=part.shape, platform=self.platform, per_layer=self.kept(recipe, part)).total
            for part in self.parts
        )

    def phase(self, recipe: recipe_lib.Recipe, *, on: machine.Machine | None = None) -> estimate.Phase:
        """The phase with most tokens."""
        part, steps, placed, kept = self.main, self.parts[self.main], self.placed(recipe), self.kept(recipe, self.main)
        return estimate.of_phase(
            part.of(recipe), shape=part.shape, steps=steps, on=on or self.on, assumed=self.assumed, per_layer=kept, placed=placed
        )

    def step(self, recipe: recipe_lib.Recipe, *, on: machine.Machine | None = None) -> float:
        """Seconds of a step in that phase."""
        return self.phase(recipe, on=on).timing.step


def meshes(devices: int, *, slices: int) -> Iterator[dict[str, int]]:
    """All ways to divide devices among the mesh axes; copies at least for every slice."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(comms.AXES) - 1):
        replica, expert, context, tensor = sizes
        rest, left = divmod(devices, replica * expert * context * tensor)
        if not left and rest and replica % slices == 0:
            yield {"replica": replica, "fsdp": rest, "expert": expert, "context": context, "tensor": tensor}


def ranked(recipe: recipe_lib.Recipe, *, on: machine.Machine, assumed: timing.Assumptions | None = None, top: int = 10) -> list[Candidate]:
    """The best meshes for a machine.

    Args:
        recipe: all settings; its mesh need not be for the machine.
        on: the machine.
        assumed: of a step's time.
        top: how many.

    Raises:
        ValueError: no mesh of so many devices suits the recipe, or the machine does not suit its formats.
    """
    low_precision.check(recipe, on=on, platform=estimate.platform_of(on))
    assumed = assumed or timing.Assumptions()
    scaled = _Scaled(recipe, on, assumed)
    found: list[tuple[bool, float, recipe_lib.Recipe]] = []
    for sizes in meshes(on.devices, slices=on.slices):
        best = _with_microbatches(recipe, sizes, scaled=scaled)
        if best is not None:
            fits, one = best
            found.append((not fits, scaled.step(one) if fits else scaled.total(one), one))
    if not found:
        raise ValueError(
            f"no mesh of {on.devices:,} devices suits the recipe: its {recipe.train.batch_rows:,} rows, {recipe.model.moe.experts} experts "
            f"and {recipe.model.attention.output_groups} output groups must divide among the axes; choose another number of chips or "
            "train.batch_rows"
        )
    found.sort(key=lambda one: one[:2])
    return [Candidate(one, scaled.phase(one), scaled.total(one), not too_large) for too_large, _, one in found[:top]]


def _with_microbatches(recipe: recipe_lib.Recipe, sizes: dict[str, int], *, scaled: _Scaled) -> tuple[bool, recipe_lib.Recipe] | None:
    """The mesh with the fewest microbatches that fit; with the most, and False, if none do; None if the mesh does not suit the recipe."""
    shards = sizes["replica"] * sizes["fsdp"] * sizes["expert"]
    if recipe.model.moe.experts % sizes["expert"] or any(shape.rows % shards for shape in scaled.shapes):
        return None
    most = math.gcd(*(shape.rows // shards for shape in scaled.shapes))
    counts = [n for n in range(1, most + 1) if most % n == 0]

    def split(n: int) -> recipe_lib.Recipe:
        train = recipe.train.model_copy(update={"microbatches": n})
        mesh = recipe.mesh.model_copy(update={**sizes, "emulate_devices": None})
        return recipe.model_copy(update={"mesh": mesh, "train": train})

    if any(check(split(1)) for check in recipe_lib.CHECKS):
        return None
    place = bisect.bisect_left(counts, True, key=lambda n: scaled.total(split(n)) <= scaled.on.usable_bytes)
    return (True, split(counts[place])) if place < len(counts) else (False, split(counts[-1]))


def smallest_change(recipe: recipe_lib.Recipe, *, on: machine.Machine, assumed: timing.Assumptions | None = None) -> Change | None:
    """The fewest other settings with which a recipe fits, of these the fastest; None if neither settings, mesh nor 64 times the chips help.

    One setting is tried, then two, then another mesh (with its microbatches), then more chips.
    """
    scaled = _Scaled(recipe, on, assumed or timing.Assumptions())
    now = recipe.model_dump(mode="json")
    single = [{path: value} for path, values in CHANGES for value in values if _value(now, path) != value]
    single += [{"train.microbatches": recipe.train.microbatches * factor} for factor in (2, 3, 4, 6, 8, 12, 16)]
    pairs = [a | b for a, b in itertools.combinations(single, 2) if not set(a) & set(b)]
    for group in (single, pairs):
        found = [one for settings in group if (one := _fitting(recipe, settings, scaled))]
        if found:
            return min(found, key=lambda one: one.step)
    best = next((one for one in ranked(recipe, on=on, assumed=assumed, top=3) if one.fits), None)
    if best is not None:
        sizes = [f"mesh.{name}={size}" for name, size in best.recipe.mesh.sizes.items() if size != recipe.mesh.sizes[name]]
        more = (
            [f"train.microbatches={best.recipe.train.microbatches}"] if best.recipe.train.microbatches != recipe.train.microbatches else []
        )
        return Change((*sizes, *more), best.phase.memory.total, best.phase.timing.step, on.devices)
    for factor in (2, 4, 8, 16, 32, 64):
        larger = dataclasses.replace(on, devices=on.devices * factor)
        for axis in ("fsdp", "expert", "context"):
            one = changed(recipe, {f"mesh.{axis}": recipe.mesh.sizes[axis] * factor})
            if one and (total := scaled.total(one)) <= on.usable_bytes:
                return Change((f"mesh.{axis}={one.mesh.sizes[axis]}",), total, scaled.step(one, on=larger), larger.devices)
    return None


def _fitting(recipe: recipe_lib.Recipe, settings: dict[str, Any], scaled: _Scaled) -> Change | None:
    one = changed(recipe, settings)
    if one is None:
        return None
    total = scaled.total(one)
    if total > scaled.on.usable_bytes:
        return None
    return Change(tuple(f"{path}={value}" for path, value in settings.items()), total, scaled.step(one), recipe.mesh.devices)


def _value(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values
