"""A resolved config as text: YAML to read, canonical JSON to hash.

Both are functions of the values alone: keys sorted, floats in their shortest exact form, defaults written out. The hash therefore
says "the same run", however the recipe was split into files and overrides, and it changes when a default changes.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import yaml

from v4train.config import scalars

Values = pydantic.BaseModel | Mapping[str, Any]
"""A config, or the mapping that `json.loads` makes of its canonical JSON (as found in a checkpoint)."""


@scalars.add_resolvers
class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or `config.scalars` would take for something else, so that both read it back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def values(config: Values) -> dict[str, Any]:
    """The config as nested dicts, lists and scalars."""
    return config.model_dump(mode="json") if isinstance(config, pydantic.BaseModel) else dict(config)


def yaml_text(config: Values) -> str:
    """Sorted YAML that `load.load` reads back to an equal config."""
    return yaml.dump(values(config), Dumper=_Dumper, sort_keys=True, default_flow_style=False, allow_unicode=True, width=120)


def canonical_json(config: Values) -> str:
    """Sorted JSON without spaces, ASCII only: equal configs give equal bytes."""
    return json.dumps(values(config), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(config: Values) -> str:
    """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


def difference(a: Values, b: Values) -> list[str]:
    """Sorted dotted keys whose values differ. A key (or list element) that only one side has is named without what is below it."""
    return sorted(_differing(values(a), values(b), ""))


def _differing(a: Any, b: Any, path: str) -> list[str]:
    pairs: list[tuple[str, Any, Any]]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = [(key, a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in {**a, **b}]
    elif _is_list(a) and _is_list(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(itertools.zip_longest(a, b, fillvalue=_ABSENT))]
    else:
        same_type = isinstance(a, bool) == isinstance(b, bool)
        return [] if a == b and same_type else [path]
    return [key for name, x, y in pairs for key in _differing(x, y, f"{path}.{name}" if path else name)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


_ABSENT = object()
