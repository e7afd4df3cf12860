"""`v4train bench precision`: figures from records, differences, limits, and what is refused."""

import copy
import json

import pytest

from v4train.bench import precision


def records(level, *, rounding=False):
    steps = [
        {"kind": "train", "step": i, "loss": level + (10 if i <= 50 else 0), "step_seconds": 0.1, "skipped": 0}
        | ({"saturated/weights/linear": 0.001 * (i == 7)} if rounding else {})
        for i in range(1, 101)
    ]
    return [{"kind": "eval", "step": 0, "loss/text": 9.0}, *steps, {"kind": "eval", "step": 100, "loss/text": level + 1}]


def test_figures_are_of_the_last_steps_and_the_last_evaluation():
    found = precision.summary(records(2.0, rounding=True))
    assert (found["final_loss"], found["first_loss"], found["held_out"], found["step_seconds"]) == (2.0, 12.0, {"loss/text": 3.0}, 0.1)
    assert found["rounding"] == {"saturated/weights/linear": {"mean": pytest.approx(1e-5), "max": 0.001}}
    assert [step for step, _ in found["curve"]] == [20, 40, 60, 80, 100]


def test_a_finished_run_is_read_and_not_trained_again(tmp_path):
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(2.0)))
    assert precision._run("no such recipe", "fp8", [], steps=100, directory=tmp_path)["final_loss"] == 2.0
    with pytest.raises(ValueError, match="fp8: the run ended with exit code"):
        precision._run("no such recipe", "fp8", [], steps=200, directory=tmp_path)


def test_a_run_without_losses_is_refused():
    with pytest.raises(ValueError, match="no training loss or no held-out loss"):
        precision.summary([])


def test_variants_are_compared_with_bf16_and_held_to_their_limits(monkeypatch, tmp_path):
    levels = {"bf16": 2.0, "fp8": 2.008, "fp8_mxfp4": 2.05, "bf16_other_seed": 1.99}
    asked = {}

    def run(path, name, overrides, *, steps, directory):
        asked[name] = tuple(overrides)
        return copy.deepcopy(precision.summary(records(levels[name])))

    monkeypatch.setattr(precision, "_run", run)
    result = precision.measure(precision.RECIPE, directory=tmp_path, yardstick=True, overrides=["train.log_every=50"])
    assert asked["fp8_mxfp4"] == ("train.log_every=50", "numerics.linear=fp8", "numerics.experts=mxfp4")
    apart = result["relative_to_bf16"]
    assert apart["fp8"] == {"final_loss": 0.004, "held_out": {"loss/text": 0.002667}, "limit": 0.005, "passed": True}
    assert (apart["fp8_mxfp4"]["final_loss"], apart["fp8_mxfp4"]["passed"]) == (0.025, False)
    assert "limit" not in apart["bf16_other_seed"]
    text = precision.table(result)
    assert "+0.40%   0.5%" in text
    assert text.count("passed") == 1
    assert text.count("missed") == 1
