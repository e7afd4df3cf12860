"""A run in this process: the order of the loop's acts, what the hooks write, and the answer to a second call."""

import dataclasses
import io
import json
import re
import time
import types

import jax
import numpy as np
import pytest

from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.data import pipeline
from v4train.train import build, loop, resilience
from v4train.train import run as run_lib
from v4train.train.hooks import metrics, quarantine, record


def train(data, directory, *overrides):
    """Trains the tiny recipe in this process."""
    path = tiny.write(directory.with_suffix(".yaml"), data, directory)
    return run_lib.run(recipe_lib.resolve(str(path), overrides=overrides), program_started=time.time())


@dataclasses.dataclass
class Finished:
    directory: object
    outcome: run_lib.Outcome
    out: str
    records: list

    def of_kind(self, kind):
        return [r for r in self.records if r["kind"] == kind]


@pytest.fixture(scope="module")
def programs():
    """Compiled once for all runs of this module: they differ in nothing that is compiled."""
    compiled = []

    def compile_once(parts, *, first_step, original=build.compile_program):
        if not compiled:
            compiled.append(original(parts, first_step=first_step))
        return compiled[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_program", compile_once)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory, programs):
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        outcome = train(data, directory)
    return Finished(directory, outcome, out.getvalue(), record.read(directory / "metrics.jsonl"))


def test_the_order_of_acts():
    acts = []

    class Watch:
        def __init__(self, name):
            self.name = name

        def before(self, step, state):
            acts.append(f"{self.name} before {step} {state}")

        def after(self, step, report):
            acts.append(f"{self.name} after {step} {report}")

    def step(state, batch, *, variant):
        acts.append(f"step {state} {batch}")
        return state + 1, np.asarray(state)

    parts = types.SimpleNamespace(
        recipe=types.SimpleNamespace(train=types.SimpleNamespace(steps=5)),
        data=types.SimpleNamespace(iterate=lambda start: iter(f"b{i}" for i in range(start, 99))),
        place=lambda batch: batch,
        variant_at=lambda step: None,
    )
    program = types.SimpleNamespace(step=step)
    assert loop.run(parts, program, 3, start=3, hooks=[Watch("x"), Watch("y")], stop=lambda done: False) == (5, 5)
    assert acts == [
        *("x before 3 3", "y before 3 3", "step 3 b3"),
        *("x before 4 4", "y before 4 4", "step 4 b4"),
        *("x after 4 3", "y after 4 3"),  # the previous report, while the devices are at the next step
        *("x after 5 4", "y after 5 4"),
        *("x before 5 5", "y before 5 5"),
    ]
    acts.clear()
    stops = iter([False, True])
    assert loop.run(parts, program, 3, start=3, hooks=[Watch("x")], stop=lambda done: next(stops)) == (4, 4)
    assert acts == ["x before 3 3", "step 3 b3", "x after 4 3"]  # the next process evaluates where this one stopped
    acts.clear()
    assert loop.run(parts, program, 3, start=3, hooks=[Watch("x")], stop=lambda done: True) == (3, 3)
    assert acts == []


def test_evaluations_at_the_start_every_and_at_the_end(finished):
    evals = finished.of_kind("eval")
    assert [r["step"] for r in evals] == [0, 3, 6]
    assert all({"loss/text", "loss/media"} < set(r) and r["tokens"] == 512 * r["step"] for r in evals)
    assert evals[-1]["loss/text"] < evals[0]["loss/text"]


def test_train_records(finished):
    lines = finished.of_kind("train")
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "loss/text", "loss/media", "loss/mtp", "loss/indexer", "loss/balance", "learning_rate", "grad_norm"}
    assert all(wanted | {"tokens", "seconds", "tokens_per_second", "step_seconds", "mfu", "skipped"} < set(r) for r in lines)
    # Warm-up of 2, then flat, cosine over the last 2.
    np.testing.assert_allclose([r["learning_rate"] for r in lines], [1.5e-3, 3e-3, 3e-3, 3e-3, 1.65e-3, 3e-4], rtol=1e-5)
    seconds = [r["seconds"] for r in lines]
    assert seconds == sorted(seconds)
    assert all(r["tokens_per_second"] == pytest.approx(512 / r["step_seconds"]) for r in lines)
    assert {r["skipped"] for r in lines} == {0}


def test_experts_records(finished):
    lines = finished.of_kind("experts")
    assert [r["step"] for r in lines] == [2, 4, 6]
    assert lines[0]["layers"] == ["0 hca hash", "1 csa", "mtp"]
    assert set(lines[0]["load"]) == {"all", "text", "image", "audio"}
    for load in lines[0]["load"].values():
        np.testing.assert_allclose(np.mean(load, axis=1), 1, atol=1e-3)
        assert np.shape(load) == (3, 8)


def test_relative_load_is_a_multiple_of_the_uniform_share():
    load = np.zeros((2, 3, 4))
    load[0, 0], load[0, 2], load[1, 0] = [2, 4, 6, 8], [0, 0, 0, 12], [5, 5, 5, 5]
    assert metrics.relative_load(load) == {
        "all": [[0.25, 0.5, 0.75, 2.5], [1, 1, 1, 1]],
        "text": [[0.4, 0.8, 1.2, 1.6], [1, 1, 1, 1]],
        "audio": [[0, 0, 0, 4], [0, 0, 0, 0]],
    }


def test_tensorboard_has_the_scalars(finished):
    files = list((finished.directory / "tensorboard").glob("events.*"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert all(tag in content for tag in (b"train/loss/text", b"train/grad_norm", b"eval/loss/media", b"train/learning_rate"))


def test_the_summary(finished):
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert summary == finished.outcome.summary
    assert finished.outcome.signal is None
    evals = finished.of_kind("eval")
    for name, r in (("heldout_first", evals[0]), ("heldout_last", evals[-1])):
        assert summary[name] == {"text": r["loss/text"], "media": r["loss/media"]}
    plain = {k: summary[k] for k in ("status", "steps", "tokens", "skipped_steps", "bad_records", "checkpoint_error")}
    assert plain == {"status": "finished", "steps": 6, "tokens": 3072, "skipped_steps": 0, "bad_records": 0, "checkpoint_error": None}
    assert summary["seconds"] == pytest.approx(finished.of_kind("train")[-1]["seconds"], abs=1e-3)
    assert 0 < summary["first_step_seconds"] < 600
    assert summary["peak_memory_bytes"] > 2**26
    assert summary["parameters_total"] > summary["parameters_active"] > 10_000


def test_what_a_person_sees_in_a_pipe(finished):
    lines = finished.out.splitlines()
    assert lines[0].startswith("tiny: ")
    assert "2 layers; mesh one device on 1 cpu device(s); 6 steps of 512 tokens; run directory" in lines[0]
    shape = r"step +(\d+)/6  loss \d\.\d{3}  [\d,]+ tok/s(  \w+ left)?  grad norm \d+\.\d\d  lr \d\.\d\de-0\d"
    assert [int(m[1]) for line in lines if (m := re.fullmatch(shape, line))] == [1, 2, 4, 6]
    assert len([line for line in lines if re.fullmatch(r"step +[036]  held-out loss: text \d\.\d{3}  media \d\.\d{3}", line)]) == 3
    assert any(line.startswith("finished after 6 steps, 3,072 tokens, ") for line in lines)
    assert lines[-1].endswith(f"results in {finished.directory}; look at them: v4train report {finished.directory}")
    assert sorted(p.name for p in finished.directory.iterdir()) == [
        *(".lock", "checkpoints", "metrics.jsonl", "recipe.json", "recipe.yaml", "summary.json", "tensorboard")
    ]
    assert [p.name for p in sorted((finished.directory / "checkpoints").glob("step*"))] == [f"step_0000000{i}" for i in (2, 4, 6)]


def test_a_finished_run_is_not_trained_again(finished, data, capsys):
    before = (finished.directory / "metrics.jsonl").read_bytes()
    started = time.perf_counter()
    outcome = train(data, finished.directory)
    assert time.perf_counter() - started < 10
    assert outcome.summary == finished.outcome.summary
    assert (finished.directory / "metrics.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert out.startswith(f"nothing to do: {finished.directory} is finished.\nfinished after 6 steps")
    assert out.endswith("To train longer raise train.steps; to begin anew use another train.run_directory.\n")


def test_fewer_steps_than_done_are_refused(finished, data):
    with pytest.raises(ValueError, match=r"train\.steps: 4, but .* has already done 6 steps\. To train longer raise train\.steps"):
        train(data, finished.directory, "train.steps=4")


def test_another_recipe_is_refused_with_path_and_values(finished, data):
    with pytest.raises(ValueError, match="holds checkpoints of another recipe") as caught:
        train(data, finished.directory, "model.norm_eps=1e-5", "optimizer.schedule.peak_lr=1e-3", "train.log_every=5")
    text = str(caught.value)
    assert (
        "  model.norm_eps: 1e-06 in the checkpoint, 1e-05 now\n  optimizer.schedule.peak_lr: 0.003 in the checkpoint, 0.001 now\n" in text
    )
    assert "recipe.yaml, or train in another directory (train.run_directory)." in text


def test_what_another_machine_needs_may_change(finished, data, capsys):
    """Fewer devices: a smaller mesh, more microbatches on it, and other room for routed tokens."""
    train(
        data,
        finished.directory,
        "train.microbatches=2",
        "model.moe.exchange.transport=padded",
        "model.moe.exchange.capacity=2",
        "model.moe.exchange.waves=2",
        "train.stall_seconds=1000",
    )
    assert capsys.readouterr().out.startswith("nothing to do")


def test_other_data_are_refused(finished, tmp_path):
    other = tiny.stores(tmp_path / "stores")
    tiny.synthetic.make_test_store(tmp_path / "more", documents=50, seed=9)
    (other / "text").rename(tmp_path / "away")
    (tmp_path / "more").rename(other / "text")
    with pytest.raises(ValueError, match=r"trained on so far:\n  data source 'text': its store is not the one that was read\nWhat"):
        train(other, finished.directory)


def test_the_same_data_may_have_moved(finished, tmp_path, capsys):
    train(tiny.stores(tmp_path / "stores"), finished.directory)
    assert capsys.readouterr().out.startswith("nothing to do")


def test_a_resumed_run_goes_on_counting(finished, data, programs, capsys):
    """More steps: the clock, the records and the first evaluation are those of the whole run."""
    with (finished.directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "los')  # killed while writing
    outcome = train(data, finished.directory, "train.steps=8", "optimizer.schedule.decay_steps=2")
    records = record.read(finished.directory / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert outcome.summary["heldout_first"] == finished.outcome.summary["heldout_first"]
    assert outcome.summary["heldout_last"] != finished.outcome.summary["heldout_last"]
    assert outcome.summary["seconds"] > finished.outcome.summary["seconds"]
    assert outcome.summary["steps"] == 8
    out = capsys.readouterr().out
    assert f"resumed from step 6 in {finished.directory / 'checkpoints'}\n" in out


def test_a_checkpoint_keeps_what_was_counted(data, tmp_path, programs, monkeypatch):
    """The milestones of the step that it is of come back to the pipeline of the run that goes on."""
    told = []
    monkeypatch.setattr(pipeline.Pipeline, "milestones", lambda self, step: {"of this plan": [step, 2, 1]})
    monkeypatch.setattr(pipeline.Pipeline, "remember", lambda self, milestones: told.append(milestones))
    for steps in (2, 3):
        train(data, tmp_path / "run", f"train.steps={steps}", "optimizer.schedule.decay_steps=1", "optimizer.schedule.warmup_steps=1")
    assert told == [{"of this plan": [2, 2, 1]}]


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("until", [4, 6])
def test_a_full_disk_does_not_end_the_training(data, tmp_path, programs, monkeypatch, capsys, until):
    from v4train.checkpoint import integrity

    original, saves = integrity.write_manifest, []

    def write(directory, **kwargs):
        saves.append(directory.name)
        full = (len(saves) == 2) if until == 4 else (len(saves) >= 2)
        return full_disk() if full else original(directory, **kwargs)

    monkeypatch.setattr(integrity, "write_manifest", write)
    outcome = train(data, tmp_path / "run")
    assert outcome.summary["steps"] == 6
    out = capsys.readouterr().out
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step*"))
    if until == 4:
        assert steps == ["step_00000002", "step_00000006"]
        assert outcome.summary["checkpoint_error"] is None
        assert "WARNING" not in out
    else:
        assert steps == ["step_00000002"]
        warning = "WARNING: the last checkpoint could not be saved: the checkpoint of step 6 was not written to"
        assert warning in out
        assert "the disk is full (free some space" in out.split("WARNING")[1]
        assert "the newest finished one is step 2" in out


def test_unreadable_documents_are_written_down(data, tmp_path, programs, monkeypatch, capsys):
    from v4train.data import document, store

    original = store.TokenStore.read

    def read(self, i):
        if i == 7 and "text" in str(self.path):
            raise document.DamagedRecordError("checksum mismatch")
        return original(self, i)

    monkeypatch.setattr(store.TokenStore, "read", read)
    outcome = train(data, tmp_path / "run")
    lines = record.read(tmp_path / "run" / "quarantine.jsonl")
    assert lines == [{"source": "text", "document": 7, "where": "shard-00000.array_record, record 7", "error": "checksum mismatch"}]
    assert outcome.summary["bad_records"] == 1
    assert f"1 document(s) were unreadable and became padding: {tmp_path / 'run' / 'quarantine.jsonl'}" in capsys.readouterr().out


def watch(**changes):
    """Of the bad documents of a run."""
    values = {"max_bad_share": 0.01, "bad_window": 1000, "bad_minimum": 3}
    return types.SimpleNamespace(**(values | changes))


def watched(tmp_path, counts, **changes):
    """The step at which a run with these (documents, bad) of two sources, step by step, must stop, and the message."""
    found = types.SimpleNamespace(records=[])
    hook = quarantine.BadRecords(found, path=tmp_path / "q.jsonl", sources=["a", "b"], config=watch(**changes))
    for step, (documents, bad) in enumerate(counts, start=1):
        hook.after(step, types.SimpleNamespace(documents=np.array(documents), bad=np.array(bad)))
        if hook.too_many is not None:
            return step, hook.too_many
    return None, None


def test_too_many_bad_documents_end_a_run(tmp_path):
    good = [((100, 50), (0, 0))]
    # Two are below the least number, three of 250 are too many; the other source alone is looked at.
    assert watched(tmp_path, [*good, ((100, 50), (2, 0)), *good, *good])[0] is None
    step, text = watched(tmp_path, [*good, ((100, 50), (0, 2)), *good, ((100, 50), (0, 1))])
    assert step == 4
    assert text == "data source 'b': 3 of its latest 200 documents (1.50%) were unreadable at step 4, and data.max_bad_share is 0.01"
    # Ten of 1,000 are just allowed, and the window forgets what is older than its documents.
    assert watched(tmp_path, [((100, 50), (1, 0))] * 50, bad_minimum=11)[0] is None
    assert watched(tmp_path, [((100, 50), (1, 0))] * 9 + [((100, 50), (2, 0))], bad_minimum=11)[0] == 10
    spread = [((100, 50), (2 * (i % 2), 0)) for i in range(100)]
    assert watched(tmp_path, spread, bad_minimum=10)[0] is None
    assert watched(tmp_path, [*good * 30, *[((100, 50), (11, 0))]])[0] == 31
    assert watched(tmp_path, [*good * 30, *[((100, 50), (11, 0))]], bad_window=100_000)[0] is None


def test_a_resumed_run_writes_a_bad_document_once(tmp_path):
    def met():
        found = types.SimpleNamespace(records=[])
        return found, quarantine.BadRecords(found, path=tmp_path / "q.jsonl", sources=["a"], config=watch())

    bad = quarantine.collate.BadRecord
    found, hook = met()
    assert hook.write() == 0
    assert not (tmp_path / "q.jsonl").exists()
    found.records.append(bad("a", 1, "s", "x"))
    hook.after(1, types.SimpleNamespace(documents=[5], bad=[1]))
    hook.after(2, types.SimpleNamespace(documents=[5], bad=[0]))
    found, hook = met()
    found.records += [bad("a", 1, "s", "x"), bad("b", 1, "s", "y")]
    assert hook.write() == 2
    assert [(r["source"], r["document"]) for r in record.read(tmp_path / "q.jsonl")] == [("a", 1), ("b", 1)]


def test_a_skipped_step_is_said_and_counted(capsys):
    seen, said = [], []
    options = {"sources": ["a"], "layers": ["0"], "tokens": lambda step: 10 * step, "learning_rate": lambda step: 0.1}
    options |= {"flops_per_token": lambda step: 2.0}
    hook = metrics.Metrics(
        seen.append,
        **options,
        peak_flops=1e3,
        experts_every=9,
        seconds_before=5,
        skipped_before=3,
        on_skip=lambda *x: said.append(x),
    )
    names = ("loss", "text", "text_weight", "mtp", "balance", "indexer", "grad_norm", "finite", "tokens", "load", "late", "dropped")
    values = (np.nan, np.array([1.0]), np.array([0.0]), 1.0, 1.0, 1.0, np.inf, np.array(False), 10.0, np.ones((1, 3, 2)), 3.0, 1.5)
    hook.after(4, types.SimpleNamespace(**dict(zip(names, values, strict=True)), index_recall=np.array([0.5, np.nan]), rounding={}))
    assert seen[0]["skipped"] == 4
    assert seen[0]["seconds"] > 5
    assert "loss/a" not in seen[0]
    assert said == [(4, np.inf)]
    assert (seen[0]["experts/late"], seen[0]["experts/dropped"]) == (3 / 6, 1.5 / 6)
    assert seen[0]["mfu"] == pytest.approx(seen[0]["tokens_per_second"] * 2 / 1e3)
    assert (seen[0]["index_recall"], seen[0]["index_recall_possible"]) == (0.5, None)


def test_values_that_are_not_finite_are_null_and_a_torn_line_is_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert record.read(path) == [{"kind": "train", "step": 1}]
    lines = record.JsonLines(path)
    lines({"kind": "train", "step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    lines.close()
    assert record.read(path) == [{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "loss": None, "grad_norm": None}]
    path.write_text("torn")
    record.JsonLines(path).close()
    assert path.read_bytes() == b""


def test_the_first_signal_asks_and_the_second_interrupts():
    import signal

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with resilience.stop_on_signals(grace_seconds=60) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert (stop(), stop.signal) == (True, signal.SIGTERM)
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        signal.raise_signal(signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= left, "a second notice must not prolong the first"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_signal_that_another_process_has_told_of_does_not_interrupt_when_it_comes_here_too():
    import signal

    told = []
    with resilience.stop_on_signals(grace_seconds=60) as stop:
        stop.tell = told.append
        stop.ask(signal.SIGINT)  # as the line to the other processes does
        assert (stop(), stop.signal, told) == (True, signal.SIGINT, [])
        signal.raise_signal(signal.SIGINT)
        assert told == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_bad_documents_of_all_hosts_are_counted_once(tmp_path):
    assert (quarantine.count(tmp_path), quarantine.named(tmp_path)) == (0, str(tmp_path / "quarantine.jsonl"))
    for host, documents in ((0, (1, 2)), (1, (2, 3)), (11, (3,))):
        lines = "".join(json.dumps({"source": "text", "document": d}) + "\n" for d in documents)
        quarantine.path(tmp_path, host=host).write_text(lines)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quarantine-1.jsonl", "quarantine-11.jsonl", "quarantine.jsonl"]
    assert quarantine.count(tmp_path) == 3
    assert quarantine.named(tmp_path) == f"{tmp_path}/quarantine*.jsonl (3 files)"


def test_the_devices_are_those_of_the_suite():
    assert len(jax.devices()) == 8
