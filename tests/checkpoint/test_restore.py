"""Restoring: bit-exact on any mesh, past damage to the newest good step, and never quietly different."""

import json
import re

import jax
import numpy as np
import pytest

from tests.checkpoint.conftest import as_template, assert_same_bits, place
from v4train.checkpoint import config, restore
from v4train.checkpoint.manager import Manager

METADATA = {"data": {"row": 123456789012, "fingerprint": "abc"}, "seed": 7, "recipe": {"model": {"layers": 2}}}


@pytest.fixture
def saved(tmp_path, state, keep_all):
    with Manager(tmp_path, config=keep_all) as manager:
        for step in (10, 20, 30):
            manager.save(step, state, metadata=METADATA | {"at": step})
    return tmp_path


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (8, 1), (1, 8), (4, 2)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, values, mesh):
    template = as_template(place(values, mesh))
    restored = restore.restore(saved, template=template)
    assert_same_bits(restored.state, values)
    for leaf, struct in zip(jax.tree.leaves(restored.state), jax.tree.leaves(template), strict=True):
        assert leaf.sharding == struct.sharding
    assert (restored.step, restored.skipped) == (30, [])
    assert restored.metadata == METADATA | {"at": 30}


def test_a_given_step_and_a_subtree(saved, values):
    restored = restore.restore(saved, step=20, template=as_template(place(values["params"], (2, 1))), subtree="params")
    assert_same_bits(restored.state, values["params"])
    assert (restored.step, restored.metadata["at"]) == (20, 20)
    with pytest.raises(ValueError, match=r"params/w: .* in the checkpoint, absent in this run"):
        restore.restore(saved, template={"table": as_template(place(values["params"]["table"], (2, 1)))}, subtree="params")


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, problem",
    [(flip, "does not have the digest"), (truncate, "bytes, not"), (lambda file: file.unlink(), "is missing")],
)
def test_a_damaged_step_is_named_and_the_one_before_is_used(saved, state, values, damage, problem):
    step = saved / "step_00000030"
    file = largest_file(step)
    damage(file)
    (saved / ".step_00000040.tmp").mkdir()
    restored = restore.restore(saved, template=as_template(state))
    assert restored.step == 20
    assert_same_bits(restored.state, values)
    [(skipped, reason)] = restored.skipped
    assert skipped == 30
    assert reason.startswith(file.relative_to(step).as_posix())
    assert problem in reason
    with pytest.raises(ValueError, match=f"no good step(.|\n)*step 30: {re.escape(reason)}\nThere are steps 10, 20, 30"):
        restore.restore(saved, step=30, template=as_template(state))
    with Manager(saved, config=config.CheckpointConfig()) as manager:
        assert manager.latest_good() == 20


def test_every_file_of_a_step_is_covered(saved):
    step = saved / "step_00000030"
    files = {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()}
    assert files - json.loads((step / "manifest.json").read_text())["files"].keys() == {"manifest.json"}


def test_nothing_good_is_an_error_that_names_everything(saved, state, tmp_path):
    for step in (10, 20, 30):
        (saved / f"step_{step:08d}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step 30: manifest.json is missing(.|\n)*step 20: (.|\n)*step 10: (.|\n)*start a new run"):
        restore.restore(saved, template=as_template(state))
    with pytest.raises(ValueError, match="has no finished step to restore"):
        restore.restore(tmp_path / "absent", template=as_template(state))
    with pytest.raises(ValueError, match="has no finished step 11; it has 10, 20, 30"):
        restore.restore(saved, step=11, template=as_template(state))


def test_arrays_of_another_recipe_are_one_error(saved, values):
    other = {
        **values,
        "params": {
            "w": np.zeros((16, 64), np.float32),
            "half": values["params"]["half"].astype(np.float32),
            "bias": np.zeros(8, np.float32),
        },
    }
    with pytest.raises(ValueError) as caught:
        restore.restore(saved, template=as_template(place(other, (1, 1))))
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("does not hold the arrays of this run; 4 differ:")
    assert lines[1:5] == [
        "  params/bias: absent in the checkpoint, float32[8] in this run",
        "  params/half: bfloat16[16,8] in the checkpoint, float32[16,8] in this run",
        "  params/table: int32[8] in the checkpoint, absent in this run",
        "  params/w: float32[16,32] in the checkpoint, float32[16,64] in this run",
    ]
    assert "Use the recipe it was written with" in lines[5]


def test_a_long_list_of_differences_is_cut(saved, values):
    other = values | {"more": {f"x{i}": np.zeros(8, np.float32) for i in range(20)}}
    with pytest.raises(ValueError, match=r"20 differ:(.|\n)*and 12 more"):
        restore.restore(saved, template=as_template(place(other, (1, 1))))


def test_a_recipe_check_lists_every_difference():
    saved = {
        "model": {"layers": 2, "kinds": ["a", "b"], "gone": None},
        "train": {"steps": 10, "lr": 0.1},
        "checkpoint": {"keep": {"count": 1}},
    }
    current = {"model": {"layers": 3, "kinds": ["a", "c", "d"]}, "train": {"steps": 20, "lr": 0.1}, "checkpoint": {"keep": {"count": 2}}}
    ignore = ("checkpoint", "train.steps")
    with pytest.raises(ValueError) as caught:
        restore.check_recipe(saved, current, ignore=ignore)
    assert str(caught.value).split("\n")[:-1] == [
        "the checkpoint is of another recipe; 4 values differ:",
        "  model.gone: null in the checkpoint, absent now",
        '  model.kinds.1: "b" in the checkpoint, "c" now',
        '  model.kinds.2: absent in the checkpoint, "d" now',
        "  model.layers: 2 in the checkpoint, 3 now",
    ]
    restore.check_recipe(saved, current, ignore=(*ignore, "model"))
    with pytest.raises(ValueError, match=r"train\.steps"):
        restore.check_recipe(saved, current, ignore=("checkpoint", "model", "train.step"))
    restore.check_recipe({"a": (1, 2)}, {"a": [1, 2]})


def test_a_restored_state_may_be_donated(tmp_path, keep_all):
    expected = {f"w{i}": np.random.default_rng(i).normal(size=(256, 128)).astype(np.float32) for i in range(4)}
    state = place(expected, (4, 2))
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(1, state, metadata={})
    restored = restore.restore(tmp_path, template=as_template(state)).state
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for _ in range(3):
        restored = step(restored)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(restored[name]), ((value + np.float32(1)) + np.float32(1)) + np.float32(1))
