"""The guard in whole runs: a bad batch is left out, said, listed and remembered, whatever happens to the process afterwards."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.checkpoint import restore
from v4train.train import build
from v4train.train.hooks import record

STEPS = 10
QUICK = {"hidden": 16, "layers": [{"pattern": ["window", "csa"]}]}
CODE = """
import dataclasses, os, signal, sys, time
from v4train.data import pipeline
from v4train.train import loop

read, tell = pipeline.Pipeline.batch, loop._tell

def batch(self, step):
    found = read(self, step)
    return dataclasses.replace(found, loss_weight=found.loss_weight * float("nan")) if step in BAD else found

def tell_or_die(hooks, step, report):
    found = tell(hooks, step, report)
    if step == DIES_AT:
        time.sleep(3)  # what is being saved in the background is finished
        os.kill(os.getpid(), signal.SIGKILL)
    return found

pipeline.Pipeline.batch, loop._tell = batch, tell_or_die
from v4train.cli import main
sys.exit(main.main(sys.argv[1:]))
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(data, tmp_path_factory):
    """Runs ``v4train train`` in a process of its own, with these batches spoilt; -9 after a step, if asked."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "V4TRAIN_DEBUG")}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(run, *, bad=(), dies_at=None, **guard):
        settings = {"steps": STEPS, "log_every": 1, "eval_every": 3, "guard": {"snapshot_every": 2, **guard}}
        changes = {"model": tiny.values(data, run)["model"] | QUICK, "train": tiny.values(data, run)["train"] | settings}
        changes["optimizer"] = {"schedule": {"peak_lr": 3e-3, "final_lr": 3e-4, "warmup_steps": 2, "decay_steps": 6}}
        changes["checkpoint"] = {"every_steps": 3, "keep": {"kind": "latest", "count": 9}}
        changes["mesh"] = {"expert": 2, "emulate_devices": 2}
        path = tiny.write(run.with_suffix(".yaml"), data, run, **changes)
        code = f"BAD, DIES_AT = {tuple(bad)}, {dies_at}\n{CODE}"
        command = [sys.executable, "-c", code, "train", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
        return done.returncode, done.stdout, done.stderr

    return start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))


def summary(run):
    return json.loads((run / "summary.json").read_text())


def arrays(run, *, step=STEPS):
    recipe = recipe_lib.Recipe.model_validate(json.loads((run / "recipe.json").read_text()))
    state = restore.restore(run / "checkpoints", template=build.parts(recipe).state, step=step).state
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def losses(run):
    """By step; a step that was done twice counts as it was done last."""
    return {r["step"]: r["loss"] for r in record.read(run / "metrics.jsonl") if r["kind"] == "train"}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Batch 3 is bad: step 4. Step 4 is where a snapshot is due, so its report is awaited; back to the state of step 2."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = train(run, bad=[3])
    assert code == 0, err
    return run, out


def test_a_rollback_is_said_recorded_summed_up_and_saved(whole):
    run, out = whole
    (told,) = [r for r in record.read(run / "metrics.jsonl") if r["kind"] == "rollback"]
    assert (told["spike"], told["reason"], told["snapshot"], told["first_batch"], told["last_batch"]) == (4, "not_finite", 2, 2, 3)
    assert "step 4: loss or gradient are not finite; back to the state of step 2, without batches 2 to 3" in out
    assert "1 rollback(s) left out 2 batch(es): 2 to 3 (not finite)" in out
    assert (summary(run)["rollbacks"], summary(run)["skipped_batches"], summary(run)["skipped_steps"]) == ([told], 2, 1)
    by_step = {step: restore.describe(run / "checkpoints", step=step).metadata["guard"] for step in (3, 6, 9, 10)}
    assert by_step[3]["rollbacks"] == []
    assert by_step[6]["rollbacks"] == by_step[10]["rollbacks"] == [told]
    assert [step for step, *_ in by_step[6]["detector"]["accepted"]] == [1, 2, 3, 5, 6]
    assert all(np.isfinite(loss) for step, loss in losses(run).items() if step != 4)


def test_killed_and_resumed_after_a_rollback_it_is_the_same_run(train, whole, tmp_path):
    code, *_ = train(tmp_path / "run", bad=[3], dies_at=8)
    assert code == -9
    code, out, err = train(tmp_path / "run", bad=[3])
    assert code == 0, err
    assert "resumed from step 6" in out
    assert arrays(tmp_path / "run") == arrays(whole[0])
    assert losses(tmp_path / "run") == losses(whole[0])
    assert summary(tmp_path / "run")["rollbacks"] == summary(whole[0])["rollbacks"]


def test_killed_as_the_spike_is_found_the_next_process_finds_it_too(train, tmp_path):
    """It has no older state than the one that it restores."""
    code, *_ = train(tmp_path / "run", bad=[3], dies_at=4)
    assert code == -9
    code, _, err = train(tmp_path / "run", bad=[3])
    assert code == 0, err
    (told,) = summary(tmp_path / "run")["rollbacks"]
    assert (told["snapshot"], told["first_batch"], told["last_batch"]) == (3, 3, 3)


def test_a_run_that_does_not_get_over_it_is_saved_and_says_what_to_do(train, tmp_path):
    run = tmp_path / "run"
    code, _, err = train(run, bad=[3, 6], max_rollbacks=1)
    assert code != 0
    assert "step 7: loss or gradient are not finite, after 1 rollback(s) in the last 1000 steps" in err
    assert "train.guard.anticipate" in err
    assert "The run is saved at step 8" in err
    assert "Traceback" not in err
    assert summary(run)["status"] == "stopped"
    assert len(restore.describe(run / "checkpoints").metadata["guard"]["rollbacks"]) == 2
    code, _, err = train(run, bad=[3, 6], max_rollbacks=1)
    assert code == 0, err
    assert summary(run)["status"] == "finished"
    assert len(summary(run)["rollbacks"]) == 2


def test_anticipation_goes_on_after_a_resume(train, tmp_path):
    run = tmp_path / "run"
    anticipate = {"lag": 1, "calm_steps": 4}
    code, *_ = train(run, bad=[3], dies_at=7, anticipate=anticipate)
    assert code == -9
    code, out, err = train(run, bad=[3], anticipate=anticipate)
    assert code == 0, err
    again = 6 if "resumed from step 6" in out else 4  # a loaded machine may not have finished that save before the kill
    told = [(r["step"], r["on"]) for r in record.read(run / "metrics.jsonl") if r["kind"] == "anticipate"]
    assert told == [(4, 1), (again, 1), (8, 0)]
