"""From a recipe file to a checked, frozen config.

A recipe is YAML (`config.scalars` says what a word means). ``base: other.yaml`` names one parent file, relative to the file that says
so; the child's values are laid over the parent's (`tree.merge`). ``--set a.b=c`` is laid over both: ``c`` is read as YAML, a number in
the path is an index into a list, and a mapping is merged. There is no other mechanism: no includes, no interpolation, no environment
variables, no Python in a recipe; what stands in the files is what runs.

Values are checked in pydantic's strict JSON mode: a quoted number is not a number and ``true`` is not 1. A float without a fraction does
count as an integer, so that a token budget can be written ``100e9``.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import pydantic

from v4train.config import error, explain, tree

ConfigError = error.ConfigError
C = TypeVar("C", bound=pydantic.BaseModel)


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[C]):
    """A checked recipe.

    Attributes:
        config: the values.
        overrides: the ``a.b=c`` texts that were laid over the files.
        sources: dotted path of every value that was given -> ``file:line`` or ``--set a.b=c``. Defaults are not in it.
    """

    config: C
    overrides: tuple[str, ...]
    sources: Mapping[str, str]

    def where(self, path: str) -> str:
        """The place that supplied ``path``, or the part of it that was given; for messages about values that do not fit together."""
        inside = [source for name, source in self.sources.items() if name.startswith(f"{path}.")]
        if path in self.sources or inside:
            return self.sources.get(path) or inside[0]
        parent = path.rpartition(".")[0]
        return self.where(parent) if parent else next(iter(self.sources.values()), "")


def load(path: str | os.PathLike[str], *, cls: type[C], overrides: Sequence[str] = ()) -> Loaded[C]:
    """Loads and checks a recipe.

    Args:
        path: the YAML file.
        cls: what it must fit.
        overrides: ``a.b=c`` texts, laid over the files in this order.

    Raises:
        ConfigError: every problem that was found, each with file, line, path, value and remedy.
    """
    root, problems = _chain(pathlib.Path(path), ())
    for text in overrides:
        try:
            root = _override(root, text, problems)
        except ConfigError as e:
            problems.extend(e.problems)
    try:
        config = cls.model_validate_json(json.dumps(_whole_numbers(root.plain())), strict=True)
    except pydantic.ValidationError as e:
        known = {(problem.where, problem.path) for problem in problems}
        problems.extend(p for p in explain.explain(e, root=root, cls=cls) if (p.where, p.path) not in known)
        raise ConfigError(str(path), problems=_sorted(problems)) from None
    if problems:
        raise ConfigError(str(path), problems=_sorted(problems))
    return Loaded(config, tuple(overrides), {name: leaf.where for name, leaf in root.leaves()})


def _chain(path: pathlib.Path, children: tuple[pathlib.Path, ...], asked_by: str = "") -> tuple[tree.Node, list[error.Problem]]:
    """The file merged over its ancestors."""
    node, problems = tree.read(path, asked_by=asked_by)
    assert isinstance(node.value, dict), "tree.read checks it"
    values = dict(node.value)
    base = values.pop("base", None)
    node = dataclasses.replace(node, value=values)
    if base is None:
        return node, problems
    place = base.key_where
    if not isinstance(base.value, str):
        remedy = "`base` names one file, relative to this one"
        return node, [*problems, error.Problem(place, "base", tree.show(base.plain()), remedy)]
    parent = pathlib.Path(os.path.normpath(path.parent / base.value))
    descent = (*children, path)
    if parent.resolve() in [file.resolve() for file in descent]:
        circle = " -> ".join(str(file) for file in (*descent, parent))
        raise ConfigError(
            str(descent[0]), problems=(error.Problem(place, "base", base.value, f"the files name each other in a circle: {circle}"),)
        )
    below, older = _chain(parent, descent, place)
    return tree.merge(below, node), older + problems


def _override(root: tree.Node, text: str, problems: list[error.Problem]) -> tree.Node:
    name = f"--set {text}"
    key, separator, value = text.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(name, problems=(error.Problem(name, "", "", "expected the form path.to.key=value"),))
    leaf, more = tree.parse(value, name=name) if value.strip() else (tree.Node(None, name), [])
    problems.extend(more)
    try:
        return tree.assign(root, path, leaf)
    except ValueError as e:
        raise ConfigError(name, problems=(error.Problem(name, key.strip(), "", str(e)),)) from None


def _whole_numbers(value: tree.Plain) -> tree.Plain:
    """Floats without a fraction as integers: a float field takes either, an integer field then takes ``1e9``."""
    if isinstance(value, dict):
        return {key: _whole_numbers(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _sorted(problems: list[error.Problem]) -> tuple[error.Problem, ...]:
    """File by file in the order of the lines, overrides last."""

    def place(problem: error.Problem) -> tuple[bool, str, int]:
        line = re.match(r"(.*?):(\d+)", problem.where)
        override = problem.where.startswith("--set")
        return (override, "", 0) if override or line is None else (False, line[1], int(line[2]))

    return tuple(sorted(problems, key=place))
