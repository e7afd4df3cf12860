"""Which stored tensor is which of a model's: every slot gets its source, or one error tells everything that does not fit.

A source knows its number format, recognised from dtypes and shapes alone: FP8 is ``float8_e4m3fn`` with a scale for each block of 128 x 128
(UE8M0, or FP32 as in the base checkpoints), FP4 is int8 of half the width with a UE8M0 scale for each 32 inputs. Which roles are
quantised is not demanded here: a checkpoint that keeps an expert in BF16 is read as it is.

A wrong checkpoint of a large model is wrong in thousands of names at once, so names that differ in numbers only are shown as one,
``layers.{3-42}.ffn.experts.{0-255}.w1.weight``. Nothing is left out of the count.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import numpy as np

from v4train.config import explain
from v4train.interop import names, quantised
from v4train.model import config as config_lib

_PACKED = np.dtype(np.int8)
_FLOATS = (np.dtype(np.float32), quantised.BF16, np.dtype(np.float16))
_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))
_SCALES = (quantised.E8M0, np.dtype(np.float32))
_LINES = 40
_REMEDIES = {
    "missing": "the model of config.json has these, the files do not",
    "unknown": "the files have these, the model of config.json does not",
    "misshapen": "the shape is not the one that config.json gives",
    "ill-typed": "the number format cannot be read",
    "ambiguous": "one tensor under two spellings",
}


class Stored(Protocol):
    """What is known of a stored tensor without reading it."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a slot's values are.

    Attributes:
        name: of the stored tensor, in the spelling of the file.
        format: "plain", "fp8" or "fp4".
        scale: name of the tensor with the scales; empty for "plain".
        part: of the stored tensor that is the slot's; None: all of it.
    """

    name: str
    format: Literal["plain", "fp8", "fp4"] = "plain"
    scale: str = ""
    part: names.Part | None = None


def check(model: config_lib.ModelConfig, *, table: Mapping[str, Stored], subject: str = "the checkpoint") -> dict[str, Source]:
    """The source of each of the model's tensors, by released name. Tensors of `names.EXTRAS_STEM` that may be absent have none then.

    Args:
        table: stored name -> dtype and shape, of all files.
        subject: what the error calls the checkpoint.

    Raises:
        ValueError: names every missing, unknown, misshapen, ill-typed and ambiguous tensor.
    """
    matching = _Matching(table, experts=model.moe.experts)
    slots = names.slots(model)
    for slot in slots:
        matching.find(slot)
    matching.unknown(slots)
    if matching.problems:
        raise ValueError(_message(matching.problems, slots, subject))
    return matching.sources


class _Matching:
    """Collects sources and problems, ``(what is wrong, name, note)``, slot by slot."""

    def __init__(self, table: Mapping[str, Stored], *, experts: int):
        self.table, self.experts = table, experts
        self.by_name: dict[str, str] = {}
        self.used: set[str] = set()
        self.sources: dict[str, Source] = {}
        self.problems: list[tuple[str, str, str]] = []
        self.extras = False
        for stored in table:
            name = names.canonical(stored)
            self.extras |= name.startswith("v4train.")
            if (other := self.by_name.setdefault(name, stored)) != stored:
                self.problems.append(("ambiguous", stored, f"also stored as {other}"))
                self.used.add(stored)

    def find(self, slot: names.Slot) -> None:
        """Records the slot's source, or what is wrong with it."""
        if (stored := self.by_name.get(slot.released)) is not None:
            self.used.add(stored)
            self._one(slot, stored)
        elif (part := names.fused(slot, experts=self.experts)) is not None and (stored := self.by_name.get(part.name)) is not None:
            self._part(slot, stored, part)
        elif self.extras or not slot.otherwise:
            self.problems.append(("missing", slot.released, f"belongs in {names.EXTRAS_STEM}.safetensors" if slot.extra else ""))

    def _one(self, slot: names.Slot, stored: str) -> None:
        info, name = self.table[stored], slot.released
        allowed = _INTEGERS if slot.kind == "hash_table" else _FLOATS
        matrix = len(slot.shape) == 2 and name.endswith(".weight")
        if info.dtype in allowed:
            if self._expect(name, info.shape, slot.shape):
                self.sources[name] = Source(stored)
        elif matrix and info.dtype == quantised.E4M3:
            self._quantised(slot, stored, "fp8", quantised.fp8_shapes((slot.shape[0], slot.shape[1])))
        elif matrix and info.dtype == _PACKED and slot.shape[1] % quantised.FP4_GROUP == 0:
            self._quantised(slot, stored, "fp4", quantised.mxfp4_shapes((slot.shape[0], slot.shape[1])))
        else:
            also = ", or float8_e4m3fn or packed int8 beside a scale" if matrix else ""
            self.problems.append(("ill-typed", name, f"{info.dtype}, expected {_either(allowed)}{also}"))

    def _quantised(self, slot: names.Slot, stored: str, format: Literal["fp8", "fp4"], shapes: tuple[tuple[int, int], ...]) -> None:
        name, info = f"{slot.released.removesuffix('weight')}scale", self.table[stored]
        scale = self.by_name.get(name)
        if scale is None:
            self.problems.append(("missing", name, f"the weight is {info.dtype}"))
            return
        self.used.add(scale)
        if self.table[scale].dtype not in _SCALES:
            self.problems.append(("ill-typed", name, f"{self.table[scale].dtype}, expected {_either(_SCALES)}"))
        elif self._expect(slot.released, info.shape, shapes[0]) and self._expect(name, self.table[scale].shape, shapes[1]):
            self.sources[slot.released] = Source(stored, format, scale)

    def _part(self, slot: names.Slot, stored: str, part: names.Part) -> None:
        info, first = self.table[stored], stored not in self.used
        self.used.add(stored)
        if info.dtype not in _FLOATS:
            if first:
                self.problems.append(
                    ("ill-typed", stored, f"{info.dtype}, expected {_either(_FLOATS)}: fused experts are not read quantised")
                )
        elif tuple(info.shape) != part.shape:
            if first:
                self.problems.append(("misshapen", stored, f"{list(info.shape)}, expected {list(part.shape)}"))
        else:
            self.sources[slot.released] = Source(stored, part=part)

    def _expect(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        if tuple(found) != tuple(expected):
            self.problems.append(("misshapen", name, f"{list(found)}, expected {list(expected)}"))
        return tuple(found) == tuple(expected)

    def unknown(self, slots: tuple[names.Slot, ...]) -> None:
        """Records every stored tensor that no slot asked for."""
        known = sorted({_pattern(slot.released) for slot in slots})
        near: dict[str, str] = dict.fromkeys(known, "")
        for stored in self.table:
            if stored in self.used:
                continue
            name = names.canonical(stored)
            note, pattern = "a scale beside a weight that is not quantised", _pattern(name)
            if f"{name.removesuffix('scale')}weight" not in self.sources:
                if pattern not in near:
                    near[pattern] = _suggestion(pattern, known) if len(near) < len(known) + _LINES else ""
                note = near[pattern]
            self.problems.append(("unknown", stored, note))


def _either(dtypes: tuple[np.dtype, ...]) -> str:
    return " or ".join(x.name for x in dtypes)


_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def _pattern(name: str) -> str:
    return _NUMBER.sub("{}", name)


def _suggestion(pattern: str, known: list[str]) -> str:
    return explain.nearest(pattern, known).removeprefix("; ").replace("{}", "N")


def _message(problems: list[tuple[str, str, str]], slots: tuple[names.Slot, ...], subject: str) -> str:
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    text = [f"{subject}: {count} not fit the model of config.json"]
    for wrong, remedy in _REMEDIES.items():
        found = [(name, note) for kind, name, note in problems if kind == wrong]
        if not found:
            continue
        text.append(f"  {wrong} ({len(found)}): {remedy}")
        if wrong in ("missing", "unknown"):
            found = _whole_layers(found, slots)
        notes: dict[str, list[str]] = {}
        for name, note in found:
            notes.setdefault(note, []).append(name)
        lines = [f"    {name}{f': {note}' if note else ''}" for note, several in notes.items() for name in compact(several)]
        text += lines[:_LINES]
        if len(lines) > _LINES:
            text.append(f"    and {len(lines) - _LINES} more lines")
    return "\n".join(text)


_LAYER = re.compile(r"(?:layers|mtp)\.\d+\.")


def _whole_layers(found: list[tuple[str, str]], slots: tuple[names.Slot, ...]) -> list[tuple[str, str]]:
    """Replaces the tensors of a layer that is missing or unknown as a whole by one entry."""
    wanted: dict[str, int] = {}
    for slot in slots:
        if prefix := _LAYER.match(slot.released):
            wanted[prefix[0]] = wanted.get(prefix[0], 0) + 1
    here: dict[str, int] = {}
    prefixes = [prefix[0] if (prefix := _LAYER.match(names.canonical(name))) else "" for name, _ in found]
    for prefix in prefixes:
        here[prefix] = here.get(prefix, 0) + 1
    whole = {prefix for prefix, count in here.items() if prefix and count == wanted.get(prefix, count)}
    rest = [entry for entry, prefix in zip(found, prefixes, strict=True) if prefix not in whole]
    return [(f"{prefix}*", "every tensor") for prefix in sorted(whole)] + rest


def compact(several: Iterable[str]) -> list[str]:
    """Names that differ in numbers between dots only become one, as ``layers.{0-2,5}.ffn.gate.bias``."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in several:
        groups.setdefault(_pattern(name), []).append(tuple(int(number) for number in _NUMBER.findall(name)))
    return [pattern.format(*ranges) for pattern, numbers in groups.items() for ranges in _products(set(numbers))]


def _products(numbers: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """The tuples as few products of sets, written as text."""
    if numbers == {()}:
        return [()]
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset, list[int]] = {}
    for first in sorted(rests):
        firsts.setdefault(frozenset(rests[first]), []).append(first)
    return [(_ranges(same), *inner) for rest, same in firsts.items() for inner in _products(set(rest))]


def _ranges(numbers: list[int]) -> str:
    """``{0-2,5}`` of sorted numbers; a single one as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return f"{{{','.join('-'.join(map(str, part)) for part in parts)}}}"
