"""The trainer in several processes, as launchers start them: the same results whatever their number, and what happens when one is killed,
told to stop, or fails. CPU collectives through gloo; 8 emulated devices in all, so expert exchange and gradients cross processes."""

import json
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.e2e.test_run import arrays, assert_same_bits, checkpoints, read_until, summary, train_losses
from tests.train import tiny

PROJECT = pathlib.Path(__file__).parents[2]
STEPS = 6
pytestmark = pytest.mark.slow  # each start of a process takes some 7 s of import, tracing and compilation

# One layer, so that it compiles soon; hash routing in the first, learned routing in the second.
MODEL = {"kinds": [{"kind": "window"}], "layers": [{"pattern": ["window"], "repeat": 2}], "mtp": None}
SPARSE = {"mtp": None}
"""With the layers of `tiny`, one HCA and one CSA with its indexer."""

# Stands in for the interpreter: before the trainer's process begins it does what $ACT says, where `process` is its number.
INTERPRETER = """#!{python}
import os, runpy, sys
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
sys.argv = sys.argv[2:]
if "--dry-run" not in sys.argv:
    process = int(sys.argv[sys.argv.index("--process") + 1] if "--process" in sys.argv else os.environ.get("SLURM_PROCID", 0))
    exec(os.environ.get("ACT", ""))
runpy.run_module("v4train.train", run_name="__main__", alter_sys=True)
"""

# Calls on_step(n) when the n-th step is done, in the main thread.
ON_STEP = """
from v4train.train import loop
tell = loop._tell
def watched(hooks, step, report):
    found = tell(hooks, step, report)
    on_step(step)
    return found
loop._tell = watched
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, an interpreter, and the environment of all processes; they share compiled programs."""
    root = tmp_path_factory.mktemp("cluster")
    tiny.stores(root / "data")
    interpreter = root / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable))
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "V4TRAIN_DEBUG")}
    cache = PROJECT / ".jax_cache" / "processes"
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # On a busy machine XLA complains of slow compilation.
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment |= {"V4TRAIN_PYTHON": str(interpreter), "PYTHONUNBUFFERED": "1", "V4TRAIN_HOME": str(PROJECT)}
    return root, environment


@pytest.fixture(scope="module")
def recipe(place):
    """Writes a recipe for a run directory."""
    root, _ = place

    def write(run: pathlib.Path, **changes) -> pathlib.Path:
        train = tiny.values(root, run)["train"] | {"steps": STEPS, "log_every": 1, "eval_every": None} | changes.pop("train", {})
        base = {"mesh": {"expert": 4, "fsdp": 2, "emulate_devices": 8}, "checkpoint": {"every_steps": 2}, "model": MODEL}
        return tiny.write(run.with_suffix(".yaml"), root / "data", run, **base | changes, train=train)

    return write


@pytest.fixture
def start(place):
    """Starts a command; kills what is left of it."""
    started = []

    def run(*words: str, act: str = "", **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [str(word) for word in words],
            env=place[1] | {"ACT": act} | environment,
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def each(place, start, count: int, recipe: pathlib.Path, *options: str, act: str = "", port: int | None = None) -> list[subprocess.Popen]:
    """The processes of a run, one by one."""
    python, port = place[1]["V4TRAIN_PYTHON"], port or free_port()
    words = [python, "-m", "v4train.train", "--config", recipe, *options]
    where = ["--coordinator", f"127.0.0.1:{port}", "--processes", count]
    return [start(*words, *where, "--process", i, act=act) for i in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def local(start, count: int, recipe: pathlib.Path, *options: str, act: str = "") -> subprocess.Popen:
    return start(PROJECT / "scripts" / "launch_local.sh", count, recipe, *options, act=act)


@pytest.fixture(scope="module")
def whole(place, recipe):
    """By number of processes: the directory of a run that nothing happened to."""
    runs = {}
    for count in (1, 2, 4):
        run = runs[count] = place[0] / f"whole{count}"
        words = [PROJECT / "scripts" / "launch_local.sh", str(count), recipe(run)]
        done = subprocess.run(words, env=place[1], cwd=PROJECT, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\nstep ") == STEPS + 2, "only one process speaks, and once"
        assert f"finished after {STEPS} steps" in done.stdout
    return runs


def records(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_number_of_processes_changes_nothing(whole):
    expected = [r for r in records(whole[1]) if r["kind"] == "train"]
    final = arrays(whole[1], step=STEPS)
    for count in (2, 4):
        found = [r for r in records(whole[count]) if r["kind"] == "train"]
        assert [r["step"] for r in found] == list(range(1, STEPS + 1))
        assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)
        np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
        assert [r["tokens"] for r in found] == [r["tokens"] for r in expected]
        for kind in ("heldout_first", "heldout_last"):
            assert summary(whole[count])[kind] == pytest.approx(summary(whole[1])[kind], rel=1e-5)
        mine = arrays(whole[count], step=STEPS)
        assert mine.keys() == final.keys()
        for name, value in final.items():
            if "router/table" in name or name in ("step", "skipped"):
                np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert expected[-1]["loss"] < expected[0]["loss"]


SRUN = """#!/bin/bash
# A Slurm of two nodes on this machine: nodes are called localhost, and there is one task on each.
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for i in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2 SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=0 "$@" &
done
code=0
for pid in $(jobs -p); do
  wait $pid; ended=$?
  while kill -0 $pid 2>/dev/null; do wait $pid; ended=$?; done
  ((ended > code)) && code=$ended
done
exit $code
"""


def test_slurm_stops_at_a_signal_then_a_killed_process_is_replaced_and_nothing_is_lost(place, recipe, whole, start, tmp_path):
    """SIGTERM to one process of two, by way of the launcher for Slurm; then kill -9 to one, and the local launcher's restart."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n'}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    run = tmp_path / "run"
    path = recipe(run)
    slow = f"""
import signal, time
def on_step(step):
    time.sleep(0.3)
    if step == 2 and process == 1:
        signal.raise_signal(signal.SIGTERM)
{ON_STEP}"""
    slurm = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": str(40_000 + os.getpid() % 20_000)}
    code, out, err = finish(start(PROJECT / "scripts" / "launch_slurm.sh", path, act=slow, **slurm))
    assert (code, err) == (75, ""), out
    done = summary(run)["steps"]
    assert summary(run)["status"] == "stopped"
    assert 2 <= done < STEPS
    assert f"stopped after {done} steps" in out
    assert checkpoints(run)[-1] == done
    assert "2 processes" in out
    assert (tmp_path / "scontrol").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert (tmp_path / "run" / "recipe.yaml").read_text().count("process: null") == 1

    kill = f"""
import os, pathlib, time
marker = pathlib.Path({str(tmp_path / "killed")!r})
def on_step(step):
    if step == {STEPS - 1} and process == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
{ON_STEP}"""
    code, out, err = finish(local(start, 2, path, "--restarts", "1", act=kill))
    assert code == 0, err
    assert f"resumed from step {done} in" in out
    assert "launch_local.sh: process 1 was ended by signal 9" in err
    [lost] = [line for line in err.splitlines() if line.startswith("v4train: ")]
    assert lost.startswith(f"v4train: host 1 ({socket.gethostname()}, process id ")
    assert "is gone without a word, and all 2 hosts stop" in lost
    assert "launch_local.sh: exit code" in err
    assert f"finished after {STEPS} steps" in out
    assert train_losses(run) == train_losses(whole[2])
    assert_same_bits(arrays(run, step=STEPS), arrays(whole[2], step=STEPS))


def test_fewer_devices_and_processes_go_on_where_more_have_been(place, recipe, whole, start, tmp_path):
    """From 2 processes with 8 devices to 1 with 4."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole[2], run], check=True)
    mesh = {"expert": 2, "fsdp": 2, "emulate_devices": 4}
    subprocess.run(["rm", "-r", run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000004"], check=True)
    path = recipe(run, mesh=mesh)
    code, out, err = finish(start(place[1]["V4TRAIN_PYTHON"], "-m", "v4train.train", "--config", path))
    assert (code, err) == (0, ""), out
    assert "resumed from step 2 in" in out
    expected, found = train_losses(whole[2]), train_losses(run)
    np.testing.assert_allclose([found[i] for i in range(3, STEPS + 1)], [expected[i] for i in range(3, STEPS + 1)], rtol=1e-5)


def test_an_exception_on_one_host_ends_all_with_its_cause_on_top(place, recipe, start, tmp_path):
    run = tmp_path / "run"
    fail = f"def on_step(step):\n    if step == 2 and process == 1: raise RuntimeError('the sky fell')\n{ON_STEP}"
    processes = each(place, start, 2, recipe(run), act=fail)
    read_until(processes[0], "step      1/6")
    started = time.monotonic()
    (code, _, err), *others = [finish(process) for process in processes]
    assert time.monotonic() - started < 60
    assert [code, *(c for c, _, _ in others)] == [1, 1]
    lines = err.splitlines()
    assert lines[0].startswith(f"v4train: host 1 ({socket.gethostname()}, process id ")
    assert lines[0].endswith("failed, and all 2 hosts stop:")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "RuntimeError: the sky fell"
    assert [(out, text) for _, out, text in others] == [("", "")]


def test_a_process_that_hangs_is_named_and_all_end(place, recipe, start, tmp_path):
    """The other one waits for it in a collective, which would never end."""
    run = tmp_path / "run"
    hang = """
import time
from v4train.data import pipeline
iterate = pipeline.Pipeline.iterate
def hanging(self, start):
    for i, batch in enumerate(iterate(self, start)):
        if i == 3 and process == 1: time.sleep(1000)
        yield batch
pipeline.Pipeline.iterate = hanging
"""
    processes = each(place, start, 2, recipe(run, train={"stall_seconds": 20}), act=hang)
    (code, out, err), other = [finish(process) for process in processes]
    assert (code, other) == (1, (1, "", ""))
    assert "step      2/6" in out
    assert "step      4/6" not in out
    names = [f"host {i} ({socket.gethostname()}, process id {process.pid})" for i, process in enumerate(processes)]
    told, waiting, *stack = err.splitlines()
    assert told.startswith(f"v4train: {names[1]} hangs, and all 2 hosts stop (train.stall_seconds: 20): in section 'data' of step 4 for 2")
    assert re.fullmatch(re.escape(f"waiting for it: {names[0]} in section ") + r"'(step|save)' of step [34] for \d+ s", waiting)
    assert "in hanging" in stack[-1]
    assert checkpoints(run)[:1] == [2]


def test_context_and_tensor_groups_may_span_processes(place, recipe, start, tmp_path):
    """Processes that share rows: each of two holds a half of every sequence. Here compressed entries, index keys and blocks that straddle a
    border cross from one process to the other, so the layers are sparse ones."""
    losses = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        code, out, err = finish(local(start, count, recipe(run, model=SPARSE, mesh={"context": 4, "tensor": 2, "emulate_devices": 8})))
        assert (code, err) == (0, ""), out
        losses.append(list(train_losses(run).values()))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
