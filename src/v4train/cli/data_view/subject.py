"""RUN_OR_RECIPE: a run directory stands for its resolved recipe at its current step, a recipe file for itself at step 0."""

import dataclasses
import pathlib

from v4train import recipe as recipe_lib
from v4train.checkpoint import step_directory
from v4train.train import run as run_lib
from v4train.train.hooks import record

RECIPE = "recipe.yaml"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a command was asked to show.

    Attributes:
        name: of the run or recipe.
        recipe: resolved.
        step: the batch that is shown unless the user names another.
        origin: what was read, in words.
    """

    name: str
    recipe: recipe_lib.Recipe
    step: int
    origin: str


def find(path: pathlib.Path, *, overrides: list[str]) -> Subject:
    """Reads a run directory or a recipe file.

    Raises:
        ValueError: neither, a recipe with mistakes, or overrides for a run.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory (from {pathlib.Path.cwd()}); give a recipe (YAML) or a run directory")
    if not path.is_dir():
        recipe = recipe_lib.resolve(str(path), overrides=overrides).config
        return Subject(recipe.name, recipe, 0, f"recipe {path}")
    if not (path / RECIPE).is_file():
        raise ValueError(f"{path}: not a run directory, it has no {RECIPE}; give a recipe (YAML) or the directory that training wrote")
    if overrides:
        raise ValueError(f"--set: {path} is a run, whose recipe is what it is; give a recipe file to try other values")
    recipe = recipe_lib.resolve(str(path / RECIPE)).config
    done = _steps_done(path)
    shown = max(0, min(done, recipe.train.steps - 1))
    return Subject(recipe.name, recipe, shown, f"run {path}, {done:,} of {recipe.train.steps:,} steps done")


def _steps_done(directory: pathlib.Path) -> int:
    """By the newest line of the metrics or the newest checkpoint, whichever is later."""
    logged = [line["step"] for line in record.read(directory / run_lib.METRICS) if isinstance(line.get("step"), int)]
    return max([0, *logged[-1:], *step_directory.list_steps(directory / "checkpoints")])
