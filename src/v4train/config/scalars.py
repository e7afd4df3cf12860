"""What an unquoted word of a recipe means: the core schema of YAML 1.2, not PyYAML's YAML 1.1.

YAML 1.1 has traps that cost days: ``1e-20`` and ``3e-4`` are strings (a float needs a dot *and* a signed exponent), ``no`` and ``on``
are booleans, ``010`` is eight, ``12:30`` is 750 and ``2026-01-01`` is a date. Here a word is null, true, false, an integer or a
float if it looks like one to a Python programmer (``1_000_000``, ``1e-20``, ``.5``, ``0x10``), else a string.
"""

import re
from collections.abc import Callable

import yaml

Scalar = None | bool | int | float | str

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
PATTERNS: dict[str, tuple[re.Pattern, str]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(rf"^(?:[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "float": (
        re.compile(
            rf"^(?:[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|[-+]?{_DIGITS}[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
}
"""Name of the type -> pattern of its words, characters that such a word can start with (NUL stands for the empty word)."""


def add_resolvers(target: type) -> type:
    """Makes a PyYAML loader or dumper class recognise the words of `PATTERNS`; returns it (a class decorator)."""
    for name, (pattern, first) in PATTERNS.items():
        target.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, ["" if c == "\0" else c for c in first])  # type: ignore[attr-defined]
    return target


def _integer(text: str) -> int:
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    return int(text, base)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if text.lstrip("+-")[:1] == "." else float(text)


_READERS: dict[str, Callable[[str], Scalar]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": lambda text: _float(text.lower()),
    "str": str,
}


def read(node: yaml.ScalarNode) -> Scalar:
    """The value of a scalar node.

    Raises:
        ValueError: the node carries a tag that recipes do not have (``!!python/...``, ``!!binary``, or a tag that its text denies).
    """
    name = node.tag.removeprefix("tag:yaml.org,2002:")
    if name not in _READERS:
        raise ValueError(f"the tag {node.tag!r} is not supported: recipes hold mappings, lists, strings, numbers, true, false and null")
    if name in PATTERNS and not PATTERNS[name][0].match(node.value):
        raise ValueError(f"{node.value!r} is not a valid {name}")
    return _READERS[name](node.value)
