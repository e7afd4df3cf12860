"""Everything that a step changes, and where its parts live on the mesh."""

from typing import Any, NamedTuple

import jax
import numpy as np
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
    scalar: Any = jax.ShapeDtypeStruct((), "int32")
    return State(scalar, params, buffers, jax.eval_shape(optimizer.init, params), scalar)


def shardings(state: State, *, declarations: dict, mesh: jax.sharding.Mesh) -> State:
    """Where each array lives. Optimizer state lies like the parameter whose path its own path ends with."""
    by_path = param.flatten(declarations)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = param.path_name(path).split("/")
        for start in range(len(keys)):
            declaration = by_path.get("/".join(keys[start:]))
            if declaration is not None and declaration.shape == leaf.shape:
                return rules.parameter_sharding(declaration.axes, shape=leaf.shape, mesh=mesh)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def create(seed: int, *, declarations: dict, optimizer: optax.GradientTransformation, placed: State) -> State:
    """A state before its first step; hash tables are still empty.

    Args:
        seed: of the parameters' first values.
        declarations: of all parameters.
        optimizer: of the trained ones.
        placed: shapes and shardings of the state.
    """
    drawn = param.initialise(declarations, seed, shardings=jax.tree.map(lambda x: x.sharding, tree.merge(placed.params, placed.buffers)))
    params = tree.select(drawn, declarations=declarations, keep=lambda d: d.trained)
    buffers = tree.select(drawn, declarations=declarations, keep=lambda d: not d.trained)
    return begin(params, buffers, optimizer=optimizer, placed=placed)


def begin(params: dict, buffers: dict, *, optimizer: optax.GradientTransformation, placed: State) -> State:
    """A state before its first step, of given parameters.

    Args:
        params: the trained ones, placed.
        buffers: the others, placed.
        optimizer: of the trained ones.
        placed: shapes and shardings of the state.
    """
    started = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, placed.optimizer))(params)
    zero = jax.device_put(np.zeros((), np.int32), placed.step.sharding)
    return State(zero, params, buffers, started, zero.copy())
