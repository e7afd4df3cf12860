"""Where the parameters of a model are on a mesh: how much of each a device stores, and how much it multiplies with.

Both follow from the declarations and from `sharding.rules`, so nothing is counted twice: a new sharding rule changes the plan as it changes
the program. A mesh is a `jax.sharding.AbstractMesh`: sizes without devices.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax

from v4train.core import param
from v4train.model import config as model_config
from v4train.model import count
from v4train.optim import heads, stacking
from v4train.sharding import rules


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter (stacked layers are one) on a mesh.

    Attributes:
        path: its name.
        declaration: all that is said about it.
        kind: what it is part of, `count.kind_of`; ``mtp`` in the MTP block.
        layers: how many layers are stacked in it.
        stored: elements that a device holds.
        used: elements that a device multiplies with, over all layers.
        gathered_over: mesh axes that split the stored and not the used.
        rows: mesh axes that split the shorter of a matrix's two dimensions where it is stored.
        columns: those that split the longer one.
        copied_over: mesh axes along which devices store the same.
    """

    path: str
    declaration: param.Declaration
    kind: str
    layers: int
    stored: int
    used: int
    gathered_over: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    copied_over: tuple[str, ...]

    @property
    def routed(self) -> bool:
        """Of a routed expert."""
        return "routed_expert" in self.declaration.tags

    @property
    def group(self) -> str:
        """What is gathered together: a layer of a run, the MTP block, the embedding, the head, or nothing of these."""
        parts = self.path.split("/")
        return "/".join(parts[:3]) if parts[0] == "stack" else parts[0]


def on_mesh(declarations: dict, *, mesh: jax.sharding.AbstractMesh) -> list[Weight]:
    """Every parameter and buffer of a model."""
    return [_weight(path, d, mesh) for path, d in param.flatten(declarations).items()]


def _weight(path: str, declaration: param.Declaration, mesh: jax.sharding.AbstractMesh) -> Weight:
    arguments = {"shape": declaration.shape, "mesh": mesh}
    stored_spec, used_spec = rules.stored_spec(declaration.axes, **arguments), rules.spec(declaration.axes, **arguments)
    stored, used = _axes(stored_spec), _axes(used_spec)
    rows, columns = _sides(declaration, stored_spec, mesh) if declaration.group == "muon" else ((), ())
    layers = declaration.shape[0] if declaration.axes and declaration.axes[0] == "layers" else 1
    return Weight(
        path=path,
        declaration=declaration,
        kind="mtp" if "mtp" in declaration.tags else count.kind_of(path),
        layers=layers,
        stored=declaration.size // size(stored, mesh.shape),
        used=declaration.size // size(used, mesh.shape),
        gathered_over=tuple(name for name in stored if name not in used),
        rows=rows,
        columns=columns,
        copied_over=tuple(name for name, n in mesh.shape.items() if n > 1 and name not in stored),
    )


def _sides(
    declaration: param.Declaration, stored: jax.sharding.PartitionSpec, mesh: jax.sharding.AbstractMesh
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split the shorter and the longer dimension of a matrix of Muon's."""
    viewed = heads.spec(stored, dimensions=len(declaration.shape), heads=declaration.heads, mesh=mesh)
    rows, columns = [tuple(rules.names(part)) for part in viewed][-2:]
    n, m = declaration.matrix
    return (rows, columns) if n <= m else (columns, rows)


def moving(placed: Iterable[Weight], model: model_config.ModelConfig) -> list[Weight]:
    """Those that the optimizer moves: all that are trained, or in the indexer's warm-up the indexer's."""
    trained = [w for w in placed if w.declaration.trained]
    return [w for w in trained if "indexer" in w.declaration.tags] if model.warming_up else trained


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices of one shape that go through Newton-Schulz together (`optim.stacking`).

    Attributes:
        shape: of a matrix, the shorter dimension first.
        rows: mesh axes that split the shorter dimension where they are stored.
        columns: those that split the longer one.
        copies: those along which the same is stored; the devices on them share the work.
        dealt: elements that a device works on, whole matrices, padding included.
        at_once: of them, in memory of the iteration at a time.
        joined: whether stacks of the same shape go through the iteration with it.
    """

    shape: tuple[int, int]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    copies: tuple[str, ...]
    dealt: int
    at_once: int
    joined: bool

    @property
    def matrices(self) -> int:
        """That a device works on."""
        return self.dealt // math.prod(self.shape)


def stacks(placed: Iterable[Weight], *, sizes: Mapping[str, int]) -> list[Stack]:
    """The stacks of all Muon parameters."""
    groups: dict[tuple, tuple[int, int]] = {}
    for w in placed:
        if w.declaration.group == "muon":
            matrix = math.prod(w.declaration.matrix) // size((*w.rows, *w.columns), sizes)
            alone = w.path if w.stored > stacking.LARGEST_JOINED else ""
            key = tuple(sorted(w.declaration.matrix)), w.rows, w.columns, w.copied_over, alone
            groups[key] = matrix, groups.get(key, (0, 0))[1] + w.stored // matrix
    found = []
    for (shape, rows, columns, copies, alone), (matrix, number) in groups.items():
        devices = size((*rows, *columns, *copies), sizes)
        dealt = math.ceil(number / devices) * devices // size(copies, sizes) * matrix
        least = devices // size(copies, sizes) * matrix
        at_once = max(least, min(dealt, stacking.LARGEST_JOINED)) if alone else dealt
        found.append(Stack(shape, rows, columns, copies, dealt, at_once, not alone))
    return found


def most_at_once(placed: Iterable[Weight], *, sizes: Mapping[str, int]) -> int:
    """Elements that are in memory of the iteration together: of all joined stacks of a shape, or of one slice of a large parameter."""
    joined: dict[tuple[int, int], int] = {}
    most = 0
    for stack in stacks(placed, sizes=sizes):
        if stack.joined:
            joined[stack.shape] = joined.get(stack.shape, 0) + stack.at_once
        else:
            most = max(most, stack.at_once)
    return max(most, *joined.values(), 0)


def _axes(parts: Iterable) -> tuple[str, ...]:
    return tuple(name for part in parts for name in rules.names(part))


def size(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Devices along several mesh axes."""
    return math.prod(sizes[name] for name in axes)
