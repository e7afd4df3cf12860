"""A run directory whose only step holds random numbers: what conversions read, without training."""

import pathlib

import numpy as np

from v4train import recipe as recipe_lib
from v4train.checkpoint import streaming
from v4train.config import dump
from v4train.interop import importing

STEP = 7


def recipe(path: str = "configs/tiny.yaml", *overrides: str) -> recipe_lib.Recipe:
    """A shipped recipe: every kind of layer, stems, MTP, hash routing."""
    return recipe_lib.resolve(str(pathlib.Path(__file__).parents[2] / path), overrides=overrides).config


def values(model, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Every array of a state without an optimizer; weights are of ordinary magnitude."""
    rng = np.random.default_rng(seed)

    def draw(row) -> np.ndarray:
        if row["dtype"] == "int32":
            return rng.integers(0, model.moe.experts, row["shape"], np.int32)
        return rng.standard_normal(row["shape"], np.float32) * np.float32(0.05)

    return {name: draw(row) for name, row in importing.state_table(model).items()}


def write(run: pathlib.Path, made: recipe_lib.Recipe, arrays: dict[str, np.ndarray], **more) -> pathlib.Path:
    """A run directory with one step, which says ``more`` of itself; returns the step's directory."""
    metadata = {"recipe": dump.values(made), "data": "", "seed": made.seed, **more}
    with streaming.new_step(run / "checkpoints", step=STEP, table=importing.state_table(made.model), values=metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, (), array)
    return run / "checkpoints" / f"step_{STEP:08d}"


def read(step: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a step, counters left out: they are not the weights'."""
    reader = streaming.Reader(step)
    return {name: reader.read(name) for name in reader.table if name not in ("step", "skipped")}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    expected = {name: value for name, value in expected.items() if name not in ("step", "skipped")}
    assert found.keys() == expected.keys()
    assert [name for name in found if (found[name].dtype, found[name].tobytes()) != (expected[name].dtype, expected[name].tobytes())] == []
