"""The same bytes for any number of workers and after any kill; what is refused, and in which words."""

import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from tests.data.prepare import corpus
from v4train.data import store, tokenizer
from v4train.data.prepare import duplicates, filters, inputs, merge, part, preparation, runners

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("PIL", "soundfile", "soxr")), reason="the extra `prepare` is not installed"
)
TOKENIZER = tokenizer.ByteTokenizer()


@pytest.fixture
def sources(tmp_path) -> list[dict]:
    """Text in 5 files, some lines bad, and 12 triples."""
    for i in range(5):
        corpus.text_lines(tmp_path / f"lines/{i}.jsonl", lines=60, seed=i)
    path = tmp_path / "lines/3.jsonl"
    path.write_text(path.read_text().replace('{"id": "3-7"', '"id": "3-7"'))
    corpus.pairs(tmp_path / "pairs", count=12)
    lines = {"kind": "jsonl", "name": "lines", "path": str(tmp_path / "lines/*.jsonl"), "key": "id"}
    return [lines, {"kind": "triples", "name": "trios", "path": str(tmp_path / "pairs")}]


SMALL = {"task_bytes": 4000, "shard_bytes": 8000, "quarantine": {"max_share": 0.02}}


def text_of(found) -> str:
    return TOKENIZER.decode(found.tokens[found.modality == 0])


def test_documents_come_in_the_order_of_the_spec_without_copies(tmp_path, sources):
    summary = preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL))
    assert [source.name for source in summary.sources] == ["lines", "trios"]
    lines, trios = summary.sources
    assert (lines.records, lines.bad, lines.copies, lines.documents) == (300, 1, 30, 269)
    assert (trios.records, trios.documents) == (12, 12)
    found = corpus.documents(tmp_path / "out")
    expected, seen = [], set()
    for path in sorted((tmp_path / "lines").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                value = json.loads(line)
                if " ".join(value["text"].split()) not in seen:
                    expected.append((store.key_hash(f"lines/{value['id']}"), f"<bos>{value['text']}<eos>"))
                seen.add(" ".join(value["text"].split()))
    keys = store.TokenStore.open(tmp_path / "out").documents["key"].tolist()
    assert [(key, text_of(one)) for key, one in zip(keys[:269], found[:269], strict=True)] == expected
    assert all(len(one.patches) and len(one.audio) for one in found[269:])
    (bad,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert bad["input"] == "lines"
    assert "3.jsonl byte" in bad["record"]
    assert bad["reason"] == "not JSON: Extra data at character 4"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["documents"] == 281 == len(found)
    assert manifest["tokens"]["image"] == sum(len(one.patches) for one in found)
    assert len(manifest["shards"]) > 10
    assert not (tmp_path / "out/.preparing").exists()
    histogram = store.TokenStore.open(tmp_path / "out").histogram
    assert histogram.sum() == sum(manifest["tokens"].values()) - manifest["tokens"]["image"] - manifest["tokens"]["audio"]


def test_the_bytes_do_not_depend_on_workers_and_hardly_on_the_size_of_tasks(tmp_path, sources):
    made = {}
    for workers in (1, 2):
        spec = corpus.spec(tmp_path / f"out-{workers}", *sources, **SMALL, workers=workers)
        preparation.prepare(spec)
        made[workers] = corpus.digests(tmp_path / f"out-{workers}")
    assert made[1] == made[2]
    preparation.prepare(corpus.spec(tmp_path / "other", *sources, **SMALL | {"task_bytes": 10**6}))
    first, other = (corpus.documents(tmp_path / name) for name in ("out-1", "other"))
    assert [one.tokens.tobytes() for one in first] == [one.tokens.tobytes() for one in other]
    keys = [store.TokenStore.open(tmp_path / name).documents["key"].tolist() for name in ("out-1", "other")]
    assert keys[0] == keys[1]


def test_a_store_is_flat_unless_records_are_asked_for(tmp_path, sources):
    assert corpus.spec(tmp_path, *sources).store == "flat"
    for layout in ("records", "flat"):
        preparation.prepare(corpus.spec(tmp_path / layout, *sources, **SMALL, store=layout))
    records, flat = (corpus.documents(tmp_path / layout) for layout in ("records", "flat"))
    assert [one.tokens.tolist() for one in flat] == [one.tokens.tolist() for one in records]
    assert [one.patches.tolist() for one in flat] == [one.patches.tolist() for one in records]
    keys = [store.TokenStore.open(tmp_path / layout).documents["key"].tolist() for layout in ("records", "flat")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("bucket", [1, 7, 2**24])
def test_copies_are_those_of_a_walk(tmp_path, bucket):
    """Against a set of all hashes so far."""
    rng = np.random.default_rng(bucket)
    parts, expected, seen = [], [], set()
    for i, length in enumerate((0, 5, 40, 1, 0, 60)):
        path = tmp_path / f"part-{i}"
        path.mkdir()
        hashes = np.zeros(length, part.CONTENT)
        hashes["high"] = rng.integers(0, 3, length).astype("<u8") << np.uint64(62)
        hashes["low"] = rng.integers(0, 12, length)
        hashes.tofile(path / part.CONTENTS)
        marks = []
        for value in hashes.tolist():
            marks.append(value in seen)
            seen.add(value)
        parts.append(path)
        expected.append(marks)
    assert duplicates.mark(parts, bucket=bucket) == [sum(marks) for marks in expected]
    assert [np.load(path / part.DROP).tolist() for path in parts] == expected


def test_filters_leave_out_and_are_counted(tmp_path):
    control = "\x01\x02\x03 control characters all over \x04\x05"
    texts = ["short", "x" * 200, "fine and long enough to be kept", control, "123 456 789 0 ab 12 34 56", "again\n" * 4]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    wanted = {"min_chars": 10, "max_chars": 100, "min_printable": 0.95, "min_letters": 0.5, "max_repeated_lines": 0.5}
    source = {"kind": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl"), "filters": wanted}
    summary = preparation.prepare(corpus.spec(tmp_path / "out", source))
    assert summary.sources[0].refused == dict.fromkeys(["max_chars", "max_repeated_lines", "min_chars", "min_letters", "min_printable"], 1)
    assert [text_of(one) for one in corpus.documents(tmp_path / "out")] == ["<bos>fine and long enough to be kept<eos>"]


def test_accents_are_parts_of_letters():
    assert filters.letters("हिन्दी में") == 1.0
    assert filters.letters("e\u0301 1") == 2 / 3


def test_bad_media_go_to_quarantine_with_their_reasons(tmp_path):
    corpus.pairs(tmp_path / "in", count=8)
    (tmp_path / "in/even/item-000.png").write_bytes((tmp_path / "in/even/item-000.png").read_bytes()[:300])
    (tmp_path / "in/odd/item-001.wav").write_bytes(b"RIFF and nothing else")
    (tmp_path / "in/even/item-002.txt").unlink()
    (tmp_path / "in/odd/item-003.wav").unlink()
    source = {"kind": "triples", "name": "m", "path": str(tmp_path / "in")}
    summary = preparation.prepare(corpus.spec(tmp_path / "out", source, quarantine={"max_share": 0.5}))
    assert (summary.sources[0].bad, summary.sources[0].documents) == (4, 4)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    reasons = {pathlib.Path(line["record"]).stem: line["reason"] for line in lines}
    assert reasons["item-000"].startswith("unreadable image: ")
    assert reasons["item-001"].startswith("unreadable sound: ")
    assert reasons["item-002"].startswith("No such file or directory: ")
    assert reasons["item-003"].startswith("there is no audio file of this name: ")


def test_too_many_bad_records_stop_it_and_a_higher_limit_continues(tmp_path, sources, monkeypatch):
    limit = SMALL | {"quarantine": {"max_share": 0.001, "judge_after": 100}}
    with pytest.raises(ValueError, match=r"input 'lines': 1 of \d+ records are bad, more than quarantine.max_share 0.001"):
        preparation.prepare(corpus.spec(tmp_path / "out", *sources, **limit))
    done = sorted(path.name for path in (tmp_path / "out/.preparing").glob("part-*"))
    assert done
    written = []
    write = runners.write_part
    monkeypatch.setattr(runners, "write_part", lambda job: written.append(part.name(job.task.number)) or write(job))
    preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL))
    assert not set(written) & set(done)
    preparation.prepare(corpus.spec(tmp_path / "straight", *sources, **SMALL))
    assert corpus.digests(tmp_path / "out") == corpus.digests(tmp_path / "straight")


def test_where_it_stops_does_not_depend_on_who_is_first(tmp_path, sources):
    spec = corpus.spec(tmp_path / "out", *sources, **SMALL | {"quarantine": {"max_share": 0.0, "judge_after": 1}})
    tasks = inputs.tasks(spec)
    work = tmp_path / "work"
    work.mkdir()
    reports = [part.write(part.Job(spec, task, str(work))) for task in tasks]
    messages = set()
    for seed in range(5):
        judge = preparation._Judge(spec, tasks, work)
        shuffled = random.Random(seed).sample(reports, len(reports))
        with pytest.raises(ValueError) as error:
            list(map(judge.add, shuffled))
        messages.add(str(error.value))
    assert len(messages) == 1


def test_a_finished_store_is_kept_and_other_content_is_refused(tmp_path, sources):
    spec = corpus.spec(tmp_path / "out", *sources, **SMALL)
    preparation.prepare(spec)
    before = corpus.digests(tmp_path / "out")
    assert preparation.prepare(spec).workers == 0
    with pytest.raises(ValueError, match="holds a store of another spec, or its input files have changed since"):
        preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL, duplicates="keep"))
    os.utime(tmp_path / "lines/0.jsonl", (1, 1))
    with pytest.raises(ValueError, match="its input files have changed since; choose another output, or give --fresh"):
        preparation.prepare(spec)
    assert corpus.digests(tmp_path / "out") == before
    preparation.prepare(spec, fresh=True)
    assert corpus.digests(tmp_path / "out") == before
    for damage in ("{", "{}", "[]"):
        (tmp_path / "out/preparation.json").write_text(damage)
        with pytest.raises(ValueError, match=r"a store without a readable preparation\.json; choose another output, or give --fresh"):
            preparation.prepare(spec)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.txt\)"):
        preparation.prepare(corpus.spec(tmp_path / "mine", *sources))
    with pytest.raises(ValueError, match=r"is not empty \(thesis.txt\)"):
        preparation.prepare(corpus.spec(tmp_path / "mine", *sources), fresh=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"


def test_changed_captions_and_sounds_are_changed_input(tmp_path):
    corpus.pairs(tmp_path / "pairs", count=2)
    spec = corpus.spec(tmp_path / "out", {"kind": "triples", "name": "trios", "path": str(tmp_path / "pairs")})
    preparation.prepare(spec)
    for ending in ("txt", "wav"):
        assert preparation.prepare(spec).workers == 0
        changed = next((tmp_path / "pairs").rglob(f"*.{ending}"))
        os.utime(changed, (1, 1))
        with pytest.raises(ValueError, match="its input files have changed since"):
            preparation.prepare(spec)
        preparation.prepare(spec, fresh=True)


def test_a_file_whose_name_is_no_unicode_is_a_bad_record(tmp_path):
    corpus.pairs(tmp_path / "pairs", count=2, sound=False)
    odd = os.fsencode(tmp_path / "pairs") + b"/\xff"
    try:
        for ending, content in ((b".png", corpus.png(np.random.default_rng(0))), (b".txt", b"odd")):
            pathlib.Path(os.fsdecode(odd + ending)).write_bytes(content)
    except OSError:
        pytest.skip("this file system has no such names")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a line", "image": "\udcfe.png"}) + "\n")
    sources = [{"kind": "images", "name": "a", "path": str(tmp_path / "pairs")}]
    sources += [{"kind": "jsonl", "name": "b", "path": str(tmp_path / "a.jsonl"), "image": "image"}]
    summary = preparation.prepare(corpus.spec(tmp_path / "out", *sources, quarantine={"max_share": 1}))
    assert [(source.documents, source.bad) for source in summary.sources] == [(2, 1), (0, 1)]
    first, second = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert os.fsencode(first["record"]) == odd + b".png"
    assert second["reason"].endswith("\udcfe.png")


@pytest.mark.parametrize("name", ["shard-00000.tar", "vectors.npy", "backup.partial"])
def test_beginning_anew_removes_no_file_of_others(tmp_path, sources, name):
    """WebDataset calls its files `shard-00000.tar`: a wrong `output` must not cost a corpus."""
    preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL))
    (tmp_path / "out" / name).write_text("mine")
    before = corpus.digests(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"is not empty \({name}\)"):
        preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL), fresh=True)
    assert corpus.digests(tmp_path / "out") == before


def test_an_output_that_is_a_file_is_refused(tmp_path, sources):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        preparation.prepare(corpus.spec(tmp_path / "out", *sources), fresh=True)


def test_a_directory_in_use_is_refused(tmp_path, sources):
    (tmp_path / "out").mkdir()
    with (
        preparation._locked(tmp_path / "out"),
        pytest.raises(ValueError, match=r"out is in use by another preparation; wait for it, or choose another directory"),
    ):
        preparation.prepare(corpus.spec(tmp_path / "out", *sources))


def test_nothing_left_is_an_error(tmp_path):
    path = corpus.text_lines(tmp_path / "a.jsonl", lines=5)
    source = {"kind": "jsonl", "name": "a", "path": str(path), "filters": {"min_chars": 10**6}}
    with pytest.raises(ValueError, match=r"no document is left \(a: 5 records, 0 bad, 0 copies, 5 filtered\)"):
        preparation.prepare(corpus.spec(tmp_path / "out", source))


def test_another_tokenizer_is_another_store(tmp_path, sources):
    """The fingerprint is in the manifest, and an interrupted preparation does not go on with another vocabulary."""
    preparation.prepare(corpus.spec(tmp_path / "out", *sources, **SMALL))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokenizer"]["fingerprint"] == TOKENIZER.fingerprint
    spec = corpus.spec(tmp_path / "out", *sources, **SMALL)
    tasks = inputs.tasks(spec)
    assert inputs.digest(spec, tasks, tokenizer="a") != inputs.digest(spec, tasks, tokenizer="b")


def run_cli(spec: pathlib.Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "v4train.cli.main", "data", "prepare", str(spec), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.slow  # seven processes, each with two workers
def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path, sources):
    """`kill -9` of the parent alone: its workers must go by themselves."""
    straight = corpus.spec(tmp_path / "straight", *sources, **SMALL)
    preparation.prepare(straight)
    values = corpus.spec(tmp_path / "out", *sources, **SMALL, workers=2).model_dump(mode="json")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    rng, kills = random.Random(os.getpid()), 0
    started = time.monotonic()
    process = run_cli(tmp_path / "spec.yaml")
    output, _ = process.communicate(timeout=120)
    seconds = time.monotonic() - started
    assert process.returncode == 0, output
    for _ in range(3):
        process = run_cli(tmp_path / "spec.yaml", "--fresh")
        time.sleep(rng.uniform(0.3, 0.95) * seconds)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate(timeout=120)
        process = run_cli(tmp_path / "spec.yaml")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert corpus.digests(tmp_path / "out") == corpus.digests(tmp_path / "straight")
    assert kills


@pytest.mark.parametrize("stage", ["_join", "_move", "_write_manifest", "rewrite", "write_part"])
def test_killed_at_any_call_of_a_step_the_bytes_are_the_same(tmp_path, sources, stage, monkeypatch):
    """Parts, copies, indexes, renames and the manifest are interrupted, by an exception that nothing catches."""

    class Killed(BaseException):
        pass

    preparation.prepare(corpus.spec(tmp_path / "straight", *sources, **SMALL))
    spec = corpus.spec(tmp_path / "out", *sources, **SMALL)
    module = {"rewrite": part, "write_part": runners}.get(stage, merge)
    original, calls = getattr(module, stage), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) in (1, 4, 10):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, stage, dying)
    kills = 0
    for _ in range(4):
        try:
            preparation.prepare(spec)
            break
        except Killed:
            kills += 1
    assert kills
    assert corpus.digests(tmp_path / "out") == corpus.digests(tmp_path / "straight")


def test_a_part_that_a_power_cut_emptied_is_made_again(tmp_path, sources, monkeypatch):
    """Files that are there by name only; the rename of their directory has survived."""
    preparation.prepare(corpus.spec(tmp_path / "straight", *sources, **SMALL))
    spec = corpus.spec(tmp_path / "out", *sources, **SMALL)
    monkeypatch.setattr(duplicates, "mark", lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preparation.prepare(spec)
    monkeypatch.undo()
    work = tmp_path / "out/.preparing"
    for path in ("part-000001/store-000/shard-00000.array_record", "part-000002/contents.npy", "part-000003/report.json"):
        (work / path).write_bytes(b"")
    assert [part.is_intact(work / part.name(i)) for i in range(5)] == [True, False, False, False, True]
    preparation.prepare(spec)
    assert corpus.digests(tmp_path / "out") == corpus.digests(tmp_path / "straight")


def test_a_worker_that_dies_is_told(tmp_path, sources):
    with pytest.raises(ValueError, match="a worker process died, most likely for want of memory"):
        list(runners.processes(os._exit, [1], workers=2))


@pytest.mark.slow  # starting Ray takes 10 s and more
def test_ray_gives_the_same_bytes(tmp_path, sources):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    preparation.prepare(corpus.spec(tmp_path / "straight", *sources, **SMALL))
    values = corpus.spec(tmp_path / "out", *sources, **SMALL, workers=2).model_dump(mode="json")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    process = run_cli(tmp_path / "spec.yaml", "--runner", "ray")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert corpus.digests(tmp_path / "out") == corpus.digests(tmp_path / "straight")


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--runner ray needs Ray, which is not installed: run `pip install 'v4train\[ray\]'`"):
        next(iter(runners.ray_tasks(str, [1], workers=1)))
