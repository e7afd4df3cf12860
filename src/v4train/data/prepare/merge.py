"""Many small token stores into one, without reading a document: shards are moved, indexes are joined, digests are carried over.

Every step can be killed and done again. Indexes are written anew; a shard that has been moved is where it belongs; the manifest comes
last, and with it the store exists.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4train.data import store as store_lib

HISTOGRAM = "histogram.npy"  # the one index that is summed; all others are joined
PLACES, CHECKSUMS = "places.npy", "checksums.npy"  # of flat shards: the first counts entries of the second, which runs over all shards


def merge(stores: Sequence[pathlib.Path], output: pathlib.Path, *, extra: dict[str, Any]) -> dict[str, Any]:
    """Makes ``output`` a store of the documents of ``stores``, in order; these are empty shells afterwards.

    Args:
        stores: finished stores of one tokenizer and patch size; may have been moved in part by an earlier call with the same arguments.
        output: directory of the store.
        extra: further entries of the manifest.

    Returns:
        The manifest.
    """
    manifests = [json.loads((path / store_lib.MANIFEST).read_text()) for path in stores]
    files: dict[str, dict] = {}
    for name in [name for name in manifests[0]["files"] if name.endswith(".npy")]:
        files[name] = _join(name, [path / name for path in stores], output / name)
    shards = []
    for path, manifest in zip(stores, manifests, strict=True):
        for shard in manifest["shards"]:
            stem, new = pathlib.Path(shard["name"]).stem, f"shard-{len(shards):05d}"
            shards.append(shard | {"name": shard["name"].replace(stem, new)})
            for name, entry in manifest["files"].items():
                if pathlib.Path(name).stem == stem:
                    moved = name.replace(stem, new)
                    files[moved] = entry
                    _move(path / name, output / moved)
    own = {"documents", "tokens", "shards", "files"}
    merged = {key: value for key, value in manifests[0].items() if key not in own} | {
        "documents": sum(manifest["documents"] for manifest in manifests),
        "tokens": {kind: sum(manifest["tokens"][kind] for manifest in manifests) for kind in manifests[0]["tokens"]},
        "shards": shards,
        "files": files,
        **extra,
    }
    for name in files:
        _sync(output / name)
    _write_manifest(output, merged)
    return merged


def _write_manifest(output: pathlib.Path, manifest: dict[str, Any]) -> None:
    partial = output / (store_lib.MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(output / store_lib.MANIFEST)
    _sync(output)


def _sync(path: pathlib.Path) -> None:
    """Waits until it is on the disk: the manifest must not be there before what it promises."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.exists():
        source.replace(target)
    assert target.exists(), f"{source} is neither there nor at {target}"


def _join(name: str, sources: list[pathlib.Path], target: pathlib.Path) -> dict[str, Any]:
    """One index file from many, with memory for one of them; its size and digest."""
    if name == HISTOGRAM:
        total = sum(np.load(path) for path in sources)
        np.save(target, total)
        return _entry(target)
    dtype = np.load(sources[0]).dtype
    lengths = [_length(path) for path in sources]
    with target.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (sum(lengths),)}
        np.lib.format.write_array_header_1_0(file, header)
        first_chunk = 0
        for path in sources:
            array = np.load(path)
            if name == PLACES:
                array["chunk"] += np.uint64(first_chunk)
                first_chunk += _length(path.with_name(CHECKSUMS))
            array.tofile(file)
    return _entry(target)


def _length(path: pathlib.Path) -> int:
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0][0]


def _entry(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
