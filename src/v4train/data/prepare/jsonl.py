"""JSON lines. A plain file is read in ranges of bytes: a line belongs to the range in which it begins.

So no line is lost or read twice, the ranges need no index, and a line's name (the byte at which it begins) does not depend on them.
"""

import io
import json
import os
import pathlib
from collections.abc import Iterator

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import fields, files, record

LONGEST_LINE = 2**28  # bytes; a longer one is a bad record, not a full memory


def pieces(source: config_lib.JsonLinesConfig, *, task_bytes: int) -> Iterator[record.Piece]:
    """Ranges of plain files; compressed files as a whole."""
    for path in files.find(source.path):
        size = os.path.getsize(path)
        if files.is_packed(path):
            yield record.Piece((path,), size)
        else:
            for start in range(0, size, task_bytes):
                stop = min(size, start + task_bytes)
                yield record.Piece((path,), stop - start, start, stop)


def read(source: config_lib.JsonLinesConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """The records whose lines begin in the task's range."""
    (path,) = task.files
    name, folder, at = files.relative(path, source.path), pathlib.Path(path).parent, task.start
    packed = files.is_packed(path)
    try:
        with files.open_packed(path) as file:
            if task.start:
                file.seek(task.start - 1)
                at += _rest_of_line(file) - 1  # the byte before may be the end of the line before
            while task.stop < 0 or at < task.stop:
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                place, size = f"{path} byte {at}", 0 if packed else len(line)
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    yield record.Bad(place, f"a line of more than {LONGEST_LINE} bytes", size)
                    at += _rest_of_line(file)
                elif line.strip():
                    yield _record(line, place, size, key=f"{name}#{at}", source=source, folder=folder)
                at += len(line)
    except (*files.ENDS_EARLY, OSError) as error:
        yield record.Bad(f"{path} byte {at}", f"unreadable from here on: {files.reason(error)}")


def _rest_of_line(file: io.BufferedIOBase) -> int:
    """Reads on to the next line end; the number of bytes up to and with it."""
    length = 0
    while True:
        part = file.readline(2**20)
        length += len(part)
        if not part or part.endswith(b"\n"):
            return length


def _record(
    line: bytes, place: str, size: int, *, key: str, source: config_lib.JsonLinesConfig, folder: pathlib.Path
) -> record.Record | record.Bad:
    try:
        values = json.loads(line.decode("utf-8-sig"))
        if not isinstance(values, dict):
            return record.Bad(place, f"JSON, but {type(values).__name__} instead of an object", size)
        found = fields.parts(values, source=source, folder=folder)
        return record.Record(place, fields.key(values, source=source, default=f"{source.name}/{key}"), found, size)
    except json.JSONDecodeError as error:
        return record.Bad(place, f"not JSON: {error.msg} at character {error.pos}", size)
    except UnicodeDecodeError as error:
        return record.Bad(place, f"not UTF-8: byte {error.start} of the line", size)
    except (ValueError, RecursionError) as error:
        return record.Bad(place, files.reason(error), size)
