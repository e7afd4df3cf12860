"""Everything that a step changes, and where its parts live on the mesh."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from v4train.core import param, tree
from v4train.sharding import rules


class State(NamedTuple):
    """What a checkpoint holds. The data position is ``step``: batches are a pure function of it."""

    step: Int[Array, ""]  # batches consumed
    params: dict  # trained
    buffers: dict  # router biases, hash tables
    optimizer: Any
    skipped: Int[Array, ""]  # steps whose gradients were not finite and changed nothing


def declared(declarations: dict, *, optimizer: optax.GradientTransformation) -> State:
    """Shapes and dtypes of a state."""
    structs = param.map_declarations(lambda _, d: d.struct, declarations)
    params = tree.select(structs, declarations=declarations, keep=lambda d: d.trained)
    buffers = tree.select(structs, declarations=declarations, keep=lambda d: not d.trained)
    scalar = jax.ShapeDtypeStruct((), "int32")
    return State(scalar, params, buffers, jax.eval_shape(optimizer.init, params), scalar)


def shardings(state: State, *, declarations: dict, mesh: jax.sharding.Mesh) -> State:
    """Where each array lives. Optimizer state lies like the parameter whose path its own path ends with."""
    by_path = param.flatten(declarations)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = param.path_name(path).split("/")
        for start in range(len(keys)):
            declaration = by_path.get("/".join(keys[start:]))
            if declaration is not None and declaration.shape == leaf.shape:
                return rules.sharding(declaration.axes, shape=leaf.shape, mesh=mesh)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def create(key: Array, *, declarations: dict, optimizer: optax.GradientTransformation) -> State:
    """A state before its first step (hash tables still empty). Trace it under `jax.jit` with output shardings."""
    drawn = param.initialise(declarations, key)
    params = tree.select(drawn, declarations=declarations, keep=lambda d: d.trained)
    buffers = tree.select(drawn, declarations=declarations, keep=lambda d: not d.trained)
    zero = jax.numpy.zeros((), jax.numpy.int32)
    return State(zero, params, buffers, optimizer.init(params), zero)
