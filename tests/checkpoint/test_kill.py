"""A run that is killed at any moment loses at most the step it was writing."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.checkpoint.conftest import as_template, assert_same_bits
from v4train.checkpoint import arrays, config, integrity, policies, restore, step_directory
from v4train.checkpoint.manager import Manager

SAVE_FOREVER = """
import sys
import jax, jax.numpy as jnp
from v4train.checkpoint import config, policies
from v4train.checkpoint.manager import Manager
keep = config.CheckpointConfig(keep=policies.Latest(count=2))
manager = Manager(sys.argv[1], config=keep)
step = (manager.steps() or [0])[-1]
state = {f"w{i}": jnp.zeros((64, 64)) for i in range(20)}
while True:
    step += 1
    manager.save(step, jax.tree.map(lambda x: x + step, state), metadata={"step": step})
    manager.wait()
    assert manager.last_error is None
    print(step, flush=True)
"""


def test_kill_minus_nine_never_loses_a_finished_step(tmp_path):
    environment = os.environ | {"XLA_FLAGS": ""}
    template = {f"w{i}": as_template(jax.numpy.zeros((64, 64))) for i in range(20)}
    finished = 0
    for delay in (0.03, 0.11):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first, "the run failed before its first save"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            lines = [first, *process.stdout.readlines()]
        assert int(first) > finished
        finished = int([line for line in lines if line.endswith("\n")][-1])
        restored = restore.restore(tmp_path, template=template)
        assert restored.step >= finished
        assert restored.skipped == []
        assert restored.metadata == {"step": restored.step}
        assert all((np.asarray(leaf) == restored.step).all() for leaf in jax.tree.leaves(restored.state))


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it, nothing is cleaned up."""


def die(*args, **kwargs):
    raise Killed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    "module, function, newest",
    [
        (arrays, "finish_write", 2),
        (integrity, "write_manifest", 2),
        (step_directory, "publish", 3),
        (step_directory.os, "rename", 3),
        (step_directory.shutil, "rmtree", 2),
    ],
)
def test_the_next_run_finds_the_newest_complete_step(tmp_path, state, values, monkeypatch, module, function, newest):
    keep = config.CheckpointConfig(keep=policies.Latest(count=2))
    manager = Manager(tmp_path, config=keep)
    for step in (1, 2):
        manager.save(step, state, metadata={})
    manager.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module, function, die)
        manager.save(3, state, metadata={})
        manager.wait()
    # What the operating system does when the process ends.
    assert manager._lock is not None
    manager._lock.release()
    assert restore.restore(tmp_path, template=as_template(state)).step == 2

    with Manager(tmp_path, config=keep) as manager:
        assert manager.steps()[-1] == newest
        restored = restore.restore(tmp_path, template=as_template(state))
        assert (restored.step, restored.skipped) == (newest, [])
        assert_same_bits(restored.state, values)
        manager.save(3, state, metadata={})
        manager.wait()
        assert manager.steps() == [2, 3]
    assert not list(tmp_path.glob(".step*"))
