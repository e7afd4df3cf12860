"""Reads a golden case into our parameters: config, arrays, and which reference gradient each of our gradients belongs to."""

import json
import math
import pathlib

import jax
import numpy as np

from v4train.core import param
from v4train.interop import names, released, released_config
from v4train.model import config as config_lib

FOLDER = pathlib.Path(__file__).parent.parent / "golden"


def config(name: str, **changes) -> config_lib.ModelConfig:
    """Our config of a golden case. The files have no MTP block; fields that config.json does not say are small."""
    said = released_config.model_config(json.loads((FOLDER / name / "config.json").read_text())).model_dump()
    said["attention"]["chunk"] = 32
    return config_lib.ModelConfig.model_validate({**said, "mtp": None, **changes})


def parameters(name: str, model: config_lib.ModelConfig) -> dict:
    """Our parameters with the golden case's values; ``model`` may fold the layers in another way than config.json."""
    case = released.Released.open(FOLDER / name)
    assert model.layer_kinds == case.model.layer_kinds
    return jax.tree.map(np.asarray, case.parameters())


def gradient_norms(gradients: dict, model: config_lib.ModelConfig) -> dict[str, float]:
    """L2 norms under the reference's names. The indexer's gradients, which the reference does not have, are left out."""
    leaves = jax.tree_util.tree_flatten_with_path(gradients)[0]
    flat = {param.path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    squares: dict[str, float] = {}
    for slot in names.slots(model):
        if slot.path in flat and slot.spelled and "/indexer/" not in slot.path:
            squares[slot.spelled] = squares.get(slot.spelled, 0.0) + float(np.sum(flat[slot.path][slot.index] ** 2))
    return {name: math.sqrt(square) for name, square in squares.items()}
