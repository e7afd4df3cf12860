"""A small state with every kind of leaf that a training state has, on any mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.checkpoint import config, policies


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def place(values, shape: tuple[int, int]):
    """Puts a tree of numpy arrays on a (rows, columns) mesh: matrices split over both axes, vectors over rows, scalars replicated."""
    mesh = jax.make_mesh(shape, ("rows", "columns"), devices=jax.devices()[: shape[0] * shape[1]])
    axes = {2: jax.P("rows", "columns"), 1: jax.P("rows"), 0: jax.P()}
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, axes[x.ndim])), values)


def as_template(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def values():
    """Random bits, NaN payloads and infinities included."""
    rng = np.random.default_rng(0)

    def bits(shape, dtype):
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)

    return {
        "params": {"w": bits((16, 32), np.float32), "half": bits((16, 8), jnp.bfloat16), "table": bits((8,), np.int32)},
        "optimizer": Moments(mu={"w": bits((16, 32), np.float32)}, count=np.asarray(7, np.int32)),
        "router": [bits((8,), np.uint32), np.zeros((0, 8), np.float32)],
        "eight": bits((16, 8), jnp.float8_e4m3fn),
    }


@pytest.fixture
def state(values):
    return place(values, (4, 2))


@pytest.fixture
def keep_all():
    return config.CheckpointConfig(keep=policies.Latest(count=100))
