"""`v4train bench step --lengths` and `--depths`: what they compare, with figures by hand, and what they refuse."""

import json
import pathlib

import pytest

from tests.bench import test_memory
from v4train import recipe as recipe_lib
from v4train.bench import growth, memory
from v4train.cli import main
from v4train.core import compiler
from v4train.model import flops
from v4train.train import build

RECIPE = str(pathlib.Path(__file__).parents[2] / "configs/bench/long_context.yaml")


def test_time_per_token_is_set_beside_flops_per_token(monkeypatch, capsys):
    """Steps of 2 s at 512 tokens and of 6 s at 2,048 (after a slower first one), 4,096 tokens each: 3 times the time."""
    asked = []

    def run(path, overrides, *, length, steps):
        asked.append((length, steps, overrides))
        seconds = {512: [9.0, 2.0, 1.0, 3.0], 2048: [9.0, 6.0, 7.0, 5.0]}[length]
        cpu = {512: [1.0, 1.0, 1.0, 1.0], 2048: [1.0, 2.0, 2.5, 2.0]}[length]
        return {"platform": "cpu", "measured": {"step_seconds": seconds, "step_cpu_seconds": cpu, "compile_seconds": 1.0}}

    monkeypatch.setattr(memory, "run", run)
    assert main.main(["bench", "step", "--config", RECIPE, "--lengths", "2048,512", "--tokens", "4096"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(length, steps) for length, steps, _ in asked] == [(512, 4), (2048, 4)]
    assert asked[0][2] == ["data.sequence_length=512", "train.batch_rows=8"]
    model = recipe_lib.resolve(RECIPE).config.model
    work = flops.training(model, length=2048).total / flops.training(model, length=512).total
    (found,) = result["growth"]
    assert (found["length"], found["time_per_token"], found["cpu_per_token"]) == (2048, 3.0, 2.0)
    assert found["flops_per_token"] == pytest.approx(work, abs=1e-4)
    assert found["time_over_flops"] == pytest.approx(3.0 / work, abs=1e-3)
    assert found["cpu_over_flops"] == pytest.approx(2.0 / work, abs=1e-3)
    assert result["lengths"][1]["seconds_per_token"] == pytest.approx(6.0 / 4096)


def test_depths_compile_the_recipes_layers_cut_or_repeated(monkeypatch, capsys):
    """With a compiler that takes no time: how long the real one takes is what the bench is for."""
    recipe = recipe_lib.resolve(RECIPE).config
    assert growth.layers_of(recipe, depth=3) == ("window", "csa", "hca")
    assert growth.layers_of(recipe, depth=6) == ("window", "csa", "hca", "csa", "window", "csa")
    lowered = []

    class Lowered:
        def compile(self, options):
            lowered.append(options)

    monkeypatch.setattr(build, "lower_step", lambda parts, shape: lowered.append(parts.recipe.model.layer_kinds) or Lowered())
    words = [word for text in test_memory.SMALL for word in ("--set", text)]
    assert main.main(["bench", "step", "--config", RECIPE, "--depths", "1,12", "--set", "data.sequence_length=32", *words]) == 0
    assert lowered == [("csa",), compiler.options(), ("csa",) * 12, compiler.options()]
    result = json.loads(capsys.readouterr().out)
    assert [row["depth"] for row in result["depths"]] == [1, 12]
    assert [row["depth"] for row in result["growth"]] == [12]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config is missing"),
        (["--lengths", "512,768"], "--tokens 768: rows of 512 tokens do not divide it"),
        (["--lengths", "512", "--steps", "0"], "--steps 0: at least one step must be measured"),
        (["--depths", "8,0"], "--depths 8,0: give numbers of layers above 0"),
    ],
)
def test_wrong_arguments_are_one_message(capsys, words, message):
    assert main.main(["bench", "step", *words]) == 2
    assert message in capsys.readouterr().err
