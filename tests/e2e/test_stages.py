"""A run through all stages in processes: killed in each of them and around each change, resumed, refused another past; and run twice."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.test_run import arrays, assert_same_bits, checkpoints, finish, read_until, train_losses
from tests.train import tiny
from v4train.cli import main
from v4train.train.hooks import record

STEPS = 12
KINDS = [{"kind": "window"}, {"kind": "csa", "ratio": 4, "index_heads": 2, "index_head_dim": 8, "top_k": 4, "phase": "dense"}]
PHASES = [{"from_step": 2, "sequence_length": 96}, {"from_step": 7, "sequence_length": 128, "batch_rows": 4}]
STAGES = [{"from_step": 4, "attention": "warmup"}, {"from_step": 7, "attention": "sparse"}, {"from_tokens": 5800, "mtp_weight": 0.1}]
"""Dense at 64 and 96 tokens a row, warm-up from step 4, sparse and 128 tokens from step 7, another MTP weight from step 9 on."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))


def environment(cache: pathlib.Path) -> dict[str, str]:
    """All processes share compiled programs."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "V4TRAIN_DEBUG")}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def launch(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def start(run: pathlib.Path, *overrides: str, slow_steps: float = 0.0, stages=STAGES, phases=PHASES) -> subprocess.Popen:
        changes = {
            "model": {"kinds": KINDS, "layers": [{"pattern": ["csa", "window"]}]},
            "data": {"phases": phases},
            "mesh": {"expert": 2, "emulate_devices": 2},
            "train": {"steps": STEPS, "log_every": 1, "stages": stages, "eval_every": 5},
            "checkpoint": {"every_steps": 1, "keep": {"kind": "latest", "count": 20}},
        }
        path = tiny.write(run.with_suffix(".yaml"), data, run, **changes)
        words = [word for text in overrides for word in ("--set", text)]
        code = f"""
import sys, time
if {slow_steps}:
    from v4train.train import loop
    tell = loop._tell
    loop._tell = lambda *x: (tell(*x), time.sleep({slow_steps}))
from v4train.cli import main
sys.exit(main.main(sys.argv[1:]))
"""
        command = [sys.executable, "-c", code, "train", str(path), *words]
        return subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """The run that nothing happened to: its directory, its last arrays and what it printed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    return run, arrays(run, step=STEPS), out


def evaluations(run: pathlib.Path) -> dict[tuple, float]:
    """(step, attention) -> held-out loss of the text; the last attempt counts."""
    found = [r for r in record.read(run / "metrics.jsonl") if r["kind"] == "eval"]
    return {(r["step"], r["attention"]): r["loss/text"] for r in found}


def test_each_change_is_compiled_once_said_and_recorded(whole):
    lines = [line for line in whole[2].splitlines() if "from here on" in line]
    assert [line.partition("; compiled in ")[0] for line in lines] == [
        "step      2  from here on 8 rows of 96 tokens a step",
        "step      4  from here on warmup attention (only the indexer learns)",
        "step      7  from here on 4 rows of 128 tokens a step, sparse attention",
        "step      9  from here on MTP weight 0.1",
    ]
    assert all("; compiled in " in line for line in lines)
    changes = [r for r in record.read(whole[0] / "metrics.jsonl") if r["kind"] == "change"]
    said = [line.partition("from here on ")[2].partition("; compiled in ")[0] for line in lines]
    assert [(r["step"], r["what"]) for r in changes] == list(zip((2, 4, 7, 9), said, strict=True))
    assert [(r["rows"], r["sequence_length"], r["attention"], r["mtp_weight"]) for r in changes[2:]] == [
        (4, 128, "sparse", 0.3),
        (4, 128, "sparse", 0.1),
    ]


def test_what_a_stage_does_shows_in_the_records(whole):
    steps = {r["step"]: r for r in record.read(whole[0] / "metrics.jsonl") if r["kind"] == "train"}
    warm = [step for step, r in steps.items() if r["index_recall"] is not None]
    assert warm == [5, 6, 7], "the steps that the stage made, counted from 1"
    assert all(0 < steps[step]["index_recall"] < steps[step]["index_recall_possible"] < 1 for step in warm)
    assert [step for step, r in steps.items() if r["loss/indexer"] == 0] == [1, 2, 3, 4]
    assert (steps[8]["tokens"], steps[9]["tokens"]) == (5376, 2 * 512 + 5 * 768 + 2 * 512), "the last stage begins after 5,800 tokens"
    by_attention = evaluations(whole[0])
    assert list(by_attention) == [(0, "dense"), (5, "dense"), (7, "dense"), (7, "sparse"), (10, "sparse"), (12, "sparse")]
    assert by_attention[5, "dense"] == by_attention[7, "dense"], "nothing but the indexer moved in the warm-up"
    assert by_attention[7, "dense"] != by_attention[7, "sparse"]


def test_the_bench_finds_the_changes_and_compares_what_it_says(whole, capsys):
    """Around a change: means of the recorded losses. On one state: the trainer's own records of both models, on the same rows."""
    assert main.main(["bench", "curriculum", str(whole[0]), "--around", "3", "--tokens", "512", "--limit", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = [np.mean([r["loss/text"], r["loss/media"]]) for r in record.read(whole[0] / "metrics.jsonl") if r["kind"] == "train"]
    assert [(c["step"], c["steps"]) for c in found["changes"]] == [(2, 2), (4, 2), (7, 2), (9, 2)]
    for change in found["changes"]:
        at = change["step"]
        assert change["training"] == pytest.approx(np.mean(text[at : at + 2]) / np.mean(text[at - 2 : at]) - 1, abs=2e-4)
    longer, warm, sparse, weight = found["changes"]
    assert (warm["same_state"], weight["same_state"]) == (None, None)
    assert longer["heldout_before"] != longer["heldout_after"]
    assert sparse["heldout_before"] != sparse["heldout_after"]
    assert found["largest_rise"] == max(x for c in found["changes"] for x in (c["training"], c["same_state"]) if x is not None)
    assert found["indexer"]["steps"] == 3
    assert main.main(["bench", "curriculum", str(whole[0] / "checkpoints")]) == 2
    assert "is no run directory: recipe.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("kills", [(1, 3, 6, 10), (2, 4, 7, 9), (5, 8)], ids=["within", "at", "between"])
def test_kill_minus_nine_in_each_stage_and_around_each_change_loses_nothing(launch, whole, tmp_path, kills):
    run = tmp_path / "run"
    for at in kills:
        process = launch(run, slow_steps=0.4)
        read_until(process, f"step {at:>6}/{STEPS}")
        process.kill()
        finish(process)
        assert set(checkpoints(run)[-1:]) <= {at - 2, at - 1, at, at + 1}, "a save may not be finished when the process dies"
    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert "resumed from step " in out
    assert_same_bits(arrays(run, step=STEPS), whole[1])
    assert train_losses(run) == train_losses(whole[0])
    assert evaluations(run) == evaluations(whole[0])


def test_stages_may_be_appended_and_the_past_may_not_change(launch, whole, tmp_path):
    run = tmp_path / "run"
    process = launch(run, slow_steps=0.4, stages=STAGES[:1], phases=PHASES[:1])
    read_until(process, f"step      5/{STEPS}")
    process.terminate()
    assert finish(process)[0] == 0
    assert checkpoints(run)[-1] in (5, 6, 7), "what comes at step 7 is still to be said"

    code, out, err = finish(launch(run, stages=[{"from_step": 3, "attention": "warmup"}, *STAGES[1:]]))
    assert (code, out) == (2, "")
    assert "the stages are not those that this run has gone through so far:\n" in err
    assert "\n  steps 3 to 4: attention dense in the checkpoint, warmup now\n" in err
    assert "What comes later may change: append to train.stages. Continue with the settings of" in err
    assert "Traceback" not in err
    code, _, err = finish(launch(run, "model.mtp.loss_weight=0.2"))
    assert code == 2
    assert "model.mtp.loss_weight: 0.3 in the checkpoint, 0.2 now" in err

    code, out, err = finish(launch(run))
    assert (code, err) == (0, "")
    assert "resumed from step " in out
    assert_same_bits(arrays(run, step=STEPS), whole[1])
