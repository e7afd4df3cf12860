"""The recipe of an import: its model from the files, everything else from a base.

config.json says the architecture and nothing of training. A directory that v4train exported has a recipe.yaml with the rest, and is its own
base; it must describe the model of config.json, or one of the two has been changed by hand and neither can be trusted alone. Other
directories get `--base`, or `DEFAULTS`, which are there to be edited: they name data that a reader makes.
"""

import fnmatch
import json
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from v4train import recipe as recipe_lib
from v4train.config import dump, load
from v4train.interop import released as released_lib
from v4train.interop import released_config
from v4train.model import config as model_config

OWN = "recipe.yaml"
DEFAULTS = """\
data:
  sources: [{name: corpus, path: data/corpus, weight: 1.0}]
  sequence_length: 4096
optimizer:
  schedule: {peak_lr: 2e-5, final_lr: 2e-6, warmup_steps: 50, decay_steps: 450}
train: {steps: 1000, batch_rows: 8, eval_every: 100}
"""
"""Gentle fine-tuning: a low rate, a short warm-up, a decay over the last half."""


def for_import(released: released_lib.Released, *, out: pathlib.Path, base: str | None, overrides: Sequence[str] = ()) -> recipe_lib.Recipe:
    """The recipe that trains on from an import.

    Args:
        released: what is imported.
        out: where the import will be: ``init_from``.
        base: a recipe file whose model is replaced, or None.
        overrides: ``a.b=c`` texts, laid over everything.

    Raises:
        ValueError: the base does not load or does not fit the model, recipe.yaml describes another model than config.json, or an override
            changes what config.json says.
    """
    own = released.directory / OWN
    model = _own_model(own, released) if own.is_file() else released.model
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.absolute().name)
    forced: dict[str, Any] = {"name": f"{name}-tuned", "init_from": str(out), "init_draws": [], "train.run_directory": "runs/{name}"}
    forced["model"] = model.model_dump(mode="json")
    texts = [*(f"{key}={json.dumps(value)}" for key, value in forced.items()), *overrides]
    if base is not None or own.is_file():
        return _of_model(recipe_lib.resolve(base or str(own), overrides=texts).config, model)
    fitting = [f"data.sequence_length={min(4096, model.max_positions)}"]
    if model.image is not None:
        fitting.append(f"data.image_patch={model.image.patch}")
    with tempfile.TemporaryDirectory() as folder:
        defaults = pathlib.Path(folder) / "defaults.yaml"
        defaults.write_text(DEFAULTS, encoding="utf-8")
        return _of_model(recipe_lib.resolve(str(defaults), overrides=[*fitting, *texts]).config, model)


def from_checkpoint(metadata: dict[str, Any], *, subject: str) -> recipe_lib.Recipe:
    """The recipe that a step was written with.

    Raises:
        ValueError: the step has none that this version knows.
    """
    try:
        return recipe_lib.Recipe.model_validate_json(json.dumps(metadata["recipe"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{subject}: its recipe cannot be used by this version of v4train: {error}") from None


def text(recipe: recipe_lib.Recipe) -> str:
    """The content of a recipe.yaml."""
    return f"# resolved recipe, sha256 {dump.digest(recipe)}\n{dump.yaml_text(recipe)}"


def write(directory: pathlib.Path, recipe: recipe_lib.Recipe) -> None:
    """Writes recipe.yaml and recipe.json, as a run does."""
    (directory / OWN).write_text(text(recipe), encoding="utf-8")
    (directory / "recipe.json").write_text(dump.canonical_json(recipe) + "\n", encoding="utf-8")


def _own_model(own: pathlib.Path, released: released_lib.Released) -> model_config.ModelConfig:
    stated = load.load(own, cls=recipe_lib.Recipe).config.model
    if released.model.mtp is None:
        stated = stated.model_copy(update={"mtp": None})
    said = released_config.model_config(released_config.config_json(stated))
    differences = dump.difference(said, released.model)
    if differences:
        theirs, ours = dump.values(released.model), dump.values(said)
        listed = "\n".join(f"  model.{key}: {_at(theirs, key)} in config.json, {_at(ours, key)} in {OWN}" for key in differences)
        raise ValueError(f"{own} describes another model than the config.json beside it:\n{listed}\nCorrect one of them, or remove {OWN}.")
    return stated


def _of_model(recipe: recipe_lib.Recipe, model: model_config.ModelConfig) -> recipe_lib.Recipe:
    """The recipe, whose model an override may have changed only where config.json says nothing: the arrays are those of config.json."""
    changed = [
        key
        for key in dump.difference(recipe.model, model)
        if not any(fnmatch.fnmatchcase(f"{key}.", f"{unsaid}.*") for unsaid in released_config.UNSAID)
    ]
    if changed:
        listed = ", ".join(f"model.{key}" for key in changed)
        raise ValueError(f"--set changes {listed}: an import has the model of its config.json; change it in the recipe that trains on")
    return recipe


def _at(values: Any, key: str) -> str:
    for part in key.split("."):
        values = (values[int(part)] if int(part) < len(values) else None) if isinstance(values, list) else (values or {}).get(part)
    return json.dumps(values)
