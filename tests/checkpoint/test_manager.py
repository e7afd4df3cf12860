"""Saving: the copy is taken before `save` returns, failures do not end the run, and only the policy's steps stay."""

import errno
import logging
import os
import pathlib
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.conftest import as_template, assert_same_bits, place
from v4train.checkpoint import arrays, config, integrity, policies, restore, step_directory
from v4train.checkpoint.manager import Manager


def test_arrays_may_be_donated_right_after_save(tmp_path, keep_all):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    expected = {f"w{i}": np.random.default_rng(i).normal(size=(256, 128)).astype(np.float32) for i in range(8)}
    control = place(expected, (4, 2))
    jax.block_until_ready(overwrite(control))
    assert control["w0"].is_deleted(), "without a save, the buffers are really taken over"
    with Manager(tmp_path, config=keep_all) as manager:
        for step in range(1, 4):
            state = place(expected, (4, 2))
            manager.save(step, state, metadata={})
            result = jax.block_until_ready(overwrite(state))
            assert (np.asarray(result["w0"]) == -1).all()
    for step in range(1, 4):
        restored = restore.restore(tmp_path, step=step, template=as_template(place(expected, (1, 1))))
        assert_same_bits(restored.state, expected)


def test_save_returns_before_the_files_are_written(tmp_path, state, keep_all, monkeypatch):
    gate, finish = threading.Event(), arrays.finish_write
    monkeypatch.setattr(arrays, "finish_write", lambda directory: (gate.wait(30), finish(directory)))
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(1, state, metadata={})
        assert manager.steps() == []
        gate.set()
        manager.wait()
        assert manager.steps() == [1]


def test_metadata_is_copied_too(tmp_path, state, keep_all, monkeypatch):
    gate, finish = threading.Event(), arrays.finish_write
    monkeypatch.setattr(arrays, "finish_write", lambda directory: (gate.wait(30), finish(directory)))
    metadata = {"position": {"row": 5}}
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(1, state, metadata=metadata)
        metadata["position"]["row"] = 6
        gate.set()
    assert restore.describe(tmp_path).metadata == {"position": {"row": 5}}


def test_a_second_save_waits_and_the_policy_is_applied(tmp_path, state):
    keep = policies.Every(kind="every", steps=4, latest=2)
    with Manager(tmp_path, config=config.CheckpointConfig(keep=keep)) as manager:
        for step in range(1, 8):
            manager.save(step, state, metadata={"step": step})
        manager.wait()
        assert manager.steps() == [4, 6, 7]
        assert manager.latest_good() == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step_00000004", "step_00000006", "step_00000007"]


def test_a_checkpoint_is_few_files(tmp_path, keep_all):
    many = place({f"w{i}": np.ones((8, 8), np.float32) for i in range(100)}, (4, 2))
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(1, many, metadata={})
    assert len([path for path in (tmp_path / "step_00000001").rglob("*") if path.is_file()]) < 50


def test_saving_the_same_step_again_does_nothing(tmp_path, state, keep_all):
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(3, state, metadata={"attempt": 1})
        manager.save(3, state, metadata={"attempt": 2})
    assert restore.describe(tmp_path).metadata == {"attempt": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step_00000003"]


def test_a_run_that_went_back_saves_and_keeps_its_new_steps(tmp_path, state, caplog):
    keep_two = config.CheckpointConfig(keep=policies.Latest(count=2))
    with Manager(tmp_path, config=keep_two) as manager:
        for step in (10, 20, 30):
            manager.save(step, state, metadata={"past": "old"})
    with Manager(tmp_path, config=keep_two) as manager:
        manager.save(25, state, metadata={"past": "new"})
        manager.wait()
        assert manager.steps() == [20, 25]
    assert restore.describe(tmp_path).metadata == {"past": "new"}
    assert (tmp_path / "step_00000030.abandoned" / "manifest.json").exists()
    assert "former step 30" in caplog.text


def test_two_managers_cannot_write_to_one_directory(tmp_path, keep_all):
    with Manager(tmp_path, config=keep_all), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        Manager(tmp_path, config=keep_all)


def test_bad_metadata_is_refused_at_once(tmp_path, state, keep_all):
    with Manager(tmp_path, config=keep_all) as manager:
        with pytest.raises(ValueError, match=r"metadata\.data\.at is a tuple"):
            manager.save(1, state, metadata={"data": {"at": (1, 2)}})
        assert manager.steps() == []


def out_of_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "module, function",
    [(integrity, "write_manifest"), (arrays, "start_write"), (arrays, "finish_write"), (pathlib.Path, "mkdir")],
)
def test_a_full_disk_costs_one_save_and_one_line(tmp_path, state, keep_all, monkeypatch, caplog, module, function):
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(1, state, metadata={})
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(module, function, out_of_space)
            manager.save(2, state, metadata={})
            manager.wait()
        assert manager.last_error is not None
        assert "the checkpoint of step 2 was not written" in manager.last_error
        assert "the disk is full (free some space" in manager.last_error
        assert "the newest finished one is step 1" in manager.last_error
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [manager.last_error]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "step_00000001"]
        manager.save(3, state, metadata={})
        manager.wait()
        assert manager.last_error is None
        assert manager.steps() == [1, 3]


def test_a_failed_save_does_not_keep_the_arrays_alive(tmp_path, keep_all, monkeypatch):
    monkeypatch.setattr(integrity, "write_manifest", out_of_space)
    before = len(jax.live_arrays())
    with Manager(tmp_path, config=keep_all) as manager:
        manager.save(2, {"w": jnp.ones((4, 4))}, metadata={})
        manager.wait()
        assert manager.last_error
        assert len(jax.live_arrays()) == before


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("seen_coming", [True, False])
def test_a_disk_that_really_is_full(small_disk, keep_all, monkeypatch, seen_coming):
    state = place({"w": np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)}, (4, 2))
    with Manager(small_disk, config=keep_all) as manager:
        for step in (1, 2):
            manager.save(step, state, metadata={})
        manager.wait()
        assert manager.last_error is None
        if not seen_coming:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
        manager.save(3, state, metadata={})
        manager.wait()
        assert manager.last_error is not None
        assert "the disk is full" in manager.last_error
        assert manager.steps() == [1, 2]
        assert not step_directory.temporary_path(small_disk, step=3).exists()
        step_directory.delete(small_disk, step=1)
        manager.save(4, state, metadata={})
        manager.wait()
        assert manager.last_error is None
        assert manager.latest_good() == 4
