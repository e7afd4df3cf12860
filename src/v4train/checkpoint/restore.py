"""Finds the newest good step and reads it onto the caller's mesh.

A step that is damaged is skipped, and the caller is told which and why: it lost some hours, and should know. A step that is in order
but belongs to another recipe is not skipped but refused: to resume from an even older one would be no remedy. Nothing is converted,
filled in or dropped on the way; whatever differs between the checkpoint and the template is one error that lists it.
"""

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax

from v4train.checkpoint import arrays, hosts, integrity, step_directory

_log = logging.getLogger(__name__)

# More lines than this do not help to see what kind of difference it is.
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Description:
    """A good step, without its arrays.

    Attributes:
        step: training steps done.
        metadata: as it was saved.
        table: name -> shape and dtype of every array.
        skipped: newer steps that were passed over, newest first, with the reason.
    """

    step: int
    metadata: dict
    table: arrays.Table
    skipped: list[tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A step that was read. ``state`` has the structure and shardings of the template; the rest is as in `Description`."""

    state: Any
    metadata: dict
    step: int
    skipped: list[tuple[int, str]]


def restore(
    directory: str | os.PathLike[str],
    *,
    template: Any,
    step: int | None = None,
    subtree: str | None = None,
    verify: bool = True,
) -> Restored:
    """Reads the newest good step, or the given one.

    Args:
        directory: of the checkpoints.
        template: pytree of `jax.ShapeDtypeStruct` with shardings: any mesh, not necessarily the one of the save.
        step: this one and no other.
        subtree: read only the arrays below this name (``params``, to generate without the optimizer); ``template`` is that part.
        verify: compare digests; otherwise sizes, and digests of small files only.

    Raises:
        ValueError: there is no good step, the given one is damaged, or the arrays are not those of the template.
    """
    description = describe(directory, step=step, verify=verify)
    wanted = arrays.flatten(template if subtree is None else {subtree: template})
    for name, struct in wanted.items():
        assert struct.sharding is not None, f"the template says no sharding for {name}"
    where = step_directory.path(pathlib.Path(directory).absolute(), step=description.step)
    _check_arrays(description.table, arrays.describe(wanted), where=where, subtree=subtree)
    named = arrays.read(where / step_directory.ARRAYS, wanted=wanted)
    state = jax.tree.unflatten(jax.tree.structure(template), list(named.values()))
    return Restored(state=state, metadata=description.metadata, step=description.step, skipped=description.skipped)


def describe(directory: str | os.PathLike[str], *, step: int | None = None, verify: bool = True) -> Description:
    """Finds the newest good step, or checks the given one, and reads everything but its arrays (see `restore`)."""
    directory = pathlib.Path(directory).absolute()
    steps = hosts.from_first(step_directory.list_steps(directory))
    if step is not None and step not in steps:
        raise ValueError(f"{directory} has no finished step {step}; it has {_enumerate(steps)}.")
    found, skipped = find_good(directory, steps=steps if step is None else [step], verify=verify)
    if found is None:
        if not skipped:
            raise ValueError(f"{directory} has no finished step to restore.")
        listed = "\n".join(f"  step {candidate}: {damage}" for candidate, damage in skipped)
        remedy = "Bring back a copy, or start a new run in another directory." if step is None else f"There are steps {_enumerate(steps)}."
        raise ValueError(f"{directory} has no good step to restore; damaged:\n{listed}\n{remedy}")
    content = json.loads((step_directory.path(directory, step=found) / step_directory.METADATA).read_bytes())
    return Description(step=found, metadata=content["metadata"], table=content["arrays"], skipped=skipped)


def find_good(directory: pathlib.Path, *, steps: list[int], verify: bool) -> tuple[int | None, list[tuple[int, str]]]:
    """The newest of some finished steps that has no damage, or None; and the newer ones, with what is wrong with them."""
    skipped = []
    for step in reversed(steps):
        damage = _damage(step_directory.path(directory, step=step), verify=verify)
        if damage is None:
            return step, skipped
        _log.warning("the checkpoint of step %d is damaged and not used: %s", step, damage)
        skipped.append((step, damage))
    return None, skipped


def check_recipe(saved: dict, current: dict, *, ignore: tuple[str, ...] = ()) -> None:
    """Checks that a run may go on from a checkpoint of another run of the same recipe.

    Args:
        saved: the recipe in the checkpoint.
        current: the recipe of this run.
        ignore: dotted keys that may differ, with everything below them: ``("checkpoint", "train.steps")``.

    Raises:
        ValueError: they differ; the message lists every dotted key with both values.
    """
    old, new = _dotted(saved), _dotted(current)
    differences = [
        f"  {key}: {_show(old, key)} in the checkpoint, {_show(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if _show(old, key) != _show(new, key) and not any(f"{key}.".startswith(f"{prefix}.") for prefix in ignore)
    ]
    if differences:
        listed = "\n".join(differences)
        raise ValueError(
            f"the checkpoint is of another recipe; {len(differences)} values differ:\n{listed}\n"
            "Set these values as they were, or start a new run in another directory."
        )


def _damage(where: pathlib.Path, *, verify: bool) -> str | None:
    """What is wrong with a step, in the words of the first host that finds something; the hosts share the files."""
    findings = integrity.find_damage(where, digests=verify, share=(jax.process_index(), jax.process_count()))
    more = f" and {len(findings) - 3} more files" if len(findings) > 3 else ""
    return hosts.first_reason("; ".join(str(finding) for finding in findings[:3]) + more if findings else None)


def _check_arrays(saved: arrays.Table, wanted: arrays.Table, *, where: pathlib.Path, subtree: str | None) -> None:
    if subtree is not None:
        saved = {name: row for name, row in saved.items() if f"{name}/".startswith(f"{subtree}/")}
    differences = [
        f"  {name}: {_form(saved.get(name))} in the checkpoint, {_form(wanted.get(name))} in this run"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        listed = "\n".join(differences[:_LISTED])
        more = f"\n  and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
        raise ValueError(
            f"{where} does not hold the arrays of this run; {len(differences)} differ:\n{listed}{more}\n"
            f"Use the recipe it was written with (in its {step_directory.METADATA}), or start a new run in another directory."
        )


def _form(row: dict | None) -> str:
    return "absent" if row is None else f"{row['dtype']}[{','.join(str(size) for size in row['shape'])}]"


def _dotted(value: object, prefix: str = "") -> dict[str, object]:
    """``{"a": {"b": [1]}}`` -> ``{"a.b.0": 1}``; empty containers are values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    flat = {}
    for key, item in items:
        flat |= _dotted(item, f"{prefix}.{key}" if prefix else str(key))
    return flat or {prefix: value}


def _show(flat: dict[str, object], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _enumerate(steps: list[int]) -> str:
    return ", ".join(str(step) for step in steps) or "none"
