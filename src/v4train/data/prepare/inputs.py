"""The table of input formats, and the tasks that a spec consists of."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import decode, fields, files, jsonl, parquet, record, webdataset


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of input is read.

    Attributes:
        pieces: ``(source, task_bytes=...)`` -> what is read in one go.
        read: ``(source, task)`` -> its records.
        kinds: which parts a record may have, from the source.
        check: raises a ValueError if a library is missing.
        beside: ``(source, path)`` -> further files that are read with a file of a task.
    """

    pieces: Callable[..., Iterator[record.Piece]]
    read: Callable[[Any, record.Task], Iterator[record.Record | record.Bad]]
    kinds: Callable[[Any], set[config_lib.Kind]]
    check: Callable[[], None] = lambda: None
    beside: Callable[[Any, str], list[str]] = lambda source, path: []


def _text_pieces(source: config_lib.TextConfig, *, task_bytes: int) -> Iterator[record.Piece]:
    yield from files.group(files.find(source.path), task_bytes=task_bytes)


def _layout(source: Any) -> set[config_lib.Kind]:
    return set(source.layout)


_FOLDER = Format(files.folder, files.read_folder, _layout, beside=files.beside)
FORMATS: dict[type, Format] = {
    config_lib.JsonLinesConfig: Format(jsonl.pieces, jsonl.read, fields.kinds),
    config_lib.ParquetConfig: Format(parquet.pieces, parquet.read, fields.kinds, parquet.check_extra),
    config_lib.WebDatasetConfig: Format(webdataset.pieces, webdataset.read, _layout),
    config_lib.TextConfig: Format(_text_pieces, files.read_text, lambda _: {"text"}),
    config_lib.ImagesConfig: _FOLDER,
    config_lib.AudioConfig: _FOLDER,
    config_lib.TriplesConfig: _FOLDER,
}


def tasks(spec: config_lib.PrepareConfig) -> list[record.Task]:
    """All that there is to read, in the order of the store.

    Raises:
        ValueError: an input names nothing, or needs a library that is not installed; all of these at once.
    """
    found: list[record.Task] = []
    problems: list[str] = []
    for number, source in enumerate(spec.inputs):
        form = FORMATS[type(source)]
        try:
            form.check()
            decode.check_extras(form.kinds(source))
            pieces = list(form.pieces(source, task_bytes=spec.task_bytes))
        except ValueError as error:
            problems.append(f"inputs.{number} ({source.name}): {error}")
            continue
        if not pieces:
            problems.append(f"inputs.{number} ({source.name}): path {source.path!r} names no file to read (from {os.getcwd()})")
        for piece in pieces:
            found.append(record.Task(len(found), number, piece.files, piece.start, piece.stop, piece.size))
    if problems:
        raise ValueError("\n".join([f"{len(problems)} input(s) cannot be prepared:", *(f"  - {problem}" for problem in problems)]))
    return found


def read(spec: config_lib.PrepareConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """The records of a task."""
    source = spec.inputs[task.source]
    return FORMATS[type(source)].read(source, task)


def digest(spec: config_lib.PrepareConfig, listed: list[record.Task], *, tokenizer: str) -> str:
    """Changes with everything that the finished store depends on, as far as names, sizes and times of the input files tell.

    Captions and other files of one name count as input files; media that lines of JSON or rows of Parquet name do not, because
    finding out which these are means reading everything.
    """
    asked = spec.model_dump(mode="json", exclude={"output", "workers", "quarantine"})
    hashed = hashlib.sha256(json.dumps([asked, tokenizer], sort_keys=True).encode())
    read_from: set[str] = set()
    for task in listed:
        hashed.update(json.dumps(dataclasses.astuple(task)).encode())
        source = spec.inputs[task.source]
        beside = FORMATS[type(source)].beside
        read_from.update(*([path, *beside(source, path)] for path in task.files))
    for path in sorted(read_from):
        status = os.stat(path)
        hashed.update(os.fsencode(path) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()
