"""Open weights as a starting point: train, export, import, train on. The loss goes on from where the imported model was."""

import math
import pathlib

import pytest
import yaml

from tests.train import tiny
from v4train.cli import main
from v4train.train.hooks import record

pytestmark = pytest.mark.slow  # two training runs, each of which compiles
TEXT = pathlib.Path(__file__).parents[2] / "data" / "demo" / "text"
STEPS = 50


def write(path: pathlib.Path, run: pathlib.Path, **changes) -> str:
    """Text only: a small model on the demo's prose."""
    data = {"sequence_length": 64, "holdout": 0.1, "sources": [{"name": "text", "path": str(TEXT), "weight": 1.0}]}
    values = tiny.values(TEXT.parent, run)
    values["data"] = data
    values["model"] |= {"image": None, "audio": None, "media_tokens": []}
    values["train"] |= {"steps": STEPS, "batch_rows": 16, "eval_every": STEPS, "eval_batches": 2}
    values["optimizer"] = {"schedule": {"peak_lr": 4e-3, "final_lr": 1e-3, "warmup_steps": 5, "decay_steps": 10}}
    values["checkpoint"] = {"every_steps": None}
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return str(path)


def losses(run: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in record.read(run / "metrics.jsonl") if r["kind"] == "train"}


def heldout(run: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss/text"] for r in record.read(run / "metrics.jsonl") if r["kind"] == "eval"}


def test_fine_tuning_goes_on_from_the_imported_model(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main.main(["train", write(tmp_path / "first.yaml", first)]) == 0
    assert main.main(["convert", "export", str(first), str(tmp_path / "open"), "--format", "fp32"]) == 0
    assert main.main(["convert", "import", str(tmp_path / "open"), str(tmp_path / "in")]) == 0
    words = ["--set", f"train.run_directory={second}", "--set", "seed=1"]
    assert main.main(["train", str(tmp_path / "in/recipe.yaml"), *words]) == 0

    before, after = heldout(first), heldout(second)
    scratch = math.log(tiny.VOCAB)
    assert before[0] == pytest.approx(scratch, abs=0.1)
    assert after[0] == pytest.approx(before[STEPS], abs=1e-4)  # the same model on the same held-out text
    # The objective of a step has the MTP block's loss in it, so it is compared with the first run's, not with ln V.
    assert losses(second)[1] == pytest.approx(losses(first)[STEPS], abs=0.4)
    assert losses(second)[1] < losses(first)[1] - 1.0
    assert losses(second)[STEPS] < losses(second)[1]
    assert after[STEPS] < after[0] - 0.1
    assert len(losses(second)) == STEPS
