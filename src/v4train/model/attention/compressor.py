"""Compressed entries of a layer: project, pool per block, normalise, rotate at the block's first position."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from v4train.core import param
from v4train.model import config as config_lib
from v4train.ops import compress, norm, rope
from v4train.sharding import constrain


class Compressor(nnx.Module):
    """Pools blocks of ``ratio`` tokens into entries of ``width`` channels, overlapping or not."""

    def __init__(self, config: config_lib.ModelConfig, *, ratio: int, width: int, overlap: bool):
        features, init = width * (2 if overlap else 1), param.Normal(config.init_std)
        self.overlap, self.eps = overlap, config.norm_eps
        self.wkv = param.param((config.hidden, features), "D K", init)
        self.wgate = param.param((config.hidden, features), "D K", init)
        table = {"group": "adamw", "decay": False, "precision": "fp32", "tags": frozenset({"position_table"})}
        self.ape = param.param((ratio, features), "_ K", init, **table)
        self.norm = param.scale(width, "K")

    def __call__(self, x: Float[Array, "b s d"], blocks: compress.Blocks, *, freqs: np.ndarray) -> Float[Array, "b n k"]:
        return self.entries(*self.project(x), blocks, freqs=freqs)

    def project(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s w"], Float[Array, "b s w"]]:
        """What each token contributes to its entry, and the fp32 logits of its weight."""
        return x @ self.wkv[...], jnp.einsum("bsd,dk->bsk", x, self.wgate[...], preferred_element_type=jnp.float32)

    def entries(
        self, values: Float[Array, "b s w"], gates: Float[Array, "b s w"], blocks: compress.Blocks, *, freqs: np.ndarray
    ) -> Float[Array, "b n k"]:
        """The entries of blocks of projected tokens. On a mesh, each device makes those that end in its part of a row."""
        pool = functools.partial(compress.pool, overlap=self.overlap, axis_name=constrain.mesh_axis("S"))
        pool = constrain.shard_local(pool, inputs=("B S _", "B S _", "_ _", "B S"), outputs="B S _")
        pooled = pool(values, gates, self.ape[...], blocks)
        return rope.rotate(norm.rms_norm(pooled, self.norm[...], eps=self.eps), blocks.position, freqs=freqs)
