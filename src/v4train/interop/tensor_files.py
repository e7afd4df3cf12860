"""Directories of safetensors files, read and written a tensor at a time, whatever the size of the model.

::

    DIR/
      model.safetensors                    one file, or
      model-00001-of-00003.safetensors     several (shards) ..
      model.safetensors.index.json         .. and which tensor is in which: {"metadata": {"total_size": 7}, "weight_map": {name: file}}
      checksums.json                       the digests of the files above: {"files": {file: {"bytes": 7, "sha256": ".."}}, ..}

`TensorFiles` checks a directory as a whole before anything is read, from its headers alone, and reports all that is wrong with it in one
message. Bytes are read at their offset into a fresh array, so memory is that of the tensors that the caller holds. The rejected
alternative, a memory map, is convenient and fast, but what was read stays resident as long as the map, and a limit on a job's memory
counts it.

`TensorFilesWriter` knows all names, dtypes and shapes before the first tensor, thus where each byte goes. So tensors may come in any order,
from several threads, and none is kept. A file is flushed and digested as soon as its last tensor is there, while the page cache still
has it.

`complete_directory` lets the directory appear under its name only when it is complete: until then it is a hidden sibling, which the next
attempt removes if its process was killed. Continuing a half-written one was rejected: it needs a journal of what is on the disk, while
the whole conversion takes about as long as a copy.

``total_size`` of an index is written, and a wrong one in a foreign index is logged, no more. DeepSeek-V3's own states twice the size of
its files (two bytes per parameter, for FP8), and the headers tell the truth about truncation.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from v4train.checkpoint import integrity
from v4train.interop import safetensors_file

_log = logging.getLogger(__name__)

TensorInfo = safetensors_file.TensorInfo
STEM = "model"
CHECKSUMS = "checksums.json"
SHARD_BYTES = 5_000_000_000

# One system call moves less than 2 GiB; pieces also keep a copy of a strided array small.
_PIECE = 2**26
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TensorFiles:
    """The tensors of a directory.

    Attributes:
        directory: where they are.
        table: dtype, shape and place of each, by name, sorted.
        files: that hold them, with the index if there is one.
    """

    def __init__(self, directory: pathlib.Path, *, table: dict[str, TensorInfo], files: tuple[str, ...]):
        self.directory, self.table, self.files = directory, table, files

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, stem: str = STEM) -> "TensorFiles":
        """Checks the headers of all files against each other and the index.

        Args:
            directory: that holds them.
            stem: ``model`` for ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.

        Raises:
            ValueError: something is missing, damaged or contradictory; the message lists everything.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        index = _read_index(directory, stem=stem)
        table: dict[str, TensorInfo] = {}
        problems = index.problems
        for file in index.files:
            header = safetensors_file.read_header(directory / file)
            problems += header.problems
            problems += [f"{name} is in {table[name].file} and again in {file}" for name in header.tensors if name in table]
            table |= header.tensors
            if index.name and not header.problems:
                problems += _against_index(header.tensors, weight_map=index.weight_map, file=file)
        _raise(problems, directory=directory)
        total = sum(info.nbytes for info in table.values())
        if index.total_size not in (None, total):
            _log.warning("%s states a size of %s bytes, but the tensors have %d", directory / index.name, index.total_size, total)
        return cls(directory, table=dict(sorted(table.items())), files=(*index.files, *filter(None, [index.name])))

    def read(self, name: str, *, rows: slice | None = None) -> np.ndarray:
        """One tensor, or consecutive rows of it (along the first axis), in a fresh array of its stored dtype.

        Raises:
            ValueError: there is no such tensor, or the file has changed since it was opened.
        """
        if name not in self.table:
            raise ValueError(f"{self.directory} has no tensor {name}")
        info = self.table[name]
        shape, offset = info.shape, info.offset
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            assert step == 1, rows
            shape = (max(stop - start, 0), *shape[1:])
            offset += start * math.prod(shape[1:]) * info.dtype.itemsize
        array = np.empty(shape, info.dtype)
        view = array.reshape(-1).view(np.uint8).data
        try:
            with open(self.directory / info.file, "rb", buffering=0) as stream:
                done = 0
                while done < len(view):
                    count = os.preadv(stream.fileno(), [view[done : done + _PIECE]], offset + done)
                    if not count:
                        raise ValueError(f"{self.directory / info.file} became shorter while it was read: {name} is not in it as a whole")
                    done += count
        except OSError as error:
            raise ValueError(f"{self.directory / info.file} cannot be read: {error.strerror}") from error
        return array

    def verify(self, *, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compares the files with the list of digests, if the directory has one.

        Args:
            progress: is told the bytes read so far and in total.

        Returns:
            How many files were compared: 0 without a list.

        Raises:
            ValueError: files differ from the list; the message names all of them.
        """
        if not (self.directory / CHECKSUMS).exists():
            return 0
        listed = _read_checksums(self.directory)
        total, done, problems = sum(listed[name]["bytes"] for name in self.files if name in listed), 0, []
        for name in self.files:
            if name not in listed:
                problems.append(f"{name} is not in {CHECKSUMS}")
                continue
            found = _digest(self.directory / name, progress=lambda count, done=done: progress(done + count, total))
            done += listed[name]["bytes"]
            if found["bytes"] != listed[name]["bytes"]:
                problems.append(f"{name} has {found['bytes']} bytes, not the {listed[name]['bytes']} of {CHECKSUMS}")
            elif found["sha256"] != listed[name]["sha256"]:
                problems.append(f"{name} does not have the digest of {CHECKSUMS}: its content has changed")
        _raise(problems, directory=self.directory)
        return len(self.files)


@dataclasses.dataclass
class _Shard:
    unclaimed: set[str]
    unwritten: int


class TensorFilesWriter:
    """Writes tensors into shards that were laid out beforehand.

    Args:
        directory: exists, and holds none of the files.
        tensors: dtype and shape of every tensor, by name; tensors are put into shards in this order.
        shard_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.
        stem: of the file names, see `TensorFiles.open`.

    Raises:
        ValueError: a dtype that the format lacks, or too little space on the disk; here or, if somebody else takes the space, in `write`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        shard_bytes: int = SHARD_BYTES,
        stem: str = STEM,
    ):
        self.directory, self._stem = pathlib.Path(directory), stem
        described = {name: (np.dtype(dtype), tuple(int(size) for size in shape)) for name, (dtype, shape) in tensors.items()}
        unknown = [f"{name} has the dtype {dtype}" for name, (dtype, _) in described.items() if dtype not in safetensors_file.NAMES]
        if unknown:
            raise ValueError(f"safetensors knows only {', '.join(safetensors_file.DTYPES)}; " + "; ".join(unknown))
        assert "__metadata__" not in described
        self._shards: dict[str, _Shard] = {}
        self._digests: dict[str, dict] = {}
        self._lock = threading.Lock()
        self.table: dict[str, TensorInfo] = {}
        headers = self._lay_out(described, shard_bytes=shard_bytes)
        _require_space(self.directory, nbytes=self.nbytes + sum(map(len, headers.values())))
        for file, header in headers.items():
            with disk_errors(self.directory), open(self.directory / file, "xb") as stream:
                stream.write(header)
                stream.truncate(len(header) + sum(self.table[name].nbytes for name in self._shards[file].unclaimed))
            self._complete(file)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(info.nbytes for info in self.table.values())

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor. May be called from several threads.

        Raises:
            ValueError: a name, dtype or shape that was not announced, a tensor that was written before, or no space left.
        """
        info = self.table.get(name)
        if info is None:
            raise ValueError(f"{name} was not announced to the writer of {self.directory}")
        if array.dtype != info.dtype or array.shape != info.shape:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, but was announced as {info.dtype} {list(info.shape)}")
        shard = self._shards[info.file]
        with self._lock:
            if name not in shard.unclaimed:
                raise ValueError(f"{name} was written before")
            shard.unclaimed.remove(name)
        with disk_errors(self.directory):
            _write_at(self.directory / info.file, array=array, offset=info.offset)
        with self._lock:
            shard.unwritten -= 1
        self._complete(info.file)

    def finish(self) -> None:
        """Writes the index, if there are several files, and adds the files to the list of digests.

        Raises:
            ValueError: tensors were announced and not written; the message lists them.
        """
        missing = sorted(name for shard in self._shards.values() for name in shard.unclaimed)
        if missing:
            raise ValueError(f"{len(missing)} tensors of {self.directory} were never written: {', '.join(missing)}")
        with disk_errors(self.directory):
            if len(self._shards) > 1:
                weight_map = {name: info.file for name, info in sorted(self.table.items())}
                index = self.directory / _index_name(self._stem)
                integrity.write_json(index, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})
                self._digests[index.name] = _digest(index)
            listed = _read_checksums(self.directory) if (self.directory / CHECKSUMS).exists() else {}
            (self.directory / CHECKSUMS).unlink(missing_ok=True)
            integrity.write_json(self.directory / CHECKSUMS, {"format": 1, "files": listed | self._digests})

    def _lay_out(self, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], *, shard_bytes: int) -> dict[str, bytes]:
        groups: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
        filled = 0
        for name, (dtype, shape) in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if groups[-1] and filled + nbytes > shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = dtype, shape
            filled += nbytes
        headers = {}
        for number, group in enumerate(groups, 1):
            file = f"{self._stem}.safetensors" if len(groups) == 1 else f"{self._stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            headers[file], offsets = safetensors_file.encode_header(group)
            for name, (dtype, shape) in group.items():
                nbytes = math.prod(shape) * dtype.itemsize
                self.table[name] = TensorInfo(dtype, shape, file, len(headers[file]) + offsets[name], nbytes)
            self._shards[file] = _Shard(set(group), len(group))
        return headers

    def _complete(self, file: str) -> None:
        if not self._shards[file].unwritten:
            with disk_errors(self.directory):
                with open(self.directory / file, "rb") as stream:
                    os.fsync(stream.fileno())
                self._digests[file] = _digest(self.directory / file)


@contextlib.contextmanager
def complete_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A directory that appears only when it is complete.

    ::

        with complete_directory("out") as temporary:
            ...  # write files into temporary

    Yields:
        An empty hidden sibling of the path. At the end it is flushed to the disk and renamed; after an exception it is removed.

    Raises:
        ValueError: there is something at the path already (an empty directory is allowed), another process is writing to it, or the
            operating system cannot write there (no space left, no permission); nothing is left then.
    """
    path = pathlib.Path(os.path.abspath(path))
    with disk_errors(path):
        taken = path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir())))
    if taken:
        raise ValueError(f"{path} exists already; remove it, or choose another directory")
    temporary = path.with_name(f".{path.name}.incomplete")
    with contextlib.ExitStack() as stack:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftover(temporary)
            temporary.mkdir()
            stack.callback(os.close, _lock(temporary))
        try:
            with disk_errors(path, only=_FULL):  # other errors of the caller's are about other places
                yield temporary
            with disk_errors(path):
                _flush(temporary)
                os.rename(temporary, path)
                integrity.flush_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def disk_errors(path: pathlib.Path, *, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns what the operating system says about a place to write to into a message to the user.

    Args:
        path: the place.
        only: the error numbers to turn, others pass; all if empty.

    Raises:
        ValueError: there is no space, permission, or device any more; the message names the place.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ValueError(f"no space left to write {path} ({error.strerror}); free some, or choose another directory") from error
        if only:
            raise
        raise ValueError(f"{path} cannot be written: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Index:
    """``name`` is empty, and the map too, where a single file needs none; ``files`` are those worth looking into."""

    name: str
    weight_map: dict[str, str]
    total_size: object
    files: tuple[str, ...]
    problems: list[str]


def _read_index(directory: pathlib.Path, *, stem: str) -> _Index:
    name, single = _index_name(stem), f"{stem}.safetensors"
    there = (directory / single).exists()
    if not (directory / name).exists():
        if there:
            return _Index("", {}, None, (single,), [])
        shards = ", ".join(sorted(path.name for path in directory.glob(f"{stem}-*.safetensors")))
        return _Index("", {}, None, (), [f"there is neither {single} nor {name}" + (f", only {shards}" if shards else "")])
    try:
        content = json.loads((directory / name).read_bytes())
        weight_map, metadata = content["weight_map"], content.get("metadata")
    except OSError as error:
        return _Index(name, {}, None, (), [f"{name} cannot be read: {error.strerror}"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _Index(name, {}, None, (), [f"{name} is no index or was damaged ({type(error).__name__}: {error})"])
    if not isinstance(weight_map, dict) or not weight_map:
        return _Index(name, {}, None, (), [f"{name} is no index: its weight_map lists nothing"])
    strange = {tensor: file for tensor, file in weight_map.items() if not _is_name(file)}
    problems = [f"{name} says that {tensor} is in {file!r}, which is no file of this directory" for tensor, file in strange.items()]
    files = tuple(sorted({file for tensor, file in weight_map.items() if tensor not in strange}))
    if there and single not in files:
        problems.append(f"there is {single}, and {name} that does not mention it; remove the one that does not belong here")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _Index(name, weight_map, total_size, files, problems)


def _against_index(tensors: Mapping[str, TensorInfo], *, weight_map: Mapping[str, str], file: str) -> list[str]:
    listed = {name for name, where in weight_map.items() if where == file}
    problems = []
    if absent := sorted(listed - tensors.keys()):
        problems.append(f"{file} lacks tensors that the index says are in it: {', '.join(absent)}")
    if extra := sorted(tensors.keys() - listed):
        problems.append(f"{file} has tensors that the index does not list for it: {', '.join(extra)}")
    return problems


def _read_checksums(directory: pathlib.Path) -> dict[str, dict]:
    try:
        files = json.loads((directory / CHECKSUMS).read_bytes())["files"]
        if all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in files.values()):
            return files
    except OSError as error:
        raise ValueError(f"{directory / CHECKSUMS} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{directory / CHECKSUMS} is no list of digests, or was damaged; without that file nothing is compared")


def _digest(path: pathlib.Path, *, progress: Callable[[int], None] = lambda done: None) -> dict:
    digest, done, buffer = hashlib.sha256(), 0, memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress(done)
    return {"bytes": done, "sha256": digest.hexdigest()}


def _write_at(path: pathlib.Path, *, array: np.ndarray, offset: int) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    with open(path, "r+b", buffering=0) as stream:
        done = 0
        while done < len(view):
            done += os.pwrite(stream.fileno(), view[done : done + _PIECE], offset + done)


def _require_space(directory: pathlib.Path, *, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise ValueError(f"no space left to write {directory}: {nbytes:,} bytes are needed and {free:,} are free")


def _remove_leftover(temporary: pathlib.Path) -> None:
    if not temporary.exists():
        return
    descriptor = _lock(temporary)
    try:
        _log.info("removing %s, which a process that was stopped did not finish", temporary)
        shutil.rmtree(temporary)
    finally:
        os.close(descriptor)


def _lock(temporary: pathlib.Path) -> int:
    """Holds a directory until the descriptor is closed or the process ends, however it ends."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{temporary} is being written by another process; wait for it, or choose another directory") from None
    except OSError as error:
        _log.warning("%s is on a file system without locks (%s): nothing stops a second process there", temporary, error.strerror)
    return descriptor


def _flush(directory: pathlib.Path) -> None:
    for path in sorted(directory.rglob("*")):
        integrity.flush_directory(path)
    integrity.flush_directory(directory)


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _is_name(file: object) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and pathlib.PurePath(file).name == file


def _raise(problems: list[str], *, directory: pathlib.Path) -> None:
    if problems:
        raise ValueError(f"{directory} cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
