"""Where measurements go: one stream of records, several sinks.

A record is a flat dict with a ``kind`` (train, eval, experts) and a ``step``. Values that are not finite are written as null: JSON has no
NaN.
"""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]
Sink = Callable[[Record], None]


class JsonLines:
    """Appends every record to a file, a line each, flushed at once: a killed run keeps what it has measured."""

    def __init__(self, path: pathlib.Path):
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, record: Record) -> None:
        self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes the numbers of train and eval records as scalars."""

    def __init__(self, directory: pathlib.Path, *, start: int):
        import tensorboardX  # 0.3 s that a run without TensorBoard does not pay

        # It shows values that are not finite as such, and would warn of each in words without a step or a name; the run says it better.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=start, write_to_disk=True)

    def __call__(self, record: Record) -> None:
        if record["kind"] == "experts":
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def to_all(sinks: Sequence[Sink]) -> Sink:
    """One sink that feeds all."""

    def write(record: Record) -> None:
        for sink in sinks:
            sink(record)

    return write


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file, without a torn last line; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _drop_torn_line(path: pathlib.Path) -> None:
    """A run killed while writing leaves half a line; the next record must not be glued to it."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
