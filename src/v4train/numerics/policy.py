"""Casts, decided in one place."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4train.core import param
from v4train.numerics import config as config_lib
from v4train.numerics import scaled

_FP4_BLOCK = (scaled.FP4_GROUP, 1)
"""Of a matrix ``[in, out]``: MXFP4 has a scale for 32 values along the input."""


def compute_dtype(config: config_lib.NumericsConfig) -> jnp.dtype:
    """The dtype of activations."""
    return jnp.dtype(config.compute)


def cast_for_compute(params: dict, *, declarations: dict, config: config_lib.NumericsConfig) -> dict:
    """Master weights -> weights of the forward pass. Parameters declared ``fp32`` and buffers stay as they are.

    Those whose products are in FP8 hold values of E4M3 in blocks of 128 x 128, which are exact in the compute dtype; those that are trained
    for FP4 have been rounded to E2M1 before, from the fp32 master. The gradient of the rounding is taken as 1.
    """
    dtype = compute_dtype(config)

    def cast(declaration: param.Declaration, x: jax.Array) -> jax.Array:
        form = format_of(declaration, config=config)
        if form != "compute":
            x = straight_through(x, form)
        return x.astype(dtype) if declaration.precision == "compute" else x

    return jax.tree.map(cast, declarations, params, is_leaf=param.is_declaration)


def format_of(declaration: param.Declaration, *, config: config_lib.NumericsConfig) -> str:
    """``compute``, ``fp8`` or ``mxfp4``: what a recipe says of a parameter's products."""
    return "compute" if declaration.product == "high" else getattr(config, declaration.product)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def straight_through(master: Float[Array, "... d f"], form: str) -> Float[Array, "... d f"]:
    """The values that ``form`` (``fp8`` or ``mxfp4``) has for a matrix; its derivative is that of the identity.

    MXFP4 becomes FP8 without loss as long as the scales of a block of 128 x 128 are within a factor of 2^14: E4M3 reaches from 2^-9 to 448,
    E2M1 from 1/2 to 6 in steps of at least 1/2. What is smaller is rounded again, as it would be for the FP8 units of DeepSeek's kernels.
    """
    if form == "mxfp4":
        master = scaled.rounded(master, scaled.E2M1, block=_FP4_BLOCK)
    return scaled.rounded(master, scaled.E4M3, block=scaled.FP8_BLOCK)


@straight_through.defjvp
def _straight_through_jvp(form: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return straight_through(*primals, form), tangents[0]


def count_weights(params: dict, *, declarations: dict, config: config_lib.NumericsConfig) -> dict[str, Float[Array, "3"]]:
    """Elements, saturated and vanished ones (`scaled.count`) of the weights of each role that has few bits, in their own first rounding."""
    counts: dict[str, Array] = {}
    leaves = jax.tree.leaves(declarations, is_leaf=param.is_declaration)
    for declaration, x in zip(leaves, jax.tree.leaves(params), strict=True):
        form = format_of(declaration, config=config)
        if form != "compute":
            fmt, block = (scaled.E2M1, _FP4_BLOCK) if form == "mxfp4" else (scaled.E4M3, scaled.FP8_BLOCK)
            counts[declaration.product] = counts.get(declaration.product, jnp.zeros(3)) + scaled.count(x, fmt, block=block)
    return counts
