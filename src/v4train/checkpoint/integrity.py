"""The manifest: which files a step has, their sizes and digests, and what is wrong with those on the disk.

Neither Orbax nor TensorStore digests a checkpoint as a whole: a data file that lost a block is noticed, at best, when the array in
it is decoded; uncompressed chunks decode to anything. So the last file of a step lists all others with size and SHA-256, and
carries a digest of that list. What is not in order is a `Finding` that names the file.

On a cluster each host digests the files it wrote and leaves the list as a *share*; the first host merges the shares. Thus nobody
reads what another has written, and a missing share tells that a host failed.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable

MANIFEST = "manifest.json"

# Hashing releases the GIL; more threads than this only seek against each other.
_THREADS = 8

# Indices and metadata are digested even when digests are off: it costs nothing, and they are what a reader trips over.
_SMALL_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a step."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}"


def digest_files(directory: pathlib.Path, *, only: Callable[[str], bool] = lambda name: True) -> dict[str, dict]:
    """Flushes files to the disk and digests them.

    Args:
        directory: of the step.
        only: takes a file's name relative to the directory, and says whether it is wanted.

    Returns:
        Name -> ``{"bytes": size, "sha256": hex digest}``, sorted by name.
    """
    paths = [path for path in directory.rglob("*") if path.is_file()]
    names = sorted(name for path in paths if only(name := path.relative_to(directory).as_posix()))

    def describe(name: str) -> dict:
        with open(directory / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def write_share(directory: pathlib.Path, *, host: int, files: dict[str, dict]) -> None:
    """Leaves the digests of one host's files for the first host."""
    write_json(directory / _share_name(host), files)


def merge_shares(directory: pathlib.Path, *, hosts: Iterable[int]) -> dict[str, dict]:
    """Takes the digests that other hosts left.

    Raises:
        OSError: a host left none, because it could not write its part.
    """
    merged = {}
    for host in hosts:
        share = directory / _share_name(host)
        if not share.exists():
            raise OSError(f"host {host} could not write its part (its own log says why)")
        merged |= json.loads(share.read_bytes())
        share.unlink()
    return merged


def write_manifest(directory: pathlib.Path, *, files: dict[str, dict]) -> None:
    """Completes a step: everything it lists is on the disk before the manifest itself is."""
    for path in directory.rglob("*"):
        if path.is_dir():
            flush_directory(path)
    write_json(directory / MANIFEST, {"format": 1, "files": files, "sha256": _list_digest(files)})
    flush_directory(directory)


def find_damage(directory: pathlib.Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> list[Finding]:
    """Compares a step with its manifest.

    Args:
        directory: of the step.
        digests: read every file and compare its digest; otherwise compare presence and size, and digests of small files only.
        share: ``(i, n)``: look only at every n-th file from the i-th on (n hosts share the work).

    Returns:
        Nothing if all is well, otherwise what is wrong, by file. Files that the manifest does not list are none of its business.
    """
    files = _read_manifest(directory)
    if isinstance(files, Finding):
        return [files]

    def check(name: str) -> Finding | None:
        expected, path = files[name], directory / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return Finding(name, f"has {size} bytes, not {expected['bytes']}: it was truncated or overwritten")
            if digests or size <= _SMALL_BYTES:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                        return Finding(name, "does not have the digest it was saved with: its content has changed")
        except FileNotFoundError:
            return Finding(name, "is missing")
        except OSError as error:
            return Finding(name, f"cannot be read: {error.strerror}")
        return None

    names = sorted(files)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return [finding for finding in pool.map(check, names) if finding is not None]


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a small file through to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(directory: pathlib.Path) -> None:
    """Makes the names in a directory (files created, renamed) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(directory: pathlib.Path) -> dict[str, dict] | Finding:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        intact = manifest["sha256"] == _list_digest(manifest["files"])
    except FileNotFoundError:
        return Finding(MANIFEST, "is missing: the step was never finished, or not copied completely")
    except OSError as error:
        return Finding(MANIFEST, f"cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        return Finding(MANIFEST, "is not a manifest: its content has changed")
    return manifest["files"] if intact else Finding(MANIFEST, "does not match its own digest: its content has changed")


def _list_digest(files: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _share_name(host: int) -> str:
    return f"share-{host:05d}.json"
