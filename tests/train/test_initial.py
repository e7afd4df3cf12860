"""`init_from`: what is taken, what starts anew, what is refused, and that a resumed run does not read it."""

import shutil
import time

import jax
import numpy as np
import pytest

from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.checkpoint import config as checkpoint_config
from v4train.checkpoint import manager as manager_lib
from v4train.config import dump
from v4train.train import build, initial
from v4train.train import run as run_lib

TEXT_ONLY = {"model.image": "null", "model.audio": "null", "data.max_patches": "0", "data.max_audio_frames": "0"}


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def resolve(data, directory, changes=None):
    path = tiny.write(directory.with_suffix(".yaml"), data, directory)
    return recipe_lib.resolve(str(path), overrides=[f"{key}={value}" for key, value in (changes or {}).items()])


def parts_of(data, directory, changes=None):
    return build.parts(resolve(data, directory, changes).config)


def save(parts, directory):
    """A step with every value moved away from its first one, moments included."""
    state = jax.tree.map(lambda x: jax.device_put((np.asarray(x) + 1).astype(x.dtype), x.sharding), build.first_state(parts))
    with manager_lib.Manager(directory / "checkpoints", config=checkpoint_config.CheckpointConfig()) as manager:
        manager.save(7, state, metadata={"recipe": dump.values(parts.recipe), "data": {}, "seed": 0})
    return state


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """A run directory at step 7, and its state."""
    directory = tmp_path_factory.mktemp("source") / "run"
    return directory, save(parts_of(data, directory), directory)


@pytest.fixture(scope="module")
def text_source(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("text") / "run"
    changes = {**TEXT_ONLY, "data.sources": f"[{{name: text, path: {data / 'text'}, weight: 1}}]"}
    return directory, save(parts_of(data, directory, changes), directory)


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/step_00000007"])
@pytest.mark.parametrize("mesh", [{}, {"mesh.expert": 2, "mesh.fsdp": 2}], ids=["one device", "four"])
def test_weights_and_buffers_are_taken_and_the_rest_starts_anew(data, source, tmp_path, path, mesh):
    directory, saved = source
    parts = parts_of(data, tmp_path / "new", mesh)
    begun = initial.load(parts, source=str(directory / path))
    for mine, theirs in ((begun.state.params, saved.params), (begun.state.buffers, saved.buffers)):
        assert {name: x.tobytes() for name, x in flat(mine).items()} == {name: x.tobytes() for name, x in flat(theirs).items()}
    fresh = build.first_state(parts)
    assert {name: x.tobytes() for name, x in flat(begun.state.optimizer).items()} == {
        name: x.tobytes() for name, x in flat(fresh.optimizer).items()
    }
    assert (int(begun.state.step), int(begun.state.skipped)) == (0, 0)
    assert jax.tree.map(lambda x: x.sharding, begun.state) == jax.tree.map(lambda x: x.sharding, parts.state)
    assert begun.told.splitlines() == [f"began with the parameters of step 7 of {directory / path}"]


def test_settings_that_shape_nothing_are_told(data, source, tmp_path):
    changes = {"model.attention.window": 8, "model.attention.chunk": 16, "model.remat": "full", "model.attention.yarn": "null"}
    told = initial.load(parts_of(data, tmp_path / "new", changes), source=str(source[0])).told
    assert "model.attention.window: 16 there, 8 here" in told
    assert "model.attention.yarn.factor" in told or "model.attention.yarn: {" in told
    assert "chunk" not in told
    assert "remat" not in told


def test_other_shapes_are_refused_with_a_list(data, source, tmp_path):
    parts = parts_of(data, tmp_path / "new", {"model.moe.ffn": 24, "model.mtp": "null"})
    with pytest.raises(ValueError) as caught:
        initial.load(parts, source=str(source[0]))
    text = str(caught.value)
    assert text.startswith(f"init_from: {source[0]} holds other parameters than this recipe's model; ")
    assert "  params/mtp/e_proj: float32[32,32] in the source, absent in this recipe's model" in text.splitlines()
    assert "  params/stack/run_0/layer_0/moe/shared/w1: float32[1,32,16] in the source, float32[1,32,24] in this recipe's model" in text
    assert text.endswith("Take the model section of its recipe.yaml.")


def test_stems_that_the_source_lacks_are_drawn_only_when_named(data, text_source, tmp_path):
    directory, saved = text_source
    parts = parts_of(data, tmp_path / "new")
    with pytest.raises(ValueError, match=r"init_draws: \[embedding/audio, embedding/image\]"):
        initial.load(parts, source=str(directory))
    with pytest.raises(ValueError, match=r"params/embedding/audio/norm: absent in the source") as caught:
        initial.load(parts, source=str(directory), draws=("embedding/image",))
    assert "embedding/image" not in str(caught.value)
    begun = initial.load(parts, source=str(directory), draws=("embedding/image", "embedding/audio"))
    mine, theirs, fresh = flat(begun.state.params), flat(saved.params), flat(build.first_state(parts).params)
    new = {name for name in mine if name not in theirs}
    assert {name.split("/")[1] for name in new} == {"image", "audio"}
    assert all(mine[name].tobytes() == (fresh if name in new else theirs)[name].tobytes() for name in mine)
    assert "  drawn from the seed: embedding/audio/norm, embedding/audio/table, embedding/image/columns" in begun.told


def test_a_draw_without_effect_is_refused(data, source, tmp_path):
    with pytest.raises(ValueError, match="init_draws: embedding/image names nothing that the source lacks; remove it"):
        initial.load(parts_of(data, tmp_path / "new"), source=str(source[0]), draws=("embedding/image",))
    with pytest.raises(ValueError, match="without init_from everything is drawn"):
        resolve(data, tmp_path / "new", {"init_draws": "[embedding/image]"})


def test_a_source_that_is_none_or_damaged(data, source, tmp_path):
    parts = parts_of(data, tmp_path / "new")
    with pytest.raises(ValueError, match=r"init_from: .*/nowhere does not exist: give a run directory"):
        initial.load(parts, source=str(tmp_path / "nowhere"))
    shutil.copytree(source[0], tmp_path / "copy")
    damaged = max((tmp_path / "copy").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?s)init_from: .*truncated or overwritten"):
        initial.load(parts, source=str(tmp_path / "copy"))


def test_a_resumed_run_does_not_read_its_source_again(data, source, tmp_path, capsys):
    shutil.copytree(source[0], tmp_path / "source")
    changes = {
        "init_from": tmp_path / "source",
        "train.steps": 2,
        "optimizer.schedule.decay_steps": 0,
        "optimizer.schedule.warmup_steps": 1,
    }
    run_lib.run(resolve(data, tmp_path / "run", changes), program_started=time.time())
    assert f"began with the parameters of step 7 of {tmp_path / 'source'}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "source")
    outcome = run_lib.run(resolve(data, tmp_path / "run", changes | {"train.steps": 3}), program_started=time.time())
    out = capsys.readouterr().out
    assert "resumed from step 2" in out
    assert "began with" not in out
    assert outcome.summary["status"] == "finished"


def test_an_import_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="is an import, which has no training state to resume; train in another directory with init_from"):
        initial.check_is_run({"imported": {}}, tmp_path)
