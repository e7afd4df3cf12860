"""Folders and text files: finding them, opening them whatever they are packed with, and reading them as records."""

import contextlib
import glob
import gzip
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import IO

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import record

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SOUNDS = frozenset({".wav", ".ogg", ".flac", ".mp3", ".oga", ".opus", ".aiff", ".aif"})
ENDS_EARLY = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a truncated or damaged compressed file raises; `open_packed` turns zstd's own error into the first."""


def find(pattern: str) -> list[str]:
    """Files that a path or glob names, sorted. An exact path wins over its reading as a glob, so ``a[1].txt`` can be named."""
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def group(paths: list[str], *, task_bytes: int) -> Iterator[record.Piece]:
    """Consecutive files in pieces of about ``task_bytes``, at least one file each."""
    files, size = [], 0
    for path in paths:
        files.append(path)
        size += os.path.getsize(path)
        if size >= task_bytes:
            yield record.Piece(tuple(files), size)
            files, size = [], 0
    if files:
        yield record.Piece(tuple(files), size)


def is_packed(path: str) -> bool:
    """Whether a file is read through a decompressor, and so can only be read from its beginning."""
    return path.endswith((".gz", ".zst"))


@contextlib.contextmanager
def open_packed(path: str) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, decompressed if its name ends in ``.gz`` or ``.zst``.

    Raises:
        ValueError: ``.zst`` without the library for it.
        EOFError: while it is read, if it is damaged or ends early (or another of `ENDS_EARLY`).
    """
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file
        return
    if not path.endswith(".zst"):
        with open(path, "rb") as file:
            yield file
        return
    with open(path, "rb") as raw, io.BufferedReader(_Zstd(path, raw), 2**20) as file:
        yield file


class _Zstd(io.RawIOBase):
    """Frames of zstd, one after another. The library's own reader takes a truncated frame for the end of the file."""

    def __init__(self, path: str, raw: IO[bytes]):
        try:
            import zstandard
        except ImportError:
            remedy = "run `pip install 'v4train[prepare]'`"
            raise ValueError(f"{path}: reading .zst needs zstandard, which is not installed: {remedy}") from None
        self._raw, self._error = raw, zstandard.ZstdError
        self._fresh = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame, self._ready = None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = unused or self._raw.read(2**17)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._fresh()
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from None
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def read_text(source: config_lib.TextConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """Text files as documents of at most about ``document_bytes``, cut at line ends."""
    for path in task.files:
        number, key = 0, f"{source.name}/{relative(path, source.path)}"
        try:
            with open_packed(path) as file:
                for number, block in enumerate(_blocks(file, size=source.document_bytes)):
                    at = f"{path} piece {number}" if number else path
                    try:
                        # Only at the beginning of a file is U+FEFF a mark of its encoding.
                        yield record.Record(at, key, (block.decode("utf-8" if number else "utf-8-sig"),), len(block))
                    except UnicodeDecodeError as error:
                        yield record.Bad(at, f"not UTF-8: byte {error.start} of the piece is {block[error.start]:#04x}", len(block))
        except (*ENDS_EARLY, OSError) as error:
            yield record.Bad(path, f"unreadable after piece {number}: {reason(error)}")


def _blocks(file: io.BufferedIOBase, *, size: int) -> Iterator[bytes]:
    """The file in blocks that end with a line, or, where a line is longer than two blocks, with a character."""
    rest = b""
    while more := file.read(size):
        rest += more
        while len(rest) >= 2 * size:
            cut = rest.rfind(b"\n", 0, size) + 1 or rest.find(b"\n", size, 2 * size) + 1 or _character(rest, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _character(text: bytes, at: int) -> int:
    """The last beginning of a character at or before ``at``."""
    while at > 1 and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def folder(source: config_lib.FolderConfig, *, task_bytes: int) -> Iterator[record.Piece]:
    """The media files of a folder that lead a record: images, or sounds in a folder of sounds."""
    endings = SOUNDS if source.kind == "audio" else IMAGES
    found = (path for path in glob.iglob(f"{glob.escape(source.path)}/**/*", recursive=True))
    yield from group(sorted(path for path in found if pathlib.Path(path).suffix.lower() in endings), task_bytes=task_bytes)


def read_folder(source: config_lib.FolderConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """Each media file with the files of its name beside it, in the order of the layout."""
    for name in task.files:
        path, size = pathlib.Path(name), 0
        parts: list[record.Part] = []
        try:
            size = path.stat().st_size
            for kind in source.layout:
                parts.append(_part(path, kind, caption=source.caption))
        except OSError as error:
            yield record.Bad(name, reason(error), size)
            continue
        except UnicodeDecodeError as error:
            yield record.Bad(name, f"its caption is not UTF-8 (byte {error.start})", size)
            continue
        yield record.Record(name, f"{source.name}/{relative(name, source.path)}", tuple(parts), size)


def beside(source: config_lib.FolderConfig, path: str) -> list[str]:
    """The other files that the record of a media file is read from, as far as they are there."""
    found = (_file(pathlib.Path(path), kind, caption=source.caption) for kind in source.layout)
    return [str(one) for one in found if one is not None and str(one) != path and one.is_file()]


def _file(path: pathlib.Path, kind: config_lib.Kind, *, caption: str) -> pathlib.Path | None:
    """The file of a kind beside (or at) ``path``; None if there is none. A caption may be missing."""
    if kind == "text":
        return path.with_suffix(caption)
    endings = SOUNDS if kind == "audio" else IMAGES
    if path.suffix.lower() in endings:
        return path
    return next((one for one in (path.with_suffix(ending) for ending in sorted(endings)) if one.is_file()), None)


def _part(path: pathlib.Path, kind: config_lib.Kind, *, caption: str) -> record.Part:
    file = _file(path, kind, caption=caption)
    if file is None:
        raise FileNotFoundError(2, f"there is no {kind} file of this name", str(path.with_suffix("")))
    return file.read_text(encoding="utf-8-sig").strip() if kind == "text" else record.Media(kind, file)


def relative(path: str, pattern: str) -> str:
    """The path from the last folder that a pattern names without a wildcard: keys must not depend on where the data lie."""
    fixed = pattern
    if not os.path.isdir(pattern):
        fixed = os.path.dirname(pattern if os.path.isfile(pattern) else re.split(r"[*?\[]", pattern)[0])
    return pathlib.Path(os.path.relpath(path, fixed or ".")).as_posix()


def reason(error: Exception) -> str:
    """One line about an exception of reading."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
