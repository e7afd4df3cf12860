"""What a reader yields: one record as it was found, or the reason why there is none; and the pieces of input that are read at a time."""

import dataclasses
import pathlib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Media:
    """An image or a sound that has not been decoded: the bytes of its file, or where the file is."""

    kind: Literal["image", "audio"]
    source: bytes | pathlib.Path


Part = str | Media


@dataclasses.dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        at: its place in the input, for messages: file and line, row or member.
        key: names the document.
        parts: in reading order.
        size: bytes of input that it took, as far as known; for progress only.
    """

    at: str
    key: str
    parts: tuple[Part, ...]
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used: its place, the reason, and the bytes of input that it took."""

    at: str
    reason: str
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of one input that a worker reads in one go; which pieces there are follows from the spec and the files alone.

    Attributes:
        number: of the task, counted over all inputs.
        source: number of the input in the spec.
        files: what to read, in order.
        start: first byte (JSON lines) or row group (Parquet) of the only file.
        stop: one past the last; -1 for all.
        size: bytes of input.
    """

    number: int
    source: int
    files: tuple[str, ...]
    start: int = 0
    stop: int = -1
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """A task that has no number yet: files, first and last byte or row group, bytes."""

    files: tuple[str, ...]
    size: int
    start: int = 0
    stop: int = -1
