"""The guard among several processes: they judge alike, go back to the same state without a message, and train what one process trains.

One run has both faults::

    batch 5    gradient times 10,000; step 6 is awaited because a snapshot is due after it    back to step 4, without 4 and 5
    batch 10   loss weights are not numbers; step 12 is started by the time step 11 is known  back to step 8, without 8 to 11
"""

import json
import pathlib
import signal
import subprocess

import numpy as np
import pytest

from tests.e2e import test_cluster as cluster
from tests.e2e.test_run import arrays, assert_same_bits, summary, train_losses
from tests.train import tiny
from v4train.checkpoint import restore

STEPS = 14
# One layer with a learned router: what a program of these costs is its compilation.
MODEL = cluster.MODEL | {"layers": [{"pattern": ["window"]}], "moe": {"experts": 4, "top_k": 2, "ffn": 16, "hash_layers": 0}}
GUARD = {"least": 3, "snapshot_every": 2}
pytestmark = pytest.mark.slow

place, start = cluster.place, cluster.start

# What each process does before it is the trainer's: the faults, and a line in a file of its own for each time that it goes back.
FAULTS = """
import dataclasses, json, pathlib, time
import jax, jax.numpy as jnp
from v4train.data import pipeline
from v4train.train import guard, step
read, gradients, go_back = pipeline.Pipeline.batch, step.Step.gradients, guard.Guard._go_back

def batch(self, number):
    found = read(self, number)
    factor = {5: 1e4, 10: float("nan")}.get(number, 1.0)
    return dataclasses.replace(found, loss_weight=found.loss_weight * factor)

def amplified(self, state, batch, given, counts):
    loss, sums, grads, probes = gradients(self, state, batch, given, counts)
    return loss, sums, jax.tree.map(lambda x: x * jnp.max(batch.loss_weight).astype(x.dtype), grads), probes

def noted(self, spike, state, started):
    state = go_back(self, spike, state, started)
    with open(f"{NOTES}.{process}", "a") as file:
        file.write(json.dumps(self.rollbacks[-1]) + "\\n")
    return state

pipeline.Pipeline.batch, step.Step.gradients, guard.Guard._go_back = batch, amplified, noted
"""

# Process 1 dies before it hears of the spike of step 11, and process 0 after the step that follows the rollback, each time when the
# checkpoint from before is finished.
KILLS = """
import os
def on_step(n):
    number, saved = {11: (1, 8), 13: (0, 12)}.get(n, (None, None))
    marker = pathlib.Path(f"{NOTES}.killed{n}")
    if process == number and not marker.exists():
        while not (RUN / "checkpoints" / f"step_{saved:08d}").exists():
            time.sleep(0.05)
        marker.touch()
        os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def recipe(place):
    """Writes the recipe for a run directory: two devices, whatever the number of processes."""

    def write(run: pathlib.Path) -> pathlib.Path:
        train = tiny.values(place[0], run)["train"] | {"steps": STEPS, "log_every": 1, "eval_every": None, "guard": GUARD}
        mesh, keep = {"expert": 2, "emulate_devices": 2}, {"every_steps": 4, "keep": {"kind": "latest", "count": 9}}
        return tiny.write(run.with_suffix(".yaml"), place[0] / "data", run, train=train, mesh=mesh, checkpoint=keep, model=MODEL)

    return write


def act(run: pathlib.Path, *more: str) -> str:
    return "\n".join([f"NOTES = {str(run)!r}", FAULTS, f"RUN = pathlib.Path({str(run)!r})", *more])


def noted(run: pathlib.Path, process: int) -> list[dict]:
    """Each time that this process went back."""
    path = pathlib.Path(f"{run}.{process}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def alone(place, recipe):
    """The run in one process, and what it said."""
    run = place[0] / "alone"
    words = [place[1]["V4TRAIN_PYTHON"], "-m", "v4train.train", "--config", recipe(run)]
    done = subprocess.run(words, env=place[1] | {"ACT": act(run)}, cwd=cluster.PROJECT, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    return run, done.stdout


@pytest.fixture
def together(place, recipe, start):
    """The run in two processes, and what both said."""
    run = place[0] / "together"
    if not run.exists():
        ended = [cluster.finish(process) for process in cluster.each(place, start, 2, recipe(run), act=act(run))]
        assert [(code, err) for code, _, err in ended] == [(0, "")] * 2
        (run / "said.json").write_text(json.dumps([out for _, out, _ in ended]))
    return run, json.loads((run / "said.json").read_text())


def test_two_processes_go_back_alike_and_as_one_process_does(alone, together):
    (run, (told, silence)), (expected, said) = together, alone
    rollbacks = summary(expected)["rollbacks"]
    found = [(r["spike"], r["reason"], r["snapshot"], r["first_batch"], r["last_batch"]) for r in rollbacks]
    assert found == [(6, "gradient", 4, 4, 5), (11, "not_finite", 8, 8, 11)]
    assert noted(expected, 0) == rollbacks
    assert noted(run, 0) == noted(run, 1) == summary(run)["rollbacks"], "the processes judge alike"
    for mine, theirs in zip(summary(run)["rollbacks"], rollbacks, strict=True):
        numbers = [{name: told.pop(name) or 0.0 for name in ("value", "limit", "median")} for told in (mine, theirs)]
        assert mine == theirs
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert (summary(run)["skipped_batches"], summary(run)["skipped_steps"]) == (6, 1)
    losses, known = train_losses(run), train_losses(expected)
    good = [step for step in range(1, STEPS + 1) if step != 11]
    np.testing.assert_allclose([losses[step] for step in good], [known[step] for step in good], rtol=1e-5)
    assert losses[11] is None
    assert losses[STEPS] < losses[1]
    assert silence == "", "only the first process speaks"
    for line in ("back to the state of step 8, without batches 8 to 11", "2 rollback(s) left out"):
        assert told.count(line) == said.count(line) >= 1


def test_killed_on_either_side_of_the_rollback_and_resumed_it_is_the_same_run(place, recipe, start, together):
    """kill -9, twice, and the launcher's restarts. What a process remembers of spikes comes from the checkpoint in both of them."""
    run = place[0] / "killed"
    command = cluster.local(start, 2, recipe(run), "--restarts", "2", act=act(run, KILLS, cluster.ON_STEP))
    code, out, err = cluster.finish(command)
    assert code == 0, err
    assert [pathlib.Path(f"{run}.killed{step}").exists() for step in (11, 13)] == [True, True]
    assert err.count(f"was ended by signal {int(signal.SIGKILL)}") == 2
    assert [out.count(f"resumed from step {step} in") for step in (8, 12)] == [1, 1]
    whole = together[0]
    assert summary(run)["rollbacks"] == summary(whole)["rollbacks"]
    assert noted(run, 1) == summary(whole)["rollbacks"], "process 1 went back once for each spike, in whichever life"
    assert train_losses(run) == train_losses(whole)
    assert_same_bits(arrays(run, step=STEPS), arrays(whole, step=STEPS))
    guards = [restore.describe(x / "checkpoints", step=STEPS).metadata["guard"] for x in (run, whole)]
    assert guards[0] == guards[1]
