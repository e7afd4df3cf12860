"""`v4train bench efficiency`: the arms are comparable, costs agree with counts by hand, shares of compute with lines known in advance."""

import dataclasses
import json
import math
import pathlib

import pytest

from v4train import recipe as recipe_lib
from v4train.bench.efficiency import analysis, arms, cost, curves, report, training
from v4train.cli import main
from v4train.model import flops

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipes():
    return {arm: recipe_lib.resolve(str(ROOT / arms.Run(arm, arms.STEPS, 0).recipe)).config for arm in arms.ARMS}


@pytest.fixture(scope="module")
def costs(recipes):
    return {arm: cost.of(recipe) for arm, recipe in recipes.items()}


def test_all_arms_have_the_same_active_parameters_and_see_the_same_tokens(recipes, costs):
    for arm, recipe in recipes.items():
        assert costs[arm].active == pytest.approx(costs["v4"].active, rel=0.01), arm
        assert recipe.data == recipes["v4"].data
        assert recipe.train.model_copy(update={"run_directory": ""}) == recipes["v4"].train.model_copy(update={"run_directory": ""})
        assert recipe.optimizer.weight_decay == recipes["v4"].optimizer.weight_decay


def test_the_baseline_lacks_every_ingredient_and_each_other_arm_one(recipes):
    base, whole = recipes["baseline"], recipes["v4"]

    def lacks(recipe) -> set[str]:
        model = recipe.model
        found = {"no_muon"} if recipe.optimizer.muon is None else set()
        found |= {"no_mhc"} if model.hyper.kind == "residual" else set()
        dense = set(model.layer_kinds) == {"window"} and model.attention.window >= recipe.data.sequence_length
        assert model.attention.rope_dim == (model.attention.head_dim if dense else 8)
        found |= {"no_sparse_attention"} if dense else set()
        classic = (model.moe.affinity, model.moe.hash_layers, model.moe.bias_speed) == ("sigmoid", 0, 0) and model.moe.balance_loss >= 1e-3
        found |= {"no_routing"} if classic else set()
        return found | ({"no_mtp"} if model.mtp is None else set())

    assert lacks(whole) == set()
    assert lacks(base) == set(arms.LEFT_OUT)
    for arm in arms.LEFT_OUT:
        assert lacks(recipes[arm]) == {arm}


def test_no_text_is_seen_twice(recipes):
    recipe = recipes["v4"]
    tokens = json.loads((ROOT / recipe.data.sources[0].path / "manifest.json").read_text())["tokens"]["text"]
    assert arms.STEPS * recipe.tokens_per_step < (1 - recipe.data.holdout) * tokens


def test_the_cost_is_that_of_the_model_the_optimizer_and_the_streams(recipes, costs):
    recipe, found = recipes["v4"], costs["v4"]
    once = flops.training(recipe.model, length=256)
    assert found.layers + found.attention + found.mtp == pytest.approx(once.total)
    assert found.total == pytest.approx(once.total + found.mixing + found.newton_schulz + found.elementwise)
    assert costs["baseline"].mixing == costs["no_mhc"].mixing == costs["baseline"].newton_schulz == costs["no_muon"].newton_schulz == 0
    assert costs["baseline"].mtp == 0
    routed = 10 * (4 * 32 * 32 * 64 + 2 * 32**3)  # Newton-Schulz of one expert's matrix
    matrices = 5 * 16 * 3 * routed / 4096
    assert matrices < found.newton_schulz < 2 * matrices


def test_mixing_counts_every_operation_on_the_streams(recipes):
    """One site on numbers, counting as it goes: 4 streams of 64."""
    n, d = 4, 64
    site = n * d + n * d  # squares and their sum
    site += 3 * 24  # norm, scale and base of 24 coefficients
    site += 8 * 4  # sigmoids
    site += 4 * 16 + 39 * (16 + 4 + 16)  # softmax with eps; then columns, and 19 times rows and columns: sums, eps, quotients
    site += 2 * n * d + 2 * n * n * d + 2 * n * d  # gated sum; streams and output written back
    head = 2 * n * d + 2 * n * d + 7 * n
    assert cost.mixing(recipes["v4"].model) == 2 * 5 * site + 2 * head
    assert cost.mixing(recipes["no_mtp"].model) == 2 * 4 * site + head


def test_a_crossing_lies_on_the_line_in_the_logarithm_of_the_tokens():
    points = [(share, 3.0 - 0.4 * math.log(share)) for share in (1.0, 0.5, 0.8)]
    found = analysis.crossing(points, goal=3.0 - 0.4 * math.log(0.6))
    assert (found.tokens, found.bound) == (pytest.approx(0.6), "")
    assert analysis.slope(points) == pytest.approx(-0.4)
    assert analysis.moved(found, above=0.1, per_log=-0.4).tokens == pytest.approx(0.6 * math.exp(0.25))


def test_nothing_is_extrapolated():
    points = [(0.5, 3.2), (1.0, 3.0)]
    assert analysis.crossing(points, goal=3.3) == analysis.Share(0.5, "at most")
    assert analysis.crossing(points, goal=2.9) == analysis.Share(1.0, "more than")


def results(**losses: float) -> list[training.Result]:
    """Of two seeds that differ by 0.02: V4 on a line, the others at these losses."""
    every = {("v4", steps): 3.0 - 0.4 * math.log(steps / 80) for steps in (24, 40, 80)}
    every |= {(arm, 80): loss for arm, loss in losses.items()}
    return [
        training.Result(arms.Run(arm, steps, seed), steps * 4096, [(0, 5.6), (steps * 4096, loss + 0.02 * seed)], 1.0, 1.5)
        for (arm, steps), loss in every.items()
        for seed in range(2)
    ]


def test_the_summary_of_made_up_losses(costs):
    result = analysis.summarise(results(baseline=3.1, no_muon=3.2), costs)
    share = math.exp(-0.25)
    ratio = costs["v4"].total / costs["baseline"].total
    assert result["goal"] == pytest.approx(3.11)
    row = result["arms"]["v4"]
    assert row["bound"] == ""
    assert row["compute"] == pytest.approx(share * ratio, rel=0.01)
    assert [one["compute"] for one in row["by_seed"].values()] == pytest.approx([row["compute"]] * 2, rel=1e-6)
    assert result["arms"]["no_muon"]["above_v4"] == pytest.approx(0.2)
    expected = row["tokens"] * math.exp(0.5) * costs["no_muon"].total / costs["baseline"].total
    assert result["arms"]["no_muon"]["compute"] == pytest.approx(expected, rel=1e-6)
    assert result["arms"]["no_muon"]["bound"] == "about"
    text = report.table(json.loads(json.dumps(result)))
    assert "V4 reaches the baseline's final loss of 3.1100 with" in text
    assert f"{1 - row['compute']:.1%} less compute, optimizer and mixing of streams included" in text
    picture = curves.picture(json.loads(json.dumps(result)))
    assert picture.count("<polyline") == 3
    assert picture.count("<circle") == 3 + 1  # and one that is explained


def test_what_only_some_seeds_have_is_marked_and_not_averaged_with_all(costs):
    every = results(baseline=3.1, no_muon=3.2)
    some = [r for r in every if (r.run.arm, r.run.steps, r.run.seed) not in {("no_muon", 80, 1), ("v4", 40, 1)}]
    some = [dataclasses.replace(r, curve=r.curve[-1:]) if r.run.arm == "baseline" and r.run.seed else r for r in some]
    result = json.loads(json.dumps(analysis.summarise(some, costs)))
    assert [point["share"] for point in result["budgets"]] == [0.3, 1.0]
    assert "| V4, AdamW for Muon | 1 of 2 |" in report.table(result)
    picture = curves.picture(result)
    assert "V4, AdamW for Muon (1 of 2 seeds)<" in picture
    assert "baseline<" in picture


def test_a_recipe_that_never_gets_there_is_told(costs):
    result = analysis.summarise(results(baseline=2.5), costs)
    assert result["arms"]["v4"]["bound"] == "more than"
    assert "V4 does not reach the baseline's final loss" in report.table(result)


def test_runs_are_kept_and_unknown_ones_refused(tmp_path, capsys):
    run = arms.Run("v4", 80, 1)
    where = tmp_path / run.name
    where.mkdir()
    lines = [
        {"kind": "eval", "step": 0, "tokens": 0, "loss/text": 5.6},
        {"kind": "experts", "step": 20, "layers": ["0"], "load": {"all": [[0.5, 1.5]]}},
        {"kind": "eval", "step": 80, "tokens": 327_680, "loss/text": 2.5},
    ]
    (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (where / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 80, "tokens": 327_680, "seconds": 9.0}))
    assert training.finished(run, tmp_path) is None
    (where / "summary.json").write_text(json.dumps({"status": "finished", "steps": 80, "tokens": 327_680, "seconds": 9.0}))
    found = training.train([run], tmp_path, say=lambda _: None)
    assert found == [training.Result(run, 327_680, [(0, 5.6), (327_680, 2.5)], 9.0, 1.5)]
    assert main.main(["bench", "efficiency", "--runs", "v5", "--directory", str(tmp_path)]) == 2
    assert "'v5' is none of the recipes that are compared: v4, baseline" in capsys.readouterr().err
    assert main.main(["bench", "efficiency", "--finished", "--directory", str(tmp_path / "nothing")]) == 2
    assert "no finished run of the study" in capsys.readouterr().err
