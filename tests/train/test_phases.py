"""Runs whose data change on the way: new shapes, new weights, new sources, at a resume or planned; and one whose data go bad."""

import dataclasses
import io
import json
import pathlib
import types

import jax
import numpy as np
import pytest
import yaml

from tests.data import synthetic
from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.checkpoint import restore
from v4train.cli import main
from v4train.core import compiler
from v4train.train import build
from v4train.train import run as run_lib
from v4train.train.hooks import record

LONGER = {"from_step": 3, "sequence_length": 128, "batch_rows": 4, "weights": {"text": 1.0, "media": 3.0}}
QUICK = {"hidden": 16, "layers": [{"pattern": ["csa"]}], "mtp": None}


@pytest.fixture(scope="module")
def programs():
    """Each function is compiled once in this module, whatever run asks for it; the shapes that were asked for are kept."""
    steps, evaluates, asked = {}, {}, []

    def lower(parts, variant, original=build.lower_step):
        asked.append(variant.shape)
        key = (variant, len(parts.data.sources))
        if key not in steps:
            steps[key] = original(parts, variant).compile(compiler.options())
        return types.SimpleNamespace(compile=lambda options: steps[key])

    def compile_program(parts, *, first_step, original=build.compile_program):
        sources, variant = len(parts.data.sources), parts.variant_at(first_step)
        if sources not in evaluates:
            evaluates[sources] = original(parts, first_step=first_step).evaluations
        return build.Program({variant: build.lower_step(parts, variant).compile(None)}, evaluates[sources], 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "lower_step", lower)
        patch.setattr(build, "compile_program", compile_program)
        yield asked


@dataclasses.dataclass
class Ended:
    """A run: its records by kind, the state of each checkpoint, and what it printed."""

    directory: pathlib.Path
    summary: dict
    out: str

    def of_kind(self, kind):
        return [r for r in record.read(self.directory / "metrics.jsonl") if r["kind"] == kind]

    def arrays(self, step):
        """The bytes of a checkpoint's arrays, by name."""
        table = restore.describe(self.directory / "checkpoints", step=step).table
        recipe = recipe_lib.Recipe.model_validate(json.loads((self.directory / "recipe.json").read_text()))
        state = restore.restore(self.directory / "checkpoints", template=build.parts(recipe).state, step=step).state
        assert table
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def train(stores, directory, **changes):
    """Trains the tiny recipe, at a rate that does not depend on the length of the run."""
    values = {
        "model": QUICK,
        "train": {"steps": 6, "eval_every": None} | changes.get("train", {}),
        "data": changes.get("data", {}),
        "checkpoint": {"every_steps": 1, "keep": {"kind": "latest", "count": 9}},
        "optimizer": {"schedule": {"peak_lr": 3e-3, "final_lr": 3e-3, "warmup_steps": 1, "decay_steps": 0}},
    }
    path = write(stores, directory, values)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        outcome = run_lib.run(recipe_lib.resolve(str(path)), program_started=0.0)
    return Ended(directory, outcome.summary, out.getvalue())


def write(stores, directory, changes):
    """The recipe with changes, which are merged one level deep, as a file beside the run directory."""
    base = tiny.values(stores, directory)
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(base | {name: base[name] | change for name, change in changes.items()}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def through(data, tmp_path_factory, programs):
    """Six steps without a break, the last three with longer rows."""
    return train(data, tmp_path_factory.mktemp("through") / "run", data={"phases": [LONGER]})


def test_a_phase_of_longer_rows_is_compiled_when_it_comes(through, programs):
    lines = [line for line in through.out.splitlines() if "from here on" in line]
    assert len(lines) == 1
    assert lines[0].startswith("step      3  from here on 4 rows of 128 tokens a step; compiled in ")
    assert list(dict.fromkeys(shape[:2] for shape in programs)) == [(8, 64), (4, 128)]
    steps = through.of_kind("train")
    assert [r["tokens"] for r in steps] == [512 * i for i in range(1, 7)]
    assert all(np.isfinite(r["loss"]) for r in steps)
    assert [r["step"] for r in through.of_kind("eval")] == [0, 6]
    assert through.summary["tokens"] == 3072


def test_amounts_are_recorded_and_summed_up(through):
    parts = build.parts(recipe_lib.Recipe.model_validate(json.loads((through.directory / "recipe.json").read_text())))
    lines = through.of_kind("data")
    assert [r["step"] for r in lines] == [2, 4, 6]
    for r in lines:
        seen = np.zeros(2, int), np.zeros(2, int)
        for step in range(r["step"]):
            b = parts.data.batch(step)
            seen[0][:] += np.bincount(b.source, minlength=2)
            seen[1][:] += [int((b.segment_ids[b.source == i] > 0).sum()) for i in range(2)]
        assert [r["rows/text"], r["rows/media"]] == seen[0].tolist()
        assert [r["tokens/text"], r["tokens/media"]] == seen[1].tolist()
    assert through.summary["data"]["media"]["rows"] == lines[-1]["rows/media"] == 12 + 9
    assert set(through.summary["fill"]) == {"text", "media"}


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resuming_on_either_side_of_the_boundary_changes_no_bit(data, tmp_path, through, stop):
    train(data, tmp_path / "run", data={"phases": [LONGER]}, train={"steps": stop})
    resumed = train(data, tmp_path / "run", data={"phases": [LONGER]})
    assert f"resumed from step {stop}" in resumed.out
    assert [r["loss"] for r in resumed.of_kind("train")] == [r["loss"] for r in through.of_kind("train")]
    assert resumed.arrays(6) == through.arrays(6)


def test_a_phase_appended_at_a_resume_is_the_phase_that_was_planned(data, tmp_path, through):
    """A run without phases, stopped at step 3 and continued with one, is bit for bit the run that had it from the start."""
    train(data, tmp_path / "run", train={"steps": 3})
    appended = train(data, tmp_path / "run", data={"phases": [LONGER]})
    assert appended.arrays(6) == through.arrays(6)
    assert [r["loss"] for r in appended.of_kind("train")] == [r["loss"] for r in through.of_kind("train")]


def added(data, tmp_path):
    """A source that comes later, put between the others: the mixture must not depend on where one without weight stands."""
    synthetic.make_test_store(tmp_path / "more", documents=30, seed=7)
    sources = tiny.values(data, data)["data"]["sources"]
    more = {"name": "more", "path": str(tmp_path / "more"), "weight": 0}
    phases = [{"from_step": 4, "weights": {"more": 1.0, "media": 0.0}}]
    return {"sources": [sources[0], more, sources[1]], "phases": phases}


def test_a_source_may_be_added_at_a_resume(data, tmp_path, programs):
    train(data, tmp_path / "run", train={"steps": 4})
    assert train(data, tmp_path / "run", train={"steps": 4}, data=added(data, tmp_path)).out.startswith("nothing to do")


@pytest.mark.slow  # three sources need programs of their own
def test_a_source_added_at_a_resume_is_trained_on(data, tmp_path, programs):
    train(data, tmp_path / "run", train={"steps": 4})
    resumed = train(data, tmp_path / "run", data=added(data, tmp_path))
    rows = {name: amount["rows"] for name, amount in resumed.summary["data"].items()}
    assert rows == {"text": 16 + 5, "more": 11, "media": 16}
    assert "loss/more" in resumed.of_kind("train")[-1]


def refusal(stores, directory, **changes):
    with pytest.raises(ValueError, match="the data are not those that this run was trained on so far") as caught:
        train(stores, directory, **changes)
    text = str(caught.value)
    assert "What comes later may change: append to data.phases. Continue with the settings of" in text
    return text


def test_another_past_is_refused_and_named(data, tmp_path, through):
    sources = tiny.values(data, data)["data"]["sources"]

    def refused(**changes):
        return refusal(data, through.directory, data={"phases": [LONGER]} | changes, train={"steps": 9})

    assert "  data.seed: 0 in the checkpoint, 5 now\n" in refused(seed=5)
    assert "  steps 0 to 3: sequence_length 64 in the checkpoint, 32 now\n" in refused(sequence_length=32, max_patches=30)
    assert "  steps 3 to 6: batch rows 4 in the checkpoint, 8 now\n" in refused(phases=[LONGER | {"batch_rows": 8}])
    earlier = refused(phases=[LONGER | {"from_step": 2}])
    assert "  steps 2 to 3: sequence_length 64 in the checkpoint, 128 now\n" in earlier
    assert "  steps 2 to 3: shares media 1/2, text 1/2 in the checkpoint, media 3/4, text 1/4 now\n" in earlier
    heavier = [sources[0] | {"weight": 1.5}, sources[1]]
    assert "  steps 0 to 3: shares media 1/2, text 1/2 in the checkpoint, media 1/4, text 3/4 now\n" in refused(sources=heavier)
    packed = [sources[0], sources[1] | {"packing": "one_document"}]
    assert "  data source 'media': packing no_split in the checkpoint, one_document now\n" in refused(sources=packed)
    gone = refused(sources=sources[:1], phases=[{k: v for k, v in LONGER.items() if k != "weights"}])
    assert "  data source 'media' was read, but is gone or has no weight in the past now" in gone
    assert "the sources are in the order media, text now; it was text, media" in refused(sources=sources[::-1])
    # What the past does not know may differ.
    train(data, through.directory, data={"phases": [LONGER, {"from_step": 6, "weights": {"text": 9.0}}]}, train={"steps": 7})


def damage(monkeypatch, *, every):
    """Every so-maniest document of the text cannot be read any more."""
    from v4train.data import document, store

    def read(self, i, original=store.TokenStore.read):
        if "text" in str(self.path) and i % every == 0:
            raise document.DamagedRecordError("checksum mismatch")
        return original(self, i)

    monkeypatch.setattr(store.TokenStore, "read", read)


def test_too_many_bad_documents_stop_the_run_with_a_checkpoint(data, tmp_path, programs, monkeypatch, capsys):
    damage(monkeypatch, every=3)
    directory = tmp_path / "run"
    with pytest.raises(ValueError, match="data source 'text': "):
        train(data, directory, data={"bad_minimum": 4, "read_threads": 0})
    capsys.readouterr()
    assert main.main(["train", str(directory.with_suffix(".yaml"))]) == 2  # it goes on, and stops again
    err = capsys.readouterr().err
    assert "v4train: data source 'text': " in err
    assert "documents (" in err
    assert "data.max_bad_share is 0.001" in err
    assert "The run is saved at step " in err
    assert f"{directory / 'quarantine.jsonl'} names the documents" in err
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["status"], 0 < summary["steps"] < 6) == ("stopped", True)
    assert summary["steps"] > 3, "a step or two each time"
    assert restore.describe(directory / "checkpoints").step == summary["steps"]
    lines = record.read(directory / "quarantine.jsonl")
    assert {r["source"] for r in lines} == {"text"}
    assert all(r["document"] % 3 == 0 and r["where"].startswith("shard-00000") and r["error"] for r in lines)
    # Or to the end, if that is wanted.
    outcome = train(data, directory, data={"bad_minimum": 4, "max_bad_share": 1.0, "read_threads": 0})
    assert outcome.summary["status"] == "finished"


def test_a_bad_document_changes_no_other_token_of_the_run(data, tmp_path, monkeypatch):
    """Counts of documents and bad ones in the step's report are those of the batch, by source."""
    parts = build.parts(recipe_lib.Recipe.model_validate(tiny.values(data, tmp_path)))
    before = [parts.data.batch(i) for i in range(4)]
    damage(monkeypatch, every=3)
    parts = build.parts(recipe_lib.Recipe.model_validate(tiny.values(data, tmp_path)))
    for i, good in enumerate(before):
        bad = parts.data.batch(i)
        kept = bad.segment_ids > 0
        np.testing.assert_array_equal(good.tokens[kept], bad.tokens[kept])
        np.testing.assert_array_equal(good.n_documents, bad.n_documents)
        assert (bad.n_bad.sum() > 0) == ((good.segment_ids > 0) & ~kept).any()
