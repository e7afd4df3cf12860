"""Recipe text as a tree in which every value knows the line that supplied it.

PyYAML's composer gives nodes with marks; they are turned into our own small tree (`Node`) once, because a merged recipe mixes
values of several files and of the command line, and a message about any of them must name its own line. (The rejected
alternative, plain dicts beside a table of line numbers, has to keep the two in step through every merge.)

Merging: mappings merge key by key, everything else (scalars, lists) replaces. One exception: when both sides name a ``kind`` and the
kinds differ, the mapping is replaced as a whole, since the fields of another member of a tagged union mean nothing here.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import yaml

from v4train.config import error, scalars

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


@dataclasses.dataclass(frozen=True)
class Node:
    """A value and the place it comes from.

    Attributes:
        value: a scalar, a list of nodes, or a dict from key to node.
        where: ``file:line`` or ``--set a.b=c``.
        key_where: the same for the key in front of the value; empty in lists and at the top.
    """

    value: "scalars.Scalar | list[Node] | dict[str, Node]"
    where: str
    key_where: str = ""

    def plain(self) -> Plain:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, "Node"]]:
        """Dotted path and node of every scalar, and of every empty list or mapping."""
        if not isinstance(self.value, dict | list) or not self.value:
            yield prefix, self
            return
        for key, child in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
            yield from child.leaves(f"{prefix}.{key}" if prefix else str(key))


def show(value: Plain, *, limit: int = 60) -> str:
    """A value as it would be written in a recipe, cut to ``limit`` characters."""
    if isinstance(value, dict):
        text = f"a mapping with the keys {', '.join(value)}" if value else "an empty mapping"
    elif isinstance(value, float):
        text = repr(value)  # json would write Infinity
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@scalars.add_resolvers
class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own attribute: start from none of YAML 1.1's)


def parse(text: str, *, name: str) -> tuple[Node, list[error.Problem]]:
    """Parses recipe text.

    Args:
        text: YAML.
        name: what to call the text in messages: the file's path, or the ``--set`` option.

    Returns:
        The tree (an empty text is an empty mapping) and the problems that do not stop the parsing, such as a duplicate key.

    Raises:
        error.ConfigError: bad syntax, with the line.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise error.ConfigError(name, problems=(error.Problem(place, "", "", _syntax(e)),)) from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        reason = f"the character {chr(e.character)!r} is not allowed in YAML"
        raise error.ConfigError(name, problems=(error.Problem(f"{name}:{line}", "", "", reason),)) from None
    if root is None:
        return Node({}, f"{name}:1"), []
    builder = _Builder(name)
    return builder.build(root, "", ""), builder.problems


def _syntax(e: yaml.MarkedYAMLError) -> str:
    problem = " ".join(part for part in (e.context, e.problem) if part)
    if "'\\t'" in problem:
        return f"bad YAML: {problem}; indent with spaces, not tabs"
    return f"bad YAML: {problem}"


class _Builder:
    """Turns PyYAML's nodes into ours and collects what is wrong with them."""

    def __init__(self, name: str):
        self.name, self.problems, self._open = name, [], []

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.name.startswith("--set") else f"{self.name}:{node.start_mark.line + 1}"

    def _complain(self, node: yaml.Node, path: str, found: str, remedy: str) -> None:
        self.problems.append(error.Problem(self._where(node), path, found, remedy))

    def build(self, node: yaml.Node, path: str, key_where: str) -> Node:
        where = self._where(node)
        if isinstance(node, yaml.ScalarNode):
            try:
                return Node(scalars.read(node), where, key_where)
            except ValueError as e:
                self._complain(node, path, show(node.value), str(e))
                return Node(node.value, where, key_where)
        if id(node) in self._open:  # an alias (`*x`) inside the thing it stands for
            self._complain(node, path, "", "a value that contains itself")
            return Node(None, where, key_where)
        self._open.append(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.pop()
        return Node(value, where, key_where)

    def _sequence(self, node: yaml.Node, path: str) -> list[Node]:
        return [self.build(child, f"{path}.{i}" if path else str(i), "") for i, child in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_node, path, "", "a key must be a single word")
                continue
            key = key_node.value
            child = f"{path}.{key}" if path else key
            if key in result:
                first = result[key].key_where
                self._complain(key_node, child, "", f"duplicate key: it is already given at {first}; keep one of the two")
                continue
            result[key] = self.build(value_node, child, self._where(key_node))
        return result


def read(path: pathlib.Path, *, asked_by: str = "") -> tuple[Node, list[error.Problem]]:
    """Reads a recipe file and checks that it holds a mapping.

    Args:
        path: the file.
        asked_by: ``file:line`` of the `base:` that names it; empty for the user's own file.

    Raises:
        error.ConfigError: the file cannot be read or parsed.
    """
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        problem = error.Problem(asked_by or name, "base" if asked_by else "", name if asked_by else "", f"cannot read it: {e.strerror}")
        raise error.ConfigError(name, problems=(problem,)) from None
    except UnicodeDecodeError as e:
        raise error.ConfigError(name, problems=(error.Problem(name, "", "", f"not a text file (UTF-8): byte {e.start}"),)) from None
    node, problems = parse(text, name=name)
    if not isinstance(node.value, dict):
        reason = "a recipe is a mapping: lines of the form `key: value`"
        raise error.ConfigError(name, problems=(error.Problem(node.where, "", show(node.plain()), reason),))
    return node, problems


def merge(below: Node, above: Node) -> Node:
    """``below`` overlaid with ``above`` (see the module's docstring); neither is changed."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or _kinds_differ(below.value, above.value):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, above.where, above.key_where or below.key_where)


def _kinds_differ(below: dict[str, Node], above: dict[str, Node]) -> bool:
    return "kind" in below and "kind" in above and below["kind"].value != above["kind"].value


def assign(node: Node, path: list[str], leaf: Node) -> Node:
    """A copy of the tree in which ``path`` (keys and list indices) holds ``leaf``; missing mappings on the way are created.

    Raises:
        ValueError: the path enters a scalar, or an index is not in its list.
    """
    if not path:
        return merge(node, leaf)
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        if not key.isdecimal() or int(key) >= len(node.value):
            length = len(node.value)
            allowed = f"0 to {length - 1}" if length else "none: it is empty"
            raise ValueError(f"{key!r} is not an index of this list of {length} (allowed: {allowed})")
        items = list(node.value)
        items[int(key)] = assign(items[int(key)], rest, leaf)
        return Node(items, node.where, node.key_where)
    if not isinstance(node.value, dict | None):
        raise ValueError(f"{show(node.plain())} ({node.where}) is neither a mapping nor a list, so it has no {key!r}")
    children = node.value or {}
    child = assign(children.get(key, Node(None, leaf.where, leaf.where)), rest, leaf)
    base = node if children else Node({}, node.where, node.key_where)
    return merge(base, Node({key: dataclasses.replace(child, key_where=leaf.where)}, base.where, base.key_where))
