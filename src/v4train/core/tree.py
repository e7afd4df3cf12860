"""Nested dicts of arrays: take one apart by what its declarations say, and put it together again."""

from collections.abc import Callable
from typing import Any

from v4train.core import param


def select(tree: dict, *, declarations: dict, keep: Callable[[param.Declaration], bool]) -> dict:
    """The part of ``tree`` whose declarations satisfy ``keep``, with empty branches pruned. ``tree`` may be the declarations themselves."""
    part: dict[str, Any] = {}
    for name, declared in declarations.items():
        if isinstance(declared, dict):
            inner = select(tree[name], declarations=declared, keep=keep)
            if inner:
                part[name] = inner
        elif keep(declared):
            part[name] = tree[name]
    return part


def merge(first: dict, second: dict) -> dict:
    """The union of two nested dicts without a common leaf, keys sorted."""
    union: dict[str, Any] = {}
    for name in sorted({*first, *second}):
        if name in first and name in second:
            assert isinstance(first[name], dict), f"both parts have {name}"
            assert isinstance(second[name], dict), f"both parts have {name}"
            union[name] = merge(first[name], second[name])
        else:
            union[name] = first[name] if name in first else second[name]
    return union
