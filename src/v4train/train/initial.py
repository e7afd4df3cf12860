"""The first state of a run that does not begin from nothing: the weights of another run, or of an import.

Parameters, router biases and hash tables are what a model *is*, and are taken. The optimizer's moments belong to the data and the schedule
of the other run, and start at zero, as do the steps.

Names, shapes and types must be the same; what differs is one error that lists it. A stem that the source lacks can be drawn, but only when
the recipe names it (`init_draws`): a misspelt source must not become a model that is half noise. Settings that shape no parameter
(rotation, window, what an indexer selects) may differ, since to change them is often the purpose; they are told, since it may be a mistake.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from v4train.checkpoint import arrays, restore, step_directory
from v4train.config import dump
from v4train.core import param
from v4train.train import build
from v4train.train import state as state_lib

_LISTED = 50

_ONLY_SPEED = ("remat", "attention.chunk", "loss_chunk")
"""Settings of the model that change no result."""


@dataclasses.dataclass(frozen=True)
class Initial:
    """``state`` before the first step, and ``told``: what the user should know about it, in lines."""

    state: state_lib.State
    told: str


def load(parts: build.Parts, *, source: str, draws: tuple[str, ...] = ()) -> Initial:
    """Reads the first state from another run or an import, straight into its shards.

    Args:
        parts: of the run that begins.
        source: run directory, checkpoints directory, or one step.
        draws: paths of parameters that the source lacks and that are drawn from the seed.

    Raises:
        ValueError: there is no good step, or it holds other parameters than this recipe's model.
    """
    try:
        directory, step = step_directory.locate(pathlib.Path(source))
        found = restore.describe(directory, step=step, verify=parts.recipe.checkpoint.verify)
    except ValueError as e:
        raise ValueError(f"init_from: {e}") from None
    wanted = arrays.flatten({"params": parts.state.params, "buffers": parts.state.buffers})
    drawn = _compare(found.table, wanted, draws=draws, source=source)
    where = step_directory.path(directory, step=found.step) / step_directory.ARRAYS
    # Its digests were compared when it was described.
    named = arrays.read(where, wanted={name: struct for name, struct in wanted.items() if name not in drawn})
    named |= _draw(parts, drawn, wanted)
    structure = jax.tree.structure({"params": parts.state.params, "buffers": parts.state.buffers})
    loaded = jax.tree.unflatten(structure, [named[name] for name in wanted])
    state = state_lib.begin(loaded["params"], loaded["buffers"], optimizer=parts.optimizer, placed=parts.state)
    return Initial(state, "\n".join(_told(found, parts, source=source, drawn=drawn)))


def check_is_run(metadata: dict[str, Any], directory: pathlib.Path) -> None:
    """Checks that the step in a run directory was made by training.

    Raises:
        ValueError: it was imported, and has no optimizer to resume with.
    """
    if "imported" in metadata:
        raise ValueError(
            f"train.run_directory: {directory} is an import, which has no training state to resume; "
            f"train in another directory with init_from: {directory}"
        )


def _compare(saved: arrays.Table, wanted: dict[str, jax.ShapeDtypeStruct], *, draws: tuple[str, ...], source: str) -> list[str]:
    """The names to draw; everything else must agree."""
    saved = {name: row for name, row in saved.items() if name.split("/")[0] in ("params", "buffers")}
    described = arrays.describe(wanted)
    drawn = [name for name in described if name not in saved and any(f"{name}/".startswith(f"params/{path.strip('/')}/") for path in draws)]
    problems = [
        f"  init_draws: {path} names nothing that the source lacks; remove it"
        for path in draws
        if not any(f"{name}/".startswith(f"params/{path.strip('/')}/") for name in drawn)
    ]
    different = [name for name in sorted(saved.keys() | described.keys()) if saved.get(name) != described.get(name) and name not in drawn]
    problems += [
        f"  {name}: {_form(saved.get(name))} in the source, {_form(described.get(name))} in this recipe's model" for name in different
    ]
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "\n".join(problems[:_LISTED])
        lacking = sorted(
            {"/".join(name.split("/")[1:3]) for name in different if name not in saved and name.startswith("params/embedding/")}
        )
        draw = f", or have the new ones drawn: init_draws: [{', '.join(lacking)}]" if lacking else ""
        raise ValueError(
            f"init_from: {source} holds other parameters than this recipe's model; {len(problems)} differ:\n{listed}{more}\n"
            f"Take the model section of its recipe.yaml{draw}."
        )
    return drawn


def _form(row: dict[str, Any] | None) -> str:
    return "absent" if row is None else f"{row['dtype']}[{','.join(str(size) for size in row['shape'])}]"


def _draw(parts: build.Parts, names: list[str], wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    by_path = param.flatten(parts.declarations)
    declared = {name: by_path[name.removeprefix("params/")] for name in names}
    # Without the first part of the name, so that the values are those of a run that draws everything.
    inner = _nest({name.removeprefix("params/"): declaration for name, declaration in declared.items()})
    shardings = _nest({name.removeprefix("params/"): wanted[name].sharding for name in names})
    drawn = param.initialise(inner, parts.recipe.seed, shardings=shardings)
    return {f"params/{name}": leaf for name, leaf in arrays.flatten(drawn).items()}


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return nested


def _told(found: restore.Description, parts: build.Parts, *, source: str, drawn: list[str]) -> list[str]:
    lines = [f"began with the parameters of step {found.step} of {source}"]
    lines += [f"  the checkpoint of step {step} there is damaged and not used: {damage}" for step, damage in found.skipped]
    if drawn:
        lines.append(f"  drawn from the seed: {', '.join(name.removeprefix('params/') for name in drawn)}")
    theirs, ours = found.metadata.get("recipe", {}), dump.values(parts.recipe)
    for path, before, now in _different(theirs.get("model", {}), ours["model"], "model"):
        if not any(f"{path}.".startswith(f"model.{key}.") for key in _ONLY_SPEED):
            lines.append(f"  {path}: {json.dumps(before)} there, {json.dumps(now)} here")
    return lines


def _different(before: Any, now: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [row for key in keys for row in _different(before.get(key), now.get(key), f"{path}.{key}")]
    return [] if before == now else [(path, before, now)]
