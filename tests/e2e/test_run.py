"""The trainer as a person or a scheduler runs it, in processes: kills, signals, reruns. What comes out must not depend on them."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import tiny

STEPS = 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def launch(data, tmp_path_factory):
    """Starts ``v4train train`` on a run directory. All processes share compiled programs."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "V4TRAIN_DEBUG")}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}

    def start(run: pathlib.Path, *overrides: str, slow_steps: float = 0.0, act: str = "") -> subprocess.Popen:
        # 2 devices, so that restoring is onto a mesh; slow steps, so that a signal can hit between two of them.
        changes = {"mesh": {"expert": 2, "emulate_devices": 2}, "train": tiny.values(data, run)["train"] | {"steps": STEPS, "log_every": 1}}
        changes["checkpoint"] = {"every_steps": 3, "keep": {"kind": "latest", "count": 5}}
        path = tiny.write(run.with_suffix(".yaml"), data, run, **changes)
        words = [word for text in overrides for word in ("--set", text)]
        code = f"""
import sys, time
from v4train.train import step
if {slow_steps}:
    from v4train.train import loop
    tell = loop._tell
    loop._tell = lambda *x: (tell(*x), time.sleep({slow_steps}))[0]
{act}
from v4train.cli import main
sys.exit(main.main(sys.argv[1:]))
"""
        command = [sys.executable, "-c", code, "train", str(path), *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)  # compiling takes minutes on a machine that does other work too
    return process.returncode, out, err


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}\n{process.stderr.read()}")


def checkpoints(run: pathlib.Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit())


def arrays(run: pathlib.Path, *, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, on one device: parameters, optimizer, router biases, hash tables, counters."""
    import jax

    from v4train.checkpoint import restore

    described = restore.describe(run / "checkpoints", step=step)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {}
    for name, row in described.table.items():
        *parents, last = name.split("/")
        inner = template
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = jax.ShapeDtypeStruct(row["shape"], row["dtype"], sharding=place)
    found = restore.restore(run / "checkpoints", template=template, step=step).state
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def summary(run: pathlib.Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def train_losses(run: pathlib.Path) -> dict[int, float]:
    """Step -> loss; the last attempt counts."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """The run that nothing happened to: its directory and its last arrays."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(launch(run))
    assert code == 0, err
    assert err == ""
    assert f"finished after {STEPS} steps" in out
    assert checkpoints(run) == [3, 6, 8]
    found = arrays(run)
    kinds = ("params/", "optimizer/", "router/bias", "router/table", "step", "skipped")
    assert all(any(kind in name for name in found) for kind in kinds), sorted(found)
    assert any(found[name].any() for name in found if name.endswith("router/bias"))
    return run, found


def test_kill_minus_nine_twice_loses_nothing(launch, whole, tmp_path):
    run = tmp_path / "run"
    process = launch(run, slow_steps=0.5)
    read_until(process, "step      2/8")
    process.kill()  # before the first checkpoint
    finish(process)
    assert checkpoints(run) == []
    process = launch(run, slow_steps=0.5)
    lines = read_until(process, "step      5/8")
    assert not any("resumed" in line for line in lines)
    process.kill()  # between checkpoints
    finish(process)
    assert checkpoints(run) == [3]
    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert "resumed from step 3 in" in out
    assert_same_bits(arrays(run), whole[1])
    assert train_losses(run) == train_losses(whole[0])
    assert summary(run)["heldout_first"] == summary(whole[0])["heldout_first"]
    assert summary(run)["heldout_last"] == summary(whole[0])["heldout_last"]
    assert summary(run)["status"] == "finished"


def test_a_hook_that_hangs_ends_the_run_with_its_name_and_the_same_command_goes_on(launch, whole, tmp_path):
    hang = """
from v4train.train.hooks import evaluation
losses = evaluation.Evaluation.losses
evaluation.Evaluation.losses = lambda self, *state, **stage: time.sleep(1000) if self._evaluated == 3 else losses(self, *state, **stage)
"""
    run = tmp_path / "run"
    code, out, err = finish(launch(run, "train.stall_seconds=15", act=hang))
    assert code == 1
    told, *stack = err.splitlines()
    assert told.startswith("v4train: the run hangs and is ended (train.stall_seconds: 15): in section 'evaluation' of step 3 for 1")
    assert "evaluation.py" in "".join(stack)
    assert checkpoints(run) == [3]
    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert "resumed from step 3 in" in out
    assert_same_bits(arrays(run), whole[1])


def test_sigterm_saves_and_a_second_process_is_refused_meanwhile(launch, whole, tmp_path):
    run = tmp_path / "run"
    process = launch(run, slow_steps=1.0)
    read_until(process, "step      1/8")
    second = launch(run)
    read_until(process, "step      4/8")
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert time.monotonic() - started < 30
    done = summary(run)["steps"]
    assert summary(run)["status"] == "stopped"
    assert f"stopped after {done} steps" in out
    assert "the same command goes on from here" in out
    assert done in (4, 5, 6)
    assert checkpoints(run)[-1] == done

    code, _, err = finish(second)
    assert code == 2
    assert f"{run} is in use by process {process.pid} on " in err
    assert "Stop that process, or choose another run directory." in err
    assert "Traceback" not in err

    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert f"resumed from step {done} in" in out
    assert_same_bits(arrays(run), whole[1])
    assert train_losses(run) == train_losses(whole[0])


def test_sigterm_before_the_first_step_does_no_harm(launch, whole, tmp_path):
    run = tmp_path / "run"
    process = launch(run)
    read_until(process, "run directory")  # the headline: compilation comes next
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert "stopped after 0 steps" in out
    assert checkpoints(run) == []
    assert summary(run)["heldout_first"] == {}


def test_a_run_that_does_not_end_in_time_says_why(launch, whole, tmp_path):
    run = tmp_path / "run"
    process = launch(run, "train.grace_seconds=0.5", slow_steps=20.0)
    read_until(process, "step      1/8")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 1
    assert "v4train: the run had not ended 0.5 s after SIGTERM (train.grace_seconds) and is ended now; the same command goes on from" in err


def test_reruns_of_a_finished_run(launch, whole, tmp_path):
    """Nothing to do; other settings; more steps from a damaged newest checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    recipe = (run / "recipe.yaml").read_bytes()
    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert out.startswith(f"nothing to do: {run} is finished.")

    code, out, err = finish(launch(run, "model.hidden=64"))
    assert (code, out) == (2, "")
    assert "model.hidden: 32 in the checkpoint, 64 now" in err
    assert "Traceback" not in err
    assert (run / "recipe.yaml").read_bytes() == recipe

    damaged = max((run / "checkpoints" / "step_00000008").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, out, err = finish(launch(run))
    assert code == 0
    assert "the checkpoint of step 8 is damaged and not used:" in out
    assert "resumed from step 6 in" in out
    assert_same_bits(arrays(run), whole[1])

    code, out, err = finish(launch(run, "train.steps=10"))
    assert (code, err) == (0, "")
    assert "resumed from step 8 in" in out
    assert "finished after 10 steps" in out
    assert checkpoints(run)[-1] == 10
    assert sorted(train_losses(run)) == list(range(1, 11))
