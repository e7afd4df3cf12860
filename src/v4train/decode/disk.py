"""Blocks on disk, each under the hash of what it holds, which outlive the process.

A block is a file: 64 bytes of header (magic, version, key, length, CRC32C of key and content) and the content. It is written under another
name, synced, read back and compared with its sum, and then renamed: whatever stops the process, a name either holds a whole block or
nothing. What is read is compared with its sum and its key. A block that differs is a miss: it is deleted and counted, and whoever asked
computes what it held.

Blocks leave in the order in which they were used last (a file's time of modification keeps it over restarts), before a new one would exceed
the limit. A disk that cannot be written ends the writing, with one message; what is there is still read.

One process at a time has the directory, held by a lock that ends with the process however it ends: a second one is refused. (Sharing would
need a common account of sizes and uses; a directory for each server needs nothing.)

Blocks are written by a thread of their own. When `_WAITING` of them wait, whoever brings the next one waits too: memory is bounded, and no
block is left out.
"""

import collections
import contextlib
import fcntl
import logging
import os
import pathlib
import queue
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any

from v4train.decode import crc

_log = logging.getLogger(__name__)
_HEADER = struct.Struct("<8sII32sQI4x")
_MAGIC, _VERSION = b"v4tblock", 1
_WAITING = 64
_TEMPORARY = ".tmp"
_OFF = "blocks that are there are still read, new ones are not kept until the next start"


def refusal(path: pathlib.Path, error: OSError) -> ValueError:
    """What to say of a directory that cannot be used."""
    reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    return ValueError(f"decode.tiers.disk.path {path}: {reason}: give a directory that can be written")


class Blocks:
    """The blocks of one directory."""

    def __init__(self, path: pathlib.Path, *, limit: int):
        """Opens the directory, or makes it; remains of writers that were killed are deleted.

        Raises:
            ValueError: it cannot be written, or another process has it.
        """
        self._sum, self._root, self._limit = crc.crc32c(), path, limit
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._scan()
        except OSError as error:
            raise refusal(path, error) from None
        self._mutex = threading.Lock()
        self._jobs: queue.Queue[tuple[bytes, Callable[[], bytes]] | None] = queue.Queue(_WAITING)
        self._pending: set[bytes] = set()
        self.off = False
        self.counts = dict.fromkeys(("disk_hits", "disk_misses", "disk_written", "disk_evictions", "crc_failures"), 0)
        self._writer = threading.Thread(target=self._write_all, name="cache writer", daemon=True)
        self._writer.start()

    def __contains__(self, key: bytes) -> bool:
        with self._mutex:
            return key in self._index

    @property
    def used(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    def get(self, key: bytes) -> Any:
        """The content of a block, as bytes; None if there is none, or a damaged one."""
        with self._mutex:
            known = key in self._index
            if known:
                self._index.move_to_end(key)
        content = self._read(key) if known else None
        self.counts["disk_hits" if content is not None else "disk_misses"] += 1
        if content is None and known:
            self._remove(key)
        return content

    def put(self, key: bytes, make: Callable[[], bytes]) -> None:
        """Writes a block later, unless it is there already; ``make`` is called in the writer's thread."""
        with self._mutex:
            if self.off or key in self._index or key in self._pending:
                return
            self._pending.add(key)
        self._jobs.put((key, make))

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used, in this order."""
        for key in keys:
            with self._mutex:
                if key not in self._index:
                    continue
                self._index.move_to_end(key)
            with contextlib.suppress(OSError):
                os.utime(self._file(key))

    def flush(self) -> None:
        """Waits for all blocks to be written."""
        self._jobs.join()

    def close(self) -> None:
        """Writes what waits, and lets the directory go."""
        self._jobs.put(None)
        self._writer.join()
        os.close(self._lock_file)

    def statistics(self) -> dict[str, float]:
        """Counts since the start (``_total``), and bytes of now."""
        return {f"{name}_total": float(value) for name, value in self.counts.items()} | {"disk_bytes": float(self._bytes)}

    def _scan(self) -> None:
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise ValueError(
                f"decode.tiers.disk.path {self._root} is in use by another process: give each its own directory, or end the other one"
            ) from None
        found = []
        for file in (self._root / "blocks").glob("*/*"):
            if file.suffix == _TEMPORARY:
                file.unlink(missing_ok=True)
                continue
            with contextlib.suppress(ValueError, FileNotFoundError):
                state = file.stat()
                found.append((state.st_mtime_ns, bytes.fromhex(file.name), state.st_size))
        self._index: collections.OrderedDict[bytes, int] = collections.OrderedDict((key, size) for _, key, size in sorted(found))
        self._bytes = sum(self._index.values())

    def _file(self, key: bytes) -> pathlib.Path:
        name = key.hex()
        return self._root / "blocks" / name[:2] / name

    def _read(self, key: bytes) -> bytes | None:
        try:
            data = self._file(key).read_bytes()
        except OSError as error:
            _log.warning("a cache block cannot be read (%s): what it held is computed again", error)
            return None
        if (content := self._content(key, data)) is None:
            self.counts["crc_failures"] += 1
            _log.warning("cache block %s is damaged: what it held is computed again", self._file(key))
        return content

    def _content(self, key: bytes, data: bytes) -> bytes | None:
        if len(data) < _HEADER.size:
            return None
        content = data[_HEADER.size :]
        return content if data[: _HEADER.size] == self._header(key, content) else None

    def _header(self, key: bytes, content: bytes) -> bytes:
        return _HEADER.pack(_MAGIC, _VERSION, 0, key, len(content), self._sum(key + content))

    def _remove(self, key: bytes) -> None:
        with self._mutex:
            self._bytes -= self._index.pop(key, 0)
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, make = job
            try:
                if not self.off:
                    self._write(key, make())
            except OSError as error:
                self.off = True
                _log.error("%s cannot be written (%s): %s", self._root, error.strerror or error, _OFF)
            except Exception:
                self.off = True
                _log.exception("a cache block cannot be made: %s", _OFF)
            finally:
                with self._mutex:
                    self._pending.discard(key)
                self._jobs.task_done()
        self._jobs.task_done()

    def _write(self, key: bytes, content: bytes) -> None:
        size = _HEADER.size + len(content)
        if size > self._limit:
            return
        while self._bytes + size > self._limit:
            with self._mutex:
                oldest = next(iter(self._index))
            self._remove(oldest)
            self.counts["disk_evictions"] += 1
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + _TEMPORARY)
        try:
            with temporary.open("wb") as stream:
                stream.write(self._header(key, content))
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if self._content(key, temporary.read_bytes()) is None:
                raise OSError(f"{temporary} does not hold what was written to it")
            temporary.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with self._mutex:
            self._index[key] = size
            self._bytes += size
        self.counts["disk_written"] += 1
