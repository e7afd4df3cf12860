"""What a recipe is refused for, as the command line says it: one message with path, value and remedy, exit code 2, no stack trace."""

import pathlib
import re
import shutil

import pytest
import yaml

from tests.data import synthetic
from tests.train import tiny
from v4train import recipe
from v4train.cli import main

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def refused(data, tmp_path, capsys, monkeypatch):
    """Runs ``v4train train`` on the tiny recipe with overrides, and returns the message that it is refused with."""
    monkeypatch.delenv("V4TRAIN_DEBUG", raising=False)

    def run(*overrides: str, **changes) -> str:
        path = tiny.write(tmp_path / "r.yaml", data, tmp_path / "run", **changes)
        words = [word for text in overrides for word in ("--set", text)]
        code = main.main(["train", str(path), *words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("v4train: ")
        assert "Traceback" not in err
        return err

    return run


BAD = {
    "_phases_fit": (
        ["data.phases=[{from_step: 4, ramp_steps: 3}, {from_tokens: 3000}]"],
        "data.phases[1] begins at step 7, but the phase before it begins, or ends its ramp, at step 7: move it behind",
    ),
    "_stages_fit": (
        ["train.stages=[{from_tokens: 1025, attention: warmup}, {from_step: 3, attention: sparse}]"],
        "train.stages[1] begins at step 3, but the stage before it begins at step 3: move it behind",
    ),
    "_batch_divides": (
        ["mesh.fsdp=2", "mesh.expert=2", "train.microbatches=2", "train.batch_rows=12"],
        "train.batch_rows 12 must be a multiple of 8 (mesh.replica 1 x mesh.fsdp 2 x mesh.expert 2 x train.microbatches 2); nearest: 8",
    ),
    "_experts_divide": (["mesh.expert=3", "train.batch_rows=9"], "mesh.expert 3 must divide model.moe.experts 8"),
    "_tensor_divides": (
        ["mesh.tensor=3"],
        "mesh.tensor 3 must divide model.attention.heads 4, model.moe.ffn 16, model.vocab_size 272",
    ),
    "_sequence_divides": (["mesh.context=3"], "mesh.context 3 must divide data.sequence_length 64"),
    "_mesh_is_emulated_whole": (
        ["mesh.fsdp=4", "mesh.emulate_devices=2"],
        "mesh.emulate_devices 2 is less than the mesh's 4 devices; set it to 4",
    ),
    "_positions_suffice": (["model.max_positions=32"], "data.sequence_length 64 exceeds model.max_positions 32"),
    "_needles_fit": (
        ["train.evals=[{kind: needle, lengths: [64, 131072]}]", "model.max_positions=65536"],
        "train.evals[0].lengths has 131072, but model.max_positions is 65536: leave longer ones out",
    ),
    "_evaluations_have_names": (
        ["train.evals=[{kind: needle, lengths: [64]}, {kind: needle, lengths: [64]}]"],
        "train.evals: 2 are called 'needle'; give each a name of its own",
    ),
    "_image_stem_fits": (
        ["model.image=null"],
        "data.max_patches is 30, but the model has no image stem; add model.image or set data.max_patches: 0",
    ),
    "_audio_stem_fits": (
        ["model.audio=null"],
        "data.max_audio_frames is 30, but the model has no audio stem; add model.audio or set it to 0",
    ),
    "_run_directory_is_a_path": (
        ["train.run_directory=runs/{nmae}"],
        "train.run_directory 'runs/{nmae}' has braces other than {name}, the recipe's name; remove them",
    ),
    "_draws_belong_to_a_source": (
        ["init_draws=[embedding/image]"],
        "init_draws names ['embedding/image'], but without init_from everything is drawn; remove it",
    ),
    "_decoding_fits": (
        ["model.max_positions=4096", "decode.max_length=8192"],
        "decode.max_length 8192 exceeds model.max_positions 4096",
    ),
    "_schedule_fits": (
        ["train.steps=3"],
        "optimizer.schedule: warmup_steps 2 + decay_steps 2 = 4 do not fit into a run of 3 steps; shorten them or train longer "
        "(train.steps)",
    ),
    "_groups_of_fp4_divide": (
        ["numerics.experts=mxfp4"],
        "numerics.experts mxfp4 has a scale for 32 inputs, which must divide model.moe.ffn 16",
    ),
    "_gradients_are_summed": (
        ["numerics.gradient_sums=bfloat16"],
        "numerics.gradient_sums is bfloat16, but train.microbatches is 1, so nothing is summed; remove it or use more microbatches",
    ),
    "_something_is_emulated": (
        ["numerics.emulate=true"],
        "numerics.emulate is true, but nothing is in FP8; remove it or set numerics.linear or numerics.experts",
    ),
}


def test_every_check_is_tested():
    assert [check.__name__ for check in recipe.CHECKS] == list(BAD)


@pytest.mark.parametrize("check", BAD)
def test_settings_that_do_not_fit_together(refused, check):
    overrides, message = BAD[check]
    text = refused(*overrides)
    assert ": 1 setting(s) do not fit together:\n" in text
    assert f"\n  - {message}\n" in text


@pytest.mark.parametrize(
    "override, message",
    [
        ("{from_step: 3, attention: warmup, from_tokens: 9}", "a stage needs either from_step or from_tokens: give one of them"),
        ("{from_step: 3}", "a stage that names neither attention nor mtp_weight changes nothing: give one of them, or remove it"),
        ("{from_step: 3, mtp_weight: -1}", "train.stages.0.mtp_weight"),
        ("{from_step: 3, attention: full}", "train.stages.0.attention"),
    ],
)
def test_stages_that_cannot_be(refused, override, message):
    assert message in refused(f"train.stages=[{override}]")


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.layers=[{pattern: [hca]}]", "train.stages[0].attention is warmup, but no layer of the model is csa: remove it"),
        ("model.mtp=null", "train.stages[0].mtp_weight is 0.1, but the model has no MTP (model.mtp is null): remove it"),
    ],
)
def test_stages_of_parts_that_the_model_does_not_have(refused, override, message):
    named = "attention: warmup" if "layers" in override else "mtp_weight: 0.1"
    assert f"\n  - {message}\n" in refused(override, f"train.stages=[{{from_step: 3, {named}}}]")


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image.patch=4", "model.image.patch 4 and data.image_patch 2 must be equal"),
        ("model.audio.bins=40", "model.audio.bins and model.audio.levels are 40 and 16, but audio data have 80 and 16; set these"),
    ],
)
def test_stems_that_do_not_fit_the_data(refused, override, message):
    assert f"\n  - {message}\n" in refused(override)


@pytest.mark.parametrize(
    "phase, message",
    [
        ("{from_step: 2, batch_rows: 6}", "data.phases: batch_rows 6 must be a multiple of 4 (mesh.replica 1 x mesh.fsdp 4 x"),
        ("{from_step: 2, sequence_length: 2048}", "data.phases: sequence_length 2048 exceeds model.max_positions 1024"),
        ("{from_step: 2, weights: {txt: 1}}", "data.phases[0].weights names 'txt', but the sources are text, media: correct it"),
        ("{from_step: 2, weights: {text: 0, media: 0}}", "data.phases[0]: the weights of all sources (text, media) are 0: give one"),
    ],
)
def test_phases_that_do_not_fit(refused, phase, message):
    assert message in refused("mesh.fsdp=4", f"data.phases=[{phase}]")


def test_a_phase_begins_by_step_or_by_tokens(refused):
    for phase in ("{ramp_steps: 3}", "{from_step: 3, from_tokens: 1000}"):
        assert "a phase needs either from_step or from_tokens: give one of them" in refused(f"data.phases=[{phase}]")


def test_all_problems_at_once(refused):
    text = refused("train.steps=3", "model.max_positions=32", "mesh.context=3")
    assert ": 3 setting(s) do not fit together:\n" in text
    assert text.count("\n  - ") == 3


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.stepz=3", ["--set train.stepz=3", "train.stepz", "did you mean `steps`?"]),
        ("train.steps=many", ["--set train.steps=many", "train.steps", "many", "integer"]),
        ("train.steps=0", ["--set train.steps=0", "train.steps = 0", "greater than 0"]),
        ("train.steps=2.5", ["train.steps = 2.5", "integer"]),
        ("name=a b", ["name", "a b"]),
    ],
)
def test_a_wrong_value_names_itself_and_the_remedy(refused, override, parts):
    text = refused(override)
    assert all(part in text for part in parts), text


def test_a_missing_recipe(capsys):
    assert main.main(["train", "no/such/recipe.yaml"]) == 2
    assert "no/such/recipe.yaml" in capsys.readouterr().err


def test_one_recipe_not_none_nor_two(capsys):
    for words in ([], ["a.yaml", "--config", "b.yaml"]):
        assert main.main(["train", *words]) == 2
        assert "name one recipe: v4train train RECIPE" in capsys.readouterr().err


def test_a_mesh_larger_than_the_machine(refused):
    text = refused("mesh.fsdp=16", "train.batch_rows=16")
    assert "mesh: fsdp 16 needs 16 devices, but 8 cpu device(s) are present" in text
    assert "set mesh.emulate_devices: 16" in text


def test_emulation_that_comes_too_late(refused):
    text = refused("mesh.fsdp=16", "mesh.emulate_devices=16", "train.batch_rows=16")
    assert "mesh.emulate_devices: 16 CPU devices were asked for, but JAX has already started with 8" in text


def test_a_missing_store(refused):
    text = refused("data.sources.0.path=no/such/store")
    assert "data source 'text'" in text
    assert "no/such/store" in text


def test_a_damaged_store(refused, data, tmp_path):
    store = tmp_path / "damaged"
    shutil.copytree(data / "text", store)
    index = store / "documents.npy"
    index.write_bytes(index.read_bytes()[:-8])
    text = refused(f"data.sources.0.path={store}")
    assert "data source 'text'" in text
    assert "documents.npy has " in text
    assert "copy or build the store again" in text


def test_an_unfinished_store(refused, data, tmp_path):
    store = tmp_path / "unfinished"
    shutil.copytree(data / "text", store)
    (store / "manifest.json").unlink()
    assert "manifest.json" in refused(f"data.sources.0.path={store}")


def test_a_store_of_other_patches(refused, tmp_path):
    synthetic.make_test_store(tmp_path / "media4", documents=20, kind="media", patch=4)
    assert "image patches of 4 pixels, but `image_patch` is 2" in refused(f"data.sources.1.path={tmp_path / 'media4'}")


def test_a_vocabulary_that_is_too_small(refused):
    assert "model.vocab_size 100 is smaller than the tokenizer's 272 ids; set it to that" in refused("model.vocab_size=100")


def test_media_ids_that_would_be_predicted(refused):
    text = refused("model.media_tokens=[259]")
    assert "model.media_tokens [259] must contain the tokenizer's media ids [" in text


def test_a_run_directory_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "run"
    text = refused(f"train.run_directory={where}")
    assert f"train.run_directory: {where} cannot be written (Not a directory); choose another directory" in text

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("v4train.checkpoint.run_lock.os.open", read_only)
    assert "cannot be written (Read-only file system)" in refused(f"train.run_directory={tmp_path / 'other'}")


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_recipe_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = recipe.resolve(path)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", loaded.config.name)
    assert loaded.config.run_directory == f"runs/{loaded.config.name}"


def test_every_check_passes_on_the_tiny_recipe(data):
    made = tiny.recipe(data)
    assert [check(made) for check in recipe.CHECKS] == [None] * len(recipe.CHECKS)
    assert made.tokens_per_step == 8 * 64


def test_dry_run_starts_nothing(data, tmp_path, capsys):
    path = tiny.write(tmp_path / "r.yaml", data, tmp_path / "run")
    assert main.main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["train"]["steps"] == 6
    assert re.search(r"# parameters [\d,]+ total, [\d,]+ active per token\n", out)
    assert "# mesh of 1 device(s), 512 tokens per step\n" in out
    assert not (tmp_path / "run").exists()
