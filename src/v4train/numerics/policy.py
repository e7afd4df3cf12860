"""Casts, decided in one place."""

import jax
import jax.numpy as jnp

from v4train.core import param
from v4train.numerics import config as config_lib


def compute_dtype(config: config_lib.NumericsConfig) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(config.compute)


def cast_for_compute(params: dict, *, declarations: dict, config: config_lib.NumericsConfig) -> dict:
    """Master weights -> weights of the forward pass. Parameters declared ``fp32`` and buffers stay as they are."""
    dtype = compute_dtype(config)

    def cast(declaration: param.Declaration, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if declaration.precision == "compute" else x

    return jax.tree.map(cast, declarations, params, is_leaf=param.is_declaration)
