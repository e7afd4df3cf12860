"""The preparation of a store from its spec, start to finish.

    inputs -> tasks -> parts, in parallel -> copies marked -> parts without them -> one store

The spec and the files decide what the tasks are; everything after is a function of them. So the result has the same bytes for any number
of workers, on one machine or many, in one go or after any number of kills: a finished part is found and kept, an unfinished one is
made again, and the last steps can be repeated. The manifest is written last; before it there is no store, and the run directory
``.preparing`` holds what has been done. A lock on the output directory keeps a second preparation out.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import config as config_lib
from v4train.data.prepare import duplicates, inputs, merge, part, progress, record, runners

WORK, PLAN, MERGING, PREPARATION = ".preparing", "plan.json", "merging", "preparation.json"
Runner = Literal["local", "ray"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Counts of one input: ``records`` = ``documents`` + ``copies`` + ``bad`` + all of ``refused``."""

    name: str
    records: int
    documents: int
    copies: int
    bad: int
    refused: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a preparation made.

    Attributes:
        output: directory of the store.
        manifest: of the store.
        sources: counts by input.
        tokens: composed by this call, copies included; 0 if there was nothing to do.
        seconds: that composing them took.
        workers: processes at it.
    """

    output: pathlib.Path
    manifest: dict[str, Any]
    sources: tuple[Source, ...]
    tokens: int
    seconds: float
    workers: int


def prepare(spec: config_lib.PrepareConfig, *, runner: Runner = "local", fresh: bool = False) -> Summary:
    """Makes the store, or what is missing of it.

    Args:
        spec: what to make from what.
        runner: processes of this machine, or Ray.
        fresh: throw away what an earlier preparation left in the output directory.

    Raises:
        ValueError: an input, the tokenizer or the output directory cannot be used; too many records are bad; nothing is left.
        OSError: the disk is full.
    """
    output = pathlib.Path(spec.output)
    tokenizer = tokenizer_lib.build(spec.tokenizer)
    tasks = inputs.tasks(spec)
    digest = inputs.digest(spec, tasks, tokenizer=tokenizer.fingerprint)
    workers = spec.workers or os.cpu_count() or 1
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a directory")
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if fresh:
            _clear(output)
        if (output / store_lib.MANIFEST).exists():
            return _finished(output, digest=digest)
        work = _begin(output, digest=digest)
        reports, gauge = _write_parts(spec, tasks, work, runner=runner, workers=workers)
        copies = _remove_copies(spec, tasks, reports, work, runner=runner, workers=workers)
        sources = _sources(spec, reports, copies)
        _write_quarantine(output, [work / part.name(task.number) for task in tasks])
        stores = [store for task in tasks for store in _stores(work / part.name(task.number))]
        if not stores:
            raise ValueError(
                f"{output}: no document is left ({_counts(sources)}); see {output / part.QUARANTINE} and the filters of the spec"
            )
        counted = [dataclasses.asdict(source) for source in sources]
        about = {"digest": digest, "spec": spec.model_dump(mode="json"), "inputs": counted}
        (output / PREPARATION).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (work / MERGING).touch()
        manifest = merge.merge(stores, output, extra={"inputs": counted})
        shutil.rmtree(work)
        return Summary(output, manifest, sources, gauge.tokens, gauge.seconds, workers)


@contextlib.contextmanager
def _locked(output: pathlib.Path) -> Iterator[None]:
    """The directory itself is locked: no file of ours stays in it, and the lock ends with the process, however that ends."""
    handle = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"output {output} is in use by another preparation; wait for it, or choose another directory") from None
    finally:
        os.close(handle)


def _clear(output: pathlib.Path) -> None:
    """Removes what a preparation makes; nothing at all where there is anything else."""
    own = {WORK, PREPARATION, part.QUARANTINE, pathlib.Path(part.QUARANTINE).with_suffix(".partial").name}
    found = sorted(output.iterdir())
    foreign = [path for path in found if not (path.name in own or store_lib.is_file_of_store(path.name))]
    _refuse_foreign(output, foreign)
    shutil.rmtree(output / WORK, ignore_errors=True)
    for path in found:
        if path.name != WORK:
            path.unlink()


def _refuse_foreign(output: pathlib.Path, foreign: Sequence[pathlib.Path]) -> None:
    if foreign:
        names = ", ".join(path.name for path in foreign[:3])
        raise ValueError(f"output {output} is not empty ({names}); choose another directory")


def _finished(output: pathlib.Path, *, digest: str) -> Summary:
    remedy = "choose another output, or give --fresh to make it anew"
    try:
        about = json.loads((output / PREPARATION).read_text(encoding="utf-8"))
        made_from = about["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"output {output} holds a store without a readable {PREPARATION}; {remedy}") from None
    if made_from != digest:
        raise ValueError(f"output {output} holds a store of another spec, or its input files have changed since; {remedy}")
    manifest = json.loads((output / store_lib.MANIFEST).read_text(encoding="utf-8"))
    shutil.rmtree(output / WORK, ignore_errors=True)  # killed just before it was removed
    return Summary(output, manifest, tuple(Source(**source) for source in about["inputs"]), 0, 0.0, 0)


def _begin(output: pathlib.Path, *, digest: str) -> pathlib.Path:
    work = output / WORK
    plan = work / PLAN
    if plan.exists():
        if json.loads(plan.read_text())["digest"] != digest:
            message = f"output {output}: a preparation with another spec, or of files that have changed since, was interrupted here"
            raise ValueError(f"{message}; restore them to continue it, choose another output, or give --fresh to begin anew")
        for left in [*work.glob(".part-*"), *work.glob("part-*/.kept.*")]:
            shutil.rmtree(left)
        return work
    _refuse_foreign(output, sorted(path for path in output.iterdir() if path.name != WORK))
    work.mkdir(exist_ok=True)
    partial = plan.with_suffix(".partial")
    partial.write_text(json.dumps({"digest": digest}) + "\n")
    partial.replace(plan)
    return work


def _write_parts(
    spec: config_lib.PrepareConfig, tasks: list[record.Task], work: pathlib.Path, *, runner: Runner, workers: int
) -> tuple[list[part.Report], progress.Progress]:
    found = {task.number: part.load(work / part.name(task.number)) for task in tasks if _is_done(work / part.name(task.number))}
    judge = _Judge(spec, tasks, work)
    gauge = progress.Progress(total_bytes=sum(task.size for task in tasks), done_bytes=sum(one.size for one in found.values()))
    if found:
        gauge.say(f"{len(found)} of {len(tasks)} parts are there already")
    for report in found.values():
        judge.add(report)
    jobs = [part.Job(spec, task, str(work)) for task in tasks if task.number not in found]
    try:
        for report in _run(runners.write_part, jobs, runner=runner, workers=workers, watch=lambda live: gauge.live(live.read())):
            found[report.task] = report
            gauge.finish(report)
            judge.add(report)
    finally:
        gauge.close()
    return [found[task.number] for task in tasks], gauge


def _is_done(path: pathlib.Path) -> bool:
    """Whether a part is there; a damaged one is removed. Once merging has begun, shards have left their parts."""
    if not path.exists():
        return False
    if not (path.parent / MERGING).exists() and not part.is_intact(path):
        shutil.rmtree(path)
        return False
    return True


def _run(
    function: Callable, jobs: Sequence, *, runner: Runner, workers: int, watch: Callable[[runners.Live], None] = lambda _: None
) -> Iterator[Any]:
    if not jobs:
        return iter(())
    if runner == "ray":
        return runners.ray_tasks(function, jobs, workers=workers)
    if workers == 1 or len(jobs) == 1:
        return runners.here(function, jobs)
    return runners.processes(function, jobs, workers=min(workers, len(jobs)), watch=watch)


class _Judge:
    """Stops the preparation when too many records of an input are bad.

    Parts are judged in the order of their tasks, as far as all before them are done. Whether a preparation stops, and at which
    part, therefore does not depend on which worker was the fastest.
    """

    def __init__(self, spec: config_lib.PrepareConfig, tasks: list[record.Task], work: pathlib.Path):
        self._spec, self._work = spec, work
        self._last = {task.source: task.number for task in tasks}
        self._reports: dict[int, part.Report] = {}
        self._next = self._records = self._bad = 0

    def add(self, report: part.Report) -> None:
        self._reports[report.task] = report
        while self._next in self._reports:
            one = self._reports.pop(self._next)
            self._records, self._bad = self._records + one.records, self._bad + one.bad
            ended = self._last[one.source] == self._next
            if ended or self._records >= self._spec.quarantine.judge_after:
                self._judge(one.source)
            if ended:
                self._records = self._bad = 0
            self._next += 1

    def _judge(self, source: int) -> None:
        limit = self._spec.quarantine.max_share
        if self._bad <= limit * self._records:
            return
        paths = [self._work / part.name(i) for i in range(self._next + 1)]
        listing = _write_quarantine(self._work, paths)
        reasons = [line for line in listing.read_text(encoding="utf-8").splitlines()[-3:]]
        raise ValueError(
            f"input {self._spec.inputs[source].name!r}: {self._bad} of {self._records} records are bad, more than quarantine.max_share "
            f"{limit:g}; the last of them:\n  " + "\n  ".join(reasons) + f"\nAll are in {listing}. Mend the data and give --fresh, or "
            "raise quarantine.max_share and run again: what was finished is kept."
        )


def _remove_copies(
    spec: config_lib.PrepareConfig,
    tasks: list[record.Task],
    reports: list[part.Report],
    work: pathlib.Path,
    *,
    runner: Runner,
    workers: int,
) -> list[int]:
    """How many documents of each part are copies; parts with some, or in another layout than the spec's, have a ``kept`` after this."""
    paths = [work / part.name(task.number) for task in tasks]
    copies = duplicates.mark(paths) if spec.duplicates == "remove_exact" else [0] * len(paths)
    if spec.duplicates == "keep" and spec.store != "records":
        duplicates.mark_none(paths)
    again = [
        part.Job(spec, task, str(work))
        for task, count, report in zip(tasks, copies, reports, strict=True)
        if report.documents and (count or spec.store != "records")
    ]
    for _ in _run(part.rewrite, again, runner=runner, workers=workers):
        pass
    return copies


def _stores(path: pathlib.Path) -> list[pathlib.Path]:
    kept = path / "kept"
    return sorted(kept.glob("store-*")) if kept.exists() else [path / name for name in part.load(path).stores]


def _sources(spec: config_lib.PrepareConfig, reports: list[part.Report], copies: list[int]) -> tuple[Source, ...]:
    found = []
    for number, source in enumerate(spec.inputs):
        own = [(report, count) for report, count in zip(reports, copies, strict=True) if report.source == number]
        refused: dict[str, int] = {}
        for report, _ in own:
            for name, count in report.refused.items():
                refused[name] = refused.get(name, 0) + count
        same = sum(count for _, count in own)
        documents = sum(report.documents for report, _ in own) - same
        records, bad = (sum(getattr(report, name) for report, _ in own) for name in ("records", "bad"))
        found.append(Source(source.name, records, documents, same, bad, dict(sorted(refused.items()))))
    return tuple(found)


def _counts(sources: tuple[Source, ...]) -> str:
    return "; ".join(
        f"{source.name}: {source.records} records, {source.bad} bad, {source.copies} copies, {sum(source.refused.values())} filtered"
        for source in sources
    )


def _write_quarantine(folder: pathlib.Path, parts: list[pathlib.Path]) -> pathlib.Path:
    target = folder / part.QUARANTINE
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        for path in parts:
            with (path / part.QUARANTINE).open("rb") as lines:
                shutil.copyfileobj(lines, file)
    partial.replace(target)
    return target
