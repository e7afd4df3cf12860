"""What a path becomes: the same weights and ids from a run, a step and an export; no answer where no tokenizer is known."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.interop import steps
from v4train.cli import main
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import compose, record
from v4train.data.prepare import config as prepare_config
from v4train.decode import loading
from v4train.interop import score

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mixed"


@pytest.fixture(scope="module")
def made():
    return steps.recipe("configs/tiny.yaml", "model.layers=[{pattern: [csa]}]", "model.moe.hash_layers=1")


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mine"
    steps.write(directory, made, steps.values(made.model))
    return directory


@pytest.fixture(scope="module")
def exported(run):
    directory = run.with_name("exported")
    assert main.main(["convert", "export", str(run), str(directory), "--format", "fp32"]) == 0
    return directory


@pytest.fixture(scope="module")
def loaded(run):
    return loading.load(run)


def bits(params) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def test_a_run_a_step_and_an_export_are_the_same_model(run, exported, loaded):
    assert (loaded.name, loaded.step, loaded.model.mtp) == ("tiny", steps.STEP, None)
    for path in (run / "checkpoints", run / "checkpoints" / "step_00000007", exported):
        other = loading.load(path)
        assert other.tokenizer.fingerprint == loaded.tokenizer.fingerprint == tokenizer_lib.ByteTokenizer().fingerprint
        assert bits(other.params) == bits(loaded.params)


def test_a_step_is_answered_with_the_attention_of_its_stage(made, tmp_path):
    """The recipe says where the run began; what its last step was, the step says."""
    past = [{"from_step": 0, "until_step": 3, "attention": "sparse", "mtp_weight": 0.3}]
    past.append({"from_step": 3, "until_step": 7, "attention": "dense", "mtp_weight": 0.1})
    steps.write(tmp_path / "run", made, steps.values(made.model), stages=past)
    assert made.model.kind("csa").phase == "sparse"
    model = loading.load(tmp_path / "run", mtp=True).model
    assert (model.kind("csa").phase, model.mtp.loss_weight) == ("dense", 0.1)
    assert score.load(tmp_path / "run").model.kind("csa").phase == "dense"


def test_the_mtp_block_is_read_if_it_is_asked_for(run, exported, made):
    ours, theirs = (loading.load(path, mtp=True) for path in (run, exported))
    assert ours.model.mtp == made.model.mtp
    assert "mtp" in ours.params
    assert bits(ours.params) == bits(theirs.params)


def test_an_export_without_its_recipe_has_the_ids_of_its_tokenizer_file(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "bare")
    (copy / "recipe.yaml").unlink()
    found, ours = loading.load(copy).tokenizer, tokenizer_lib.ByteTokenizer()
    assert (found.bos, found.eos, found.pad) == (ours.bos, ours.eos, ours.pad)
    text = "naïve <eos> 日本"
    np.testing.assert_array_equal(found.encode(text), ours.encode(text))
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="does not name bos_token and eos_token"):
        loading.load(copy)


def test_a_tokenizer_of_another_model_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "other")
    (copy / "recipe.yaml").unlink()
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"more{i}": 272 + i for i in range(5)}
    (copy / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="277 ids, the model only 272"):
        loading.load(copy)


def test_without_a_tokenizer_there_is_no_answer(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json.*the 256 ids"):
        loading.load(GOLDEN)
    # An import of a directory without a recipe names bytes only because every recipe names something.
    assert main.main(["convert", "import", str(GOLDEN), str(tmp_path / "imported")]) == 0
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        loading.load(tmp_path / "imported")


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent does not exist.*released layout"):
        loading.load(tmp_path / "absent")


def test_media_become_the_tokens_of_training(loaded, tmp_path):
    image_lib, sound_lib = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    image_lib.fromarray(rng.integers(0, 256, (37, 21, 3), np.uint8)).save(tmp_path / "a.png")
    sound_lib.write(tmp_path / "b.wav", rng.normal(0, 0.1, 9000), 22_050)
    parts = (record.Media("image", tmp_path / "a.png"), record.Media("audio", tmp_path / "b.wav"), "a text")
    patch = loaded.model.image.patch
    spec = {"output": "-", "licence": "-", "origin": "-", "image": {"patch": patch, "max_patches": 12}}
    spec["inputs"] = [{"kind": "text", "name": "any", "path": "-"}]
    composer = compose.Composer(prepare_config.PrepareConfig.model_validate_json(json.dumps(spec)), loaded.tokenizer)
    document = composer.compose(record.Record("", "key", parts), source=0).document
    prompt = loaded.prompt(parts, image_patches=12)
    np.testing.assert_array_equal(prompt.tokens, document.tokens[:-1])
    np.testing.assert_array_equal(prompt.modality, document.modality[:-1])
    np.testing.assert_array_equal(prompt.patches, document.patches)
    np.testing.assert_array_equal(prompt.patch_xy, document.patch_xy)
    np.testing.assert_array_equal(prompt.audio, document.audio)


def test_prompts_of_pieces_and_control_tokens(loaded, tmp_path):
    image_lib = pytest.importorskip("PIL.Image")
    image_lib.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(tmp_path / "a.png")
    image, bos = record.Media("image", tmp_path / "a.png"), np.array([loaded.tokenizer.bos])
    whole = loaded.prompt(["a", image, "b"])
    pieces = loaded.compose([bos, "a", image, "", "b"])
    for name in ("tokens", "modality", "patches", "patch_xy"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))
    assert pieces.audio is None
    assert loaded.compose([np.array([5, 6])]).tokens.tolist() == [5, 6]


def test_a_chat_template_lies_beside_the_tokenizer(tmp_path):
    assert loading._chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for said, expected in (
        ({"chat_template": "x"}, "x"),
        ({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "tools", "template": "t"}]}, None),
        ({}, None),
    ):
        config.write_text(json.dumps(said))
        assert loading._chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert loading._chat_template(tmp_path) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in ("{", "[]"):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=r"tokenizer_config.json is"):
            loading._chat_template(tmp_path)


def test_media_that_cannot_be_read_are_named(loaded, tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image .*a.png: unreadable image"):
        loaded.prompt([record.Media("image", tmp_path / "a.png")])
    blind = dataclasses.replace(loaded, model=loaded.model.model_copy(update={"image": None}))
    with pytest.raises(ValueError, match="was not made for image"):
        blind.prompt([record.Media("image", tmp_path / "a.png")])
