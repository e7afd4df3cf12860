"""Declare a parameter once.

A `Declaration` says everything there is to say about a parameter: shape, dtype, logical axes, initialiser, optimizer group, weight
decay, precision. Modules are NNX containers whose variables hold a `jax.ShapeDtypeStruct` and their declaration, so building a
model costs no memory: a 1.6T-parameter model is built on a laptop to be counted. From the same declarations follow sharded
initialisation (`initialise`), shardings (`sharding.rules`), optimizer groups (`optim.hybrid`), checkpoint paths and, later, foreign
names and planner bytes.

Layers that are scanned are *stacked*: `stack` maps every declaration of a module to one with a leading "layers" axis. (The rejected
alternative, `nnx.vmap` over the constructor, adds the axis to the value but not to the metadata.)

First values are drawn on the host, each device's shard by the host that holds it. Every matrix of a stack has a random stream of
its own, named by the parameter's path and the matrix's place in the stack, so adding a parameter does not change the others, and
values do not depend on the mesh. (The rejected alternative, one compiled program that draws everything on the devices, took a third
of the compile time of a small model: a random generator per parameter.)
"""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4train.core import axes as axes_lib

Group = Literal["muon", "adamw", "buffer"]
Module = TypeVar("Module", bound=nnx.Module)


class Initialiser(Protocol):
    """A hashable function that draws one array in fp32."""

    def __call__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent N(0, std^2)."""

    std: float

    def __call__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(self.std)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float

    def __call__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """All there is to know about one parameter.

    Attributes:
        shape: sizes, stacking axes first. A matrix is the last two axes, ``[in, out]``; all axes before them count independent
            matrices (layers, experts, output groups).
        axes: one logical axis name (or None) per dimension.
        init: draws the first value.
        group: ``muon`` (matrices), ``adamw`` (everything else that is trained), ``buffer`` (state that gradients never touch:
            router biases, hash tables; it is checkpointed like the rest). A recipe may say otherwise for some tags (`optim.groups`).
        decay: decoupled weight decay applies; a recipe may say otherwise for some tags, too.
        heads: a matrix ``[in, heads * width]`` is that many matrices side by side. They are one for Muon unless the recipe says
            `head_wise`.
        precision: ``compute`` weights are cast to the compute dtype before the forward pass, ``fp32`` ones never.
        product: whose formats matrix products with it have: ``linear`` and ``experts`` are keys of the recipe's `numerics`; ``high`` is
            not rounded further, whatever the recipe says.
        tags: roles that others select by: ``indexer``, ``routed_expert``, ``embedding``, ``mtp``, ``router_bias``, ``hash_table``, and
            those for which a recipe may choose group or decay: ``router_gate``, ``position_table``, ``sink``, ``hyper_gate``, ``norm``.
        dtype: of the master copy.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initialiser
    group: Group = "muon"
    decay: bool = True
    heads: int = 1
    precision: Literal["compute", "fp32"] = "compute"
    product: Literal["high", "linear", "experts"] = "high"
    tags: frozenset[str] = frozenset()
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)
        assert self.group != "muon" or len(self.shape) >= 2, "muon needs a matrix"
        assert self.shape[-1:] == () or self.shape[-1] % self.heads == 0, (self.shape, self.heads)
        assert self.product == "high" or (self.precision == "compute" and len(self.shape) >= 2), "few bits are for matrices"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The size of one of the independent matrices."""
        return self.shape[-2], self.shape[-1] // self.heads

    @property
    def matrices(self) -> int:
        """How many independent matrices there are: of layers, experts, output groups, heads."""
        return math.prod(self.shape[:-2]) * self.heads

    @property
    def trained(self) -> bool:
        return self.group != "buffer"

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def stacked(self, count: int) -> "Declaration":
        """The same parameter for ``count`` layers at once."""
        return dataclasses.replace(self, shape=(count, *self.shape), axes=("layers", *self.axes))


def param(shape: tuple[int, ...], axes: str, init: Initialiser, **options) -> nnx.Param:
    """An abstract parameter. ``axes`` is a string of shape letters (`core.axes`); ``options`` are fields of `Declaration`."""
    return _abstract(Declaration(shape=shape, axes=axes_lib.logical_axes(axes), init=init, **options))


def scale(width: int, axes: str = "D", *, first: float = 1.0, **options) -> nnx.Param:
    """The weight of a norm: ``first`` everywhere, fp32, AdamW, with decay (as V4 trains them)."""
    return param((width,), axes, Constant(first), group="adamw", precision="fp32", tags=frozenset({"norm"}), **options)


def buffer(shape: tuple[int, ...], axes: str, *, dtype: jnp.dtype, tags: frozenset[str]) -> nnx.Param:
    """State that gradients never touch, zero at first."""
    return param(shape, axes, Constant(0), group="buffer", decay=False, precision="fp32", dtype=jnp.dtype(dtype), tags=tags)


def _abstract(declaration: Declaration) -> nnx.Param:
    return nnx.Param(declaration.struct, declaration=declaration)


def declarations(module: nnx.Module) -> dict:
    """The module's declarations as a nested dict, in the structure of its parameters."""
    state = nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.get_metadata()["declaration"], state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def bind(module: Module, params: dict) -> Module:
    """A copy of an abstract module that holds the given arrays. Cheap: it is called inside every trace."""
    graph, state = nnx.split(module, nnx.Param)[:2]
    leaves = jax.tree.leaves(params)
    variables, structure = jax.tree.flatten(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graph, jax.tree.unflatten(structure, [v.replace(leaf) for v, leaf in zip(variables, leaves, strict=True)]))


def tag(module: Module, *names: str) -> Module:
    """Adds tags to every declaration of a module, in place, and returns it."""
    return _redeclare(module, lambda d: dataclasses.replace(d, tags=d.tags | set(names)))


def stack(module: Module, count: int) -> Module:
    """Turns a module's parameters into those of ``count`` such modules, in place, and returns it."""
    return _redeclare(module, lambda d: d.stacked(count))


def _redeclare(module: Module, change: Callable[[Declaration], Declaration]) -> Module:
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda v: _abstract(change(v.get_metadata()["declaration"])), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graph, state)


def is_declaration(x: object) -> bool:
    """For `is_leaf`: a declaration is a leaf of the trees here."""
    return isinstance(x, Declaration)


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as ``a/b/0/c``: the name of a parameter in checkpoints, reports and messages."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)


def map_declarations(function: Callable[[str, Declaration], object], tree: dict) -> dict:
    """Maps ``function(path, declaration)`` over a nested dict of declarations."""
    return jax.tree_util.tree_map_with_path(lambda path, d: function(path_name(path), d), tree, is_leaf=is_declaration)


def fold(seed: int, name: str) -> int:
    """A seed of its own for everything that has a name: independent of what else is drawn, and of the order."""
    return zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF


def initialise(tree: dict, seed: int, *, shardings: dict | None = None) -> dict:
    """Draws every parameter of a nested dict of declarations.

    Args:
        tree: declarations.
        seed: of all random streams.
        shardings: where each array lives, in the same structure; None: on the default device. The values do not depend on it.
    """

    def draw(path: tuple, d: Declaration, sharding: jax.sharding.Sharding | None) -> jax.Array:
        lead = d.shape[:-2] if len(d.shape) > 2 else d.shape[: d.axes.count("layers")]

        @functools.cache
        def matrix(*place: int) -> np.ndarray:
            rng = np.random.Generator(np.random.Philox(key=fold(seed, f"{path_name(path)}/{place}")))
            return d.init(rng, d.shape[len(lead) :]).astype(d.dtype)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            places = [range(size)[part] for size, part in zip(lead, index[: len(lead)], strict=True)]
            drawn = np.stack([matrix(*place)[index[len(lead) :]] for place in itertools.product(*places)])
            return drawn.reshape(*(len(place) for place in places), *drawn.shape[1:])

        if sharding is None:
            return jnp.asarray(shard((slice(None),) * len(d.shape)))
        return jax.make_array_from_callback(d.shape, sharding, shard)

    if shardings is None:
        shardings = map_declarations(lambda _, d: None, tree)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_declaration)
    places = structure.flatten_up_to(shardings)
    return jax.tree.unflatten(structure, [draw(path, d, place) for (path, d), place in zip(leaves, places, strict=True)])


def flatten(tree: dict) -> dict[str, Declaration]:
    """Path -> declaration, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_declaration)[0]
    return {path_name(path): leaf for path, leaf in leaves}
