"""Pydantic's validation errors in the words of a recipe: line, path, what was found, what is allowed, the nearest valid name.

Pydantic reports a location such as ``("model", "attention", "window", "width")``, in which ``window`` may be a key, or the tag of a
union's member, or the label of a plain union's branch. Only the types can tell, so the location is walked through the annotations of
the config class and through the tree of the recipe side by side (`_follow`).
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping

import pydantic
import pydantic.fields
import pydantic_core

from v4train.config import error, tree

_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "none_required": "null",
}


def explain(failure: pydantic.ValidationError, *, root: tree.Node, cls: type[pydantic.BaseModel]) -> list[error.Problem]:
    """One problem for each value that is wrong (the branches of a plain union are joined with "or")."""
    joined: dict[tuple[str, str, str], list[str]] = {}
    for details in failure.errors(include_url=False):
        problem = _problem(details, root, cls)
        remedies = joined.setdefault((problem.where, problem.path, problem.found), [])
        if problem.remedy not in remedies:
            remedies.append(problem.remedy)
    return [error.Problem(*key, " or ".join([r[0], *(x.removeprefix("expected ") for x in r[1:])])) for key, r in joined.items()]


@dataclasses.dataclass
class _Spot:
    """Where a location leads: in the recipe (``path``, ``node``, its ``parent``) and in the types (``kind``, the ``field`` before it)."""

    path: list[str]
    node: tree.Node | None
    parent: tree.Node
    kind: object
    owner: object = None
    field: pydantic.fields.FieldInfo | None = None

    @property
    def where(self) -> str:
        place = self.node or self.parent
        return place.key_where or place.where

    @property
    def found(self) -> str:
        return "" if self.node is None else tree.show(self.node.plain())


def _follow(location: Iterable[int | str], root: tree.Node, cls: type[pydantic.BaseModel]) -> _Spot:
    spot = _Spot([], root, root, cls)
    for item in location:
        kind = _bare(spot.kind)
        if _is_union(kind):  # the item names a branch of the union, not a key of the recipe
            spot.kind = _branch(kind, item)
            continue
        if item == "[key]":
            continue
        spot.path.append(str(item))
        spot.parent = spot.node or spot.parent
        spot.node = _child(spot.node, item)
        spot.owner, spot.field = kind, None
        if _is_model(kind):
            spot.field = _fields(kind).get(str(item))
            spot.kind = (spot.field.rebuild_annotation() if spot.field else None) or object
        else:
            spot.kind = _element(kind, item)
    return spot


def _child(node: tree.Node | None, item: int | str) -> tree.Node | None:
    if node is None:
        return None
    if isinstance(node.value, dict):
        return node.value.get(str(item))
    if isinstance(node.value, list) and isinstance(item, int) and item < len(node.value):
        return node.value[item]
    return None


def _bare(kind: object) -> object:
    """A type without ``Annotated``, without the None of an ``Optional`` and without an alias's name."""
    while True:
        if typing.get_origin(kind) is typing.Annotated:
            kind = typing.get_args(kind)[0]
        elif hasattr(kind, "__value__"):
            kind = kind.__value__  # type: ignore[attr-defined]
        elif _is_union(kind) and len(_members(kind)) == 1:
            kind = _members(kind)[0]
        else:
            return kind


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _members(kind: object) -> list[object]:
    return [member for member in typing.get_args(kind) if member is not type(None)]


def _is_model(kind: object) -> typing.TypeGuard[type[pydantic.BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _fields(model: type[pydantic.BaseModel]) -> dict[str, pydantic.fields.FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _tags(member: object, key: str | None = None) -> list[str]:
    """Values of the Literal fields of a model (of the field ``key`` only, if given)."""
    if not _is_model(member):
        return []
    fields = [field for name, field in _fields(member).items() if key in (None, name)]
    return [tag for field in fields if typing.get_origin(field.annotation) is typing.Literal for tag in typing.get_args(field.annotation)]


def _branch(union: object, item: int | str) -> object:
    members = [_bare(member) for member in _members(union)]
    named = [m for m in members if item in _tags(m, "kind")] or [m for m in members if item in _tags(m)]
    named = named or [m for m in members if getattr(m, "__name__", None) == item]
    return named[0] if named else object


def _element(kind: object, item: int | str) -> object:
    arguments = [a for a in typing.get_args(kind) if a is not Ellipsis]
    if not arguments:
        return object
    if isinstance(item, int) and typing.get_origin(kind) is tuple and len(arguments) > 1:
        return arguments[min(item, len(arguments) - 1)]
    return arguments[-1]


def nearest(name: object, allowed: Iterable[str]) -> str:
    """``; did you mean `x`?`` for the nearest of the allowed names, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _problem(details: pydantic_core.ErrorDetails, root: tree.Node, cls: type[pydantic.BaseModel]) -> error.Problem:
    code, context = details["type"], details.get("ctx", {})
    spot = _follow(details["loc"], root, cls)
    path = ".".join(spot.path)
    if code == "extra_forbidden":
        allowed = sorted(_fields(spot.owner)) if _is_model(spot.owner) else []
        remedy = f"unknown key{nearest(spot.path[-1], allowed)} (allowed: {', '.join(allowed) or 'none'})"
        return error.Problem(spot.where, path, spot.found, remedy)
    if code == "missing":
        remedy = f"required, but missing: give {_describe(spot.kind)}{_meaning(spot)}"
        return error.Problem(spot.where, path, "", remedy)
    if code in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(spot, context)
    if code == "literal_error":
        return error.Problem(spot.where, path, spot.found, _choice(details["input"], _literals(spot.kind) or _quoted(context["expected"])))
    if code == "value_error":
        found = "" if isinstance(details["input"], dict) else spot.found
        return error.Problem(spot.where, path, found, str(context["error"]))
    return error.Problem(spot.where, path, spot.found, _expectation(details, spot) + _meaning(spot))


def _tag_problem(spot: _Spot, context: Mapping) -> error.Problem:
    key = context["discriminator"].strip("'")
    key = "kind" if key.endswith("()") else key  # a function that supplies a kind where none is given
    allowed = [tag for member in _members(_bare(spot.kind)) for tag in _tags(_bare(member), key)]
    tag = _child(spot.node, key)
    place = tag or spot.node or spot.parent
    path = ".".join([*spot.path, key])
    if tag is None:
        return error.Problem(place.key_where or place.where, path, "", f"required, but missing (allowed: {', '.join(allowed)})")
    return error.Problem(place.key_where or place.where, path, tree.show(tag.plain()), _choice(tag.plain(), allowed))


def _literals(kind: object) -> list[object]:
    kind = _bare(kind)
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else []


def _quoted(text: str) -> list[object]:
    return list(re.findall(r"'([^']*)'", text))


def _choice(found: object, allowed: Iterable[object]) -> str:
    names = [name if isinstance(name, str) else tree.show(name) for name in allowed]  # type: ignore[arg-type]
    return f"expected one of {', '.join(names)}{nearest(found, names)}"


def _expectation(details: pydantic_core.ErrorDetails, spot: _Spot) -> str:
    code = details["type"]
    if code.startswith(("model_", "dataclass_", "dict_")):
        return f"expected {_describe(spot.kind)}"
    if code in ("too_long", "too_short"):
        context = details.get("ctx", {})
        bound = f"at most {context['max_length']}" if code == "too_long" else f"at least {context['min_length']}"
        return f"expected a list of {bound} items, found {context['actual_length']}"
    if code == "string_type" and isinstance(details["input"], int | float):
        return "expected a string: put it in quotes"
    if code in _EXPECTED:
        return f"expected {_EXPECTED[code]}"
    return details["msg"].replace("Input should be", "expected a value", 1)


def _describe(kind: object) -> str:
    """A type in words."""
    kind = _bare(kind)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a mapping"}
    if isinstance(kind, type) and kind in words:
        return words[kind]
    if _literals(kind):
        return f"one of {', '.join(tree.show(value) for value in _literals(kind))}"  # type: ignore[arg-type]
    if _is_model(kind):
        return f"a mapping with the keys {', '.join(sorted(_fields(kind)))}"
    if _is_union(kind):
        tags = [tag for member in _members(kind) for tag in _tags(_bare(member), "kind")]
        return f"a mapping with `kind`: one of {', '.join(tags)}" if tags else " or ".join(_describe(member) for member in _members(kind))
    if typing.get_origin(kind) in (list, tuple, set, frozenset):
        return "a list"
    return "a mapping" if typing.get_origin(kind) is dict else "a value"


def _meaning(spot: _Spot) -> str:
    """The field's docstring, on one line."""
    text = " ".join((spot.field.description or "").split()) if spot.field else ""
    return f" ({text})" if text else ""
