"""What a worker does with one task: read, compose, write; the result is a *part*, a directory that appears by a rename.

    part-00012/report.json        counts, and the names of the stores; written last within the part
    part-00012/contents.npy       16 bytes a document: what it is compared by
    part-00012/quarantine.jsonl   a line for each bad record
    part-00012/store-000/         a whole token store of about `shard_bytes`, and so on

A part depends on its task and the spec only, not on the worker, the machine or what was finished before. That is all that "the same
digests for any number of workers, and after any kill" needs: a part is there whole or not at all, and merging takes parts in the
order of their tasks. Several small stores instead of one bound the memory, since a store's index is kept until it is finished.

Rejected: one writer process that the workers feed (its compression is the bottleneck, and a kill loses the order in which
documents arrived), and resuming within a part (state that has to be right after a kill at any byte, to save a minute).
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from v4train.data import document as document_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import compose, inputs, record
from v4train.data.prepare import config as config_lib

CONTENT = np.dtype([("high", "<u8"), ("low", "<u8")])
REPORT, CONTENTS, QUARANTINE, DROP = "report.json", "contents.npy", "quarantine.jsonl", "drop.npy"


@dataclasses.dataclass(frozen=True)
class Job:
    """A task, its spec, and the directory in which parts are made. Pickles."""

    spec: config_lib.PrepareConfig
    task: record.Task
    work: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of a part.

    Attributes:
        task: its number.
        source: number of its input.
        size: bytes of input.
        records: found, good or bad.
        bad: of these, in quarantine.
        refused: left out, by filter.
        documents: written.
        tokens: written, placeholders included.
        stores: names of the directories within the part.
        digest: of what lies in the part beside the stores.
    """

    task: int
    source: int
    size: int
    records: int
    bad: int
    refused: dict[str, int]
    documents: int
    tokens: int
    stores: tuple[str, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class Advance:
    """Work done since the last call, for a progress bar."""

    records: int
    tokens: int
    size: int


def name(task: int) -> str:
    """Directory of a task's part."""
    return f"part-{task:06d}"


def load(path: pathlib.Path) -> Report:
    """The report of a finished part."""
    values = json.loads((path / REPORT).read_text())
    return Report(**values | {"stores": tuple(values["stores"])})


def _digest(path: pathlib.Path) -> str:
    return " ".join(store_lib.file_sha256(path / file) for file in (CONTENTS, QUARANTINE))


def is_intact(path: pathlib.Path) -> bool:
    """Whether every byte of a part is what was written: after a power cut a file may be there by name only."""
    try:
        report = load(path)
        for directory in [*(path / name for name in report.stores), *path.glob("kept/store-*")]:
            store_lib.TokenStore.open(directory).verify()
        return report.digest == _digest(path)
    except (ValueError, TypeError, KeyError, OSError):
        return False


def write(job: Job, *, advance: Callable[[Advance], None] = lambda _: None) -> Report:
    """Makes the part of a job, unless it is there.

    Raises:
        OSError: it cannot be written.
    """
    final = pathlib.Path(job.work) / name(job.task.number)
    if final.exists():
        return load(final)
    with _appearing(final) as directory:
        return _fill(directory, job, advance=advance)


def rewrite(job: Job) -> int:
    """Writes the documents of a part that `DROP` does not mark once more, in the spec's layout, into ``kept`` within the part.

    Returns:
        The task's number.
    """
    final = pathlib.Path(job.work) / name(job.task.number)
    if not (final / "kept").exists():
        drop = np.load(final / DROP, mmap_mode="r")
        with _appearing(final / "kept") as directory, _Stores(directory, job.spec, layout=job.spec.store) as stores:
            first = 0
            for store in load(final).stores:
                opened = store_lib.TokenStore.open(final / store)
                for i in range(len(opened)):
                    if not drop[first + i]:
                        stores.add(opened.read(i))
                first += len(opened)
    return job.task.number


def _fill(directory: pathlib.Path, job: Job, *, advance: Callable[[Advance], None]) -> Report:
    spec, task = job.spec, job.task
    tokenizer = _tokenizer(spec)
    composer = compose.Composer(spec, tokenizer)
    refused, counts = collections.Counter(), collections.Counter()
    with (
        _Stores(directory, spec, layout="records") as stores,
        # Names of files may be no UTF-8; the bytes of these come as surrogates, for which this writes JSON's escapes.
        open(directory / QUARANTINE, "w", encoding="utf-8", errors="backslashreplace") as quarantine,
        open(directory / CONTENTS, "wb") as contents,
    ):
        for found in inputs.read(spec, task):
            made = found if isinstance(found, record.Bad) else composer.compose(found, source=task.source)
            counts["records"] += 1
            tokens = 0
            if isinstance(made, record.Bad):
                counts["bad"] += 1
                line = {"input": spec.inputs[task.source].name, "record": made.at, "reason": made.reason}
                quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
            elif isinstance(made, compose.Refused):
                refused[made.filter] += 1
            else:
                stores.add(made.document)
                contents.write(made.content)
                tokens = len(made.document.tokens)
                counts["tokens"] += tokens
            advance(Advance(1, tokens, found.size))
    numbers = (task.number, task.source, task.size, counts["records"], counts["bad"], dict(refused), stores.documents, counts["tokens"])
    report = Report(*numbers, tuple(stores.names), _digest(directory))
    (directory / REPORT).write_text(json.dumps(dataclasses.asdict(report)) + "\n")
    return report


_TOKENIZERS: dict[str, tokenizer_lib.Tokenizer] = {}


def _tokenizer(spec: config_lib.PrepareConfig) -> tokenizer_lib.Tokenizer:
    """Of a spec; kept, because a worker has many tasks and loading a vocabulary takes half a second."""
    key = spec.tokenizer.model_dump_json()
    if key not in _TOKENIZERS:
        _TOKENIZERS.clear()
        _TOKENIZERS[key] = tokenizer_lib.build(spec.tokenizer)
    return _TOKENIZERS[key]


class _Stores:
    """Writes documents into one small store after another."""

    def __init__(self, directory: pathlib.Path, spec: config_lib.PrepareConfig, *, layout: Literal["records", "flat"]):
        self._directory, self._spec = directory, spec
        self._layout: Literal["records", "flat"] = layout
        self.names: list[str] = []
        self.documents = 0
        self._writer: store_lib.TokenStoreWriter | None = None
        self._bytes = 0

    def __enter__(self) -> "_Stores":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._close(kind, error, trace)

    def add(self, document: document_lib.Document) -> None:
        if self._writer is None:
            self._open()
        assert self._writer is not None
        self._writer.add(document)
        self.documents += 1
        self._bytes += 4 * len(document.tokens) + document.patches.nbytes + document.audio.nbytes
        if self._bytes >= self._spec.shard_bytes:
            self._close(None, None, None)

    def _open(self) -> None:
        self.names.append(f"store-{len(self.names):03d}")
        spec = self._spec
        self._writer = store_lib.TokenStoreWriter(
            self._directory / self.names[-1],
            tokenizer=_tokenizer(spec),
            image_patch=spec.image.patch,
            licence=spec.licence,
            origin=spec.origin,
            compression=f"zstd:{spec.compression}",
            shard_tokens=2**62,
            layout=self._layout,
        )
        self._writer.__enter__()
        self._bytes = 0

    def _close(self, kind, error, trace) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.__exit__(kind, error, trace)
        if kind is None:
            # A full disk may show only in a short file, whose digest would then be that of the damage.
            opened = store_lib.TokenStore.open(writer.path)
            opened.read(len(opened) - 1)


@contextlib.contextmanager
def _appearing(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill; it is at ``final`` once that went well. Two that make the same do not meet.

    Nothing waits for the disk here. A rename may therefore survive a power cut that its content did not, and `is_intact` finds that
    out when a preparation goes on; syncing thousands of small files costs more than reading them once.
    """
    directory = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    try:
        directory.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(directory)
