"""A record with named fields (a JSON object, a row of Parquet) as the parts of a document."""

import pathlib
from typing import Any

from v4train.data.prepare import config as config_lib
from v4train.data.prepare import record

KINDS: tuple[config_lib.Kind, ...] = ("image", "audio", "text")
FieldsConfig = config_lib.JsonLinesConfig | config_lib.ParquetConfig


def wanted(source: FieldsConfig) -> list[str]:
    """Names of the fields that are read."""
    names = (source.key, source.parts) if source.parts else (source.key, *(getattr(source, kind) for kind in KINDS))
    return [name for name in names if name is not None]


def kinds(source: FieldsConfig) -> set[config_lib.Kind]:
    """Kinds of parts that its documents may have."""
    return set(KINDS) if source.parts else {kind for kind in source.layout if getattr(source, kind) is not None}


def parts(values: dict[str, Any], *, source: FieldsConfig, folder: pathlib.Path) -> tuple[record.Part, ...]:
    """The parts of a record in reading order.

    Args:
        values: the record's fields.
        source: which fields to use.
        folder: where relative paths of media start.

    Raises:
        ValueError: a field is missing or is not what it should be; the message names it.
    """
    if source.parts is None:
        named: list[tuple[config_lib.Kind, str | None]] = [(kind, getattr(source, kind)) for kind in source.layout]
        return tuple(_part(kind, values.get(name), name=name, folder=folder) for kind, name in named if name is not None)
    listed = values.get(source.parts)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"field {source.parts!r} is not a list of parts")
    found = []
    for i, item in enumerate(listed):
        name = f"{source.parts}[{i}]"
        given = {key for key, value in item.items() if value is not None} if isinstance(item, dict) else set()
        kind: config_lib.Kind | None = next((kind for kind in KINDS if given == {kind}), None)
        if kind is None:
            raise ValueError(f"field {name!r} is not one of {{text: ...}}, {{image: ...}}, {{audio: ...}}")
        found.append(_part(kind, item[kind], name=name, folder=folder))
    return tuple(found)


def _part(kind: config_lib.Kind, value: Any, *, name: str, folder: pathlib.Path) -> record.Part:
    if value is None:
        raise ValueError(f"field {name!r} is missing")
    if kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} is {type(value).__name__}, not a text")
        return value
    if isinstance(value, dict):  # as Hugging Face datasets store media
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return record.Media(kind, value)
    if isinstance(value, str) and value:
        return record.Media(kind, folder / value)
    raise ValueError(f"field {name!r} is neither a path nor the bytes of a file")


def key(values: dict[str, Any], *, source: FieldsConfig, default: str) -> str:
    """The document's key.

    Raises:
        ValueError: the field for it is missing or neither a text nor a number.
    """
    if source.key is None:
        return default
    value = values.get(source.key)
    if not isinstance(value, str | int) or value == "":
        raise ValueError(f"field {source.key!r}, the key, is {value!r}, neither a text nor a whole number")
    return f"{source.name}/{value}"
