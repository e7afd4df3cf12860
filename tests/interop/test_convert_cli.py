"""`v4train convert` as a person runs it: what lies in the directories afterwards, and what is said."""

import json
import re

import numpy as np
import pytest
import yaml

from tests.interop import steps
from v4train import recipe as recipe_lib
from v4train.checkpoint import restore
from v4train.cli import main
from v4train.interop import released as released_lib


def test_an_export_has_everything_that_loaders_look_for(exported, made):
    names = {path.name for path in exported.iterdir()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {
        "model.safetensors.index.json",
        "multimodal.safetensors",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.yaml",
        "README.md",
    }
    assert all(path.stat().st_size < 1_200_000 for path in exported.glob("*.safetensors"))
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["suppress_tokens"]) == (257, list(made.model.media_tokens))
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 257


def test_the_card_says_what_is_known(exported, run, tmp_path, capsys):
    card = (exported / "README.md").read_text()
    assert "522,973 parameters, 259,677 of them used per token" in card
    assert f"{steps.STEP} steps, {steps.STEP * 2048:,} tokens in rows of 128." in card
    assert re.search(r"\| image \| 15\.0% \| CC-BY-4\.0 \| Optical Recognition", card)
    assert "| routed expert | FP32 | 120 | 1.0 | exact | exact |" in card
    assert "dtype=torch.float32" in card
    main.main(["convert", "export", str(run), str(tmp_path / "fp4"), "--format", "fp4-fp8"])
    card, told = (tmp_path / "fp4/README.md").read_text(), capsys.readouterr().out
    row = next(line for line in card.splitlines() if line.startswith("| routed expert | FP4 | 120 | 0.1 |"))
    assert row in told
    assert 0.05 < float(row.split("|")[5]) < 0.2
    assert "dtype=torch.bfloat16" in card


def test_an_import_looks_like_a_run_and_is_bit_equal(exported, run, made, tmp_path, capsys):
    out = tmp_path / "taken"
    assert main.main(["convert", "import", str(exported), str(out)]) == 0
    told = capsys.readouterr().out
    assert "5 files have the digests of checksums.json" in told
    assert f"v4train train {out}/recipe.yaml" in told
    names = {path.name for path in out.iterdir()}
    assert names == {"checkpoints", "recipe.yaml", "recipe.json", "tokenizer.json", "tokenizer_config.json"}
    steps.assert_same_bits(steps.read(out / "checkpoints/step_00000000"), steps.read(run / f"checkpoints/step_{steps.STEP:08d}"))
    described = restore.describe(out / "checkpoints")
    assert described.metadata["imported"]["from"] == "open"

    recipe = recipe_lib.resolve(str(out / "recipe.yaml")).config
    assert recipe.model == made.model
    assert (recipe.init_from, recipe.name, recipe.run_directory) == (str(out), "taken-tuned", "runs/taken-tuned")
    assert recipe.data == made.data
    assert described.metadata["recipe"] == recipe.model_dump(mode="json")


def test_an_import_can_be_exported_again(exported, tmp_path):
    main.main(["convert", "import", str(exported), str(tmp_path / "in")])
    assert main.main(["convert", "export", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "fp32", "--shard-gb", "0.001"]) == 0
    for name in ("checksums.json", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name
    assert "Imported from open and not trained further" in (tmp_path / "out/README.md").read_text()


def foreign(exported, directory):
    """The same weights as somebody else would publish them: without our files."""
    directory.mkdir()
    for path in exported.iterdir():
        if path.name not in ("recipe.yaml", "checksums.json", "README.md"):
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_a_foreign_directory_gets_a_recipe_that_loads(exported, made, tmp_path, capsys):
    source = foreign(exported, tmp_path / "foreign")
    assert main.main(["convert", "import", str(source), str(tmp_path / "out"), "--set", "train.steps=600"]) == 0
    assert "there is no checksums.json" in capsys.readouterr().out
    recipe = recipe_lib.resolve(str(tmp_path / "out/recipe.yaml")).config
    assert (recipe.train.steps, recipe.data.sources[0].path, recipe.data.image_patch) == (600, "data/corpus", 4)
    assert released_lib.Released.open(source).model == recipe.model
    assert recipe.model.attention.chunk != 0


@pytest.mark.parametrize("setting", ["model.hidden=32", "model.attention.window=7", "model.mtp=null"])
def test_an_import_has_the_model_of_its_config_json(exported, tmp_path, capsys, setting):
    """Its step would say one model and hold the arrays of another: neither scored nor exported, or as something else."""
    out = tmp_path / "out"
    assert main.main(["convert", "import", str(exported), str(out), "--set", setting]) == 2
    assert f"--set changes {setting.partition('=')[0]}: an import has the model of its config.json" in capsys.readouterr().err
    assert not out.exists()
    assert main.main(["convert", "import", str(exported), str(out), "--set", "model.moe.bias_speed=0.5"]) == 0


def test_a_base_gives_everything_but_the_model(exported, made, tmp_path):
    base = tmp_path / "base.yaml"
    values = made.model_dump(mode="json") | {"seed": 11, "model": made.model.model_dump(mode="json") | {"hidden": 32}}
    base.write_text(yaml.safe_dump(values))
    assert main.main(["convert", "import", str(exported), str(tmp_path / "out"), "--base", str(base)]) == 0
    recipe = recipe_lib.resolve(str(tmp_path / "out/recipe.yaml")).config
    assert (recipe.seed, recipe.model) == (11, made.model)


def test_a_base_that_does_not_fit_is_refused(exported, made, tmp_path, capsys):
    base = tmp_path / "base.yaml"
    values = made.model_dump(mode="json")
    values["mesh"] |= {"expert": 3, "emulate_devices": None}
    base.write_text(yaml.safe_dump(values))
    assert main.main(["convert", "import", str(exported), str(tmp_path / "out"), "--base", str(base)]) == 2
    assert "mesh.expert 3 must divide model.moe.experts 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_contradicts_config_json_is_refused(exported, tmp_path, capsys):
    source = foreign(exported, tmp_path / "source")
    (source / "recipe.yaml").write_text((exported / "recipe.yaml").read_text().replace("window: 32", "window: 16"))
    assert main.main(["convert", "import", str(source), str(tmp_path / "out")]) == 2
    assert "model.attention.window: 32 in config.json, 16 in recipe.yaml" in capsys.readouterr().err


def test_a_step_by_name_and_a_damaged_newest_step(made, run, tmp_path, capsys):
    steps.write(tmp_path / "run", made, steps.values(made.model, seed=5))
    newest = tmp_path / "run/checkpoints/step_00000009"
    (tmp_path / "run/checkpoints/step_00000007").rename(newest)
    damaged = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    steps.write(tmp_path / "other", made, steps.values(made.model))
    (tmp_path / "other/checkpoints/step_00000007").rename(tmp_path / "run/checkpoints/step_00000007")
    assert main.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "the checkpoint of step 9 is damaged and was not used" in out
    assert "exported step 7 of" in out
    assert main.main(["convert", "export", str(newest), str(tmp_path / "b")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_lines_tell_the_progress_where_there_is_no_terminal(run, tmp_path, capsys, monkeypatch):
    from v4train.cli import convert_progress

    monkeypatch.setattr(convert_progress, "SECONDS_BETWEEN_LINES", 0.0)
    main.main(["convert", "export", str(run), str(tmp_path / "out")])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 200
    found = re.fullmatch(r"exporting (\d+) tensors, ([\d.]+) of ([\d.]+) GB, [\d,]+ MB/s, 0 s left", lines[-1])
    assert found
    assert found[2] == found[3]


def test_an_import_is_not_resumed(exported, tmp_path, capsys):
    main.main(["convert", "import", str(exported), str(tmp_path / "in")])
    capsys.readouterr()
    words = ["train", str(tmp_path / "in/recipe.yaml"), "--set", f"train.run_directory={tmp_path / 'in'}"]
    assert main.main([*words, "--set", "init_from=null"]) == 2
    assert "is an import, which has no training state to resume" in capsys.readouterr().err


def test_float_weights_are_what_they_were(exported):
    """By the safetensors library, straight from the files."""
    from safetensors import numpy as safetensors_numpy

    tensors = {}
    for shard in sorted(exported.glob("model-*.safetensors")):
        tensors |= safetensors_numpy.load_file(shard)
    made = steps.recipe()
    values = steps.values(made.model)
    assert np.array_equal(tensors["head.weight"], values["params/head"].T)
    assert np.array_equal(tensors["embed.weight"], values["params/embedding/table"])
