"""WebDataset tars: consecutive members ``a/0001.jpg``, ``a/0001.txt`` are the sample ``a/0001``. Read as a stream, a sample at a time."""

import json
import tarfile
from collections.abc import Iterator

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import files, record


def pieces(source: config_lib.WebDatasetConfig, *, task_bytes: int) -> Iterator[record.Piece]:
    """A tar each: they have no index, and are made of a handy size."""
    for path in files.find(source.path):
        yield from files.group([path], task_bytes=task_bytes)


def read(source: config_lib.WebDatasetConfig, task: record.Task) -> Iterator[record.Record | record.Bad]:
    """The samples of a tar."""
    (path,) = task.files
    prefix = f"{source.name}/{files.relative(path, source.path)}"
    stem, sample = "", {}
    try:
        with files.open_packed(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, ending = name.partition(".")
                this = f"{folder}/{base}" if folder else base
                if this != stem and sample:
                    yield _sample(sample, path, stem, prefix=prefix, source=source)
                    sample = {}
                stem = this
                content = tar.extractfile(member)
                assert content is not None, "a member that is a file has a content"
                sample[f".{ending.lower()}"] = content.read()
        if sample:
            yield _sample(sample, path, stem, prefix=prefix, source=source)
    except (*files.ENDS_EARLY, tarfile.TarError, OSError) as error:
        yield record.Bad(f"{path} at {stem or 'its beginning'}", f"unreadable from here on: {files.reason(error)}")


def _sample(
    sample: dict[str, bytes], path: str, stem: str, *, prefix: str, source: config_lib.WebDatasetConfig
) -> record.Record | record.Bad:
    size = sum(map(len, sample.values())) if not files.is_packed(path) else 0
    try:
        parts = tuple(_part(sample, kind, source=source) for kind in source.layout)
    except (ValueError, RecursionError) as error:
        return record.Bad(f"{path} sample {stem}", files.reason(error), size)
    return record.Record(f"{path} sample {stem}", f"{prefix}/{stem}", parts, size)


def _part(sample: dict[str, bytes], kind: config_lib.Kind, *, source: config_lib.WebDatasetConfig) -> record.Part:
    if kind != "text":
        for ending in sorted(files.IMAGES if kind == "image" else files.SOUNDS):
            if ending in sample:
                return record.Media(kind, sample[ending])
    elif ".txt" in sample:
        return sample[".txt"].decode("utf-8-sig").strip()
    elif ".json" in sample:
        values = json.loads(sample[".json"])
        text = values.get(source.json_text) if isinstance(values, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"its .json has no text {source.json_text!r}")
        return text.strip()
    raise ValueError(f"it has no {kind}, only {', '.join(sorted(sample))}")
