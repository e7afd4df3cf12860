"""Text tokens, image patches and audio frames become one sequence, without any pretrained encoder.

Placeholder tokens mark the slots of media; the data says which patch or frame each slot holds. An image patch is normalised, goes
through a small MLP, gets a position from two tables (column, row) and is normalised again. An audio frame is 80 log-mel bins of 16
levels (dMel): the sum of one embedding row per bin, normalised. The weights of the last norms start at the text embedding's scale,
so no modality is louder at first. Patches arrive as uint8 and are converted here, on the device.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.ops import lookup, norm
from v4train.sharding import constrain


class ImageStem(nnx.Module):
    """uint8 patches -> embeddings."""

    def __init__(self, config: config_lib.ModelConfig, image: config_lib.ImageStemConfig):
        d, init = config.hidden, param.Normal(config.init_std)
        self.eps = config.norm_eps
        self.up = param.param((3 * image.patch**2, 2 * d), "_ F", init)
        self.down = param.param((2 * d, d), "F D", init)
        self.columns = param.param((image.grid, d), "_ D", init, group="adamw", precision="fp32")
        self.rows = param.param((image.grid, d), "_ D", init, group="adamw", precision="fp32")
        self.norm = param.scale(d, first=config.init_std)

    def __call__(self, patches: Int[Array, "b p x"], xy: Int[Array, "b p 2"]) -> Float[Array, "b p d"]:
        pixels = norm.layer_norm(patches.astype(jnp.float32) / 255, eps=self.eps).astype(self.up[...].dtype)
        x = jax.nn.gelu(pixels @ self.up[...]) @ self.down[...]
        places = self.columns[...].at[xy[..., 0]].get(mode="clip") + self.rows[...].at[xy[..., 1]].get(mode="clip")
        return norm.rms_norm(x + places.astype(x.dtype), self.norm[...], eps=self.eps)


class AudioStem(nnx.Module):
    """dMel levels -> embeddings. The sum of 80 rows is computed as one product with a multi-hot vector."""

    def __init__(self, config: config_lib.ModelConfig, audio: config_lib.AudioStemConfig):
        self.eps, self.levels = config.norm_eps, audio.levels
        self.table = param.param((audio.bins * audio.levels, config.hidden), "_ D", param.Normal(config.init_std), group="adamw")
        self.norm = param.scale(config.hidden, first=config.init_std)

    def __call__(self, frames: Int[Array, "b a bins"]) -> Float[Array, "b a d"]:
        table = self.table[...]
        hot = jax.nn.one_hot(frames, self.levels, dtype=table.dtype).reshape(*frames.shape[:2], -1)
        return norm.rms_norm(hot @ table, self.norm[...], eps=self.eps)


class Embedding(nnx.Module):
    """Token table and stems."""

    def __init__(self, config: config_lib.ModelConfig):
        init = param.Normal(config.init_std)
        self.table = param.param((config.vocab_size, config.hidden), "V D", init, group="adamw", tags=frozenset({"looked_up"}))
        self.image = None if config.image is None else ImageStem(config, config.image)
        self.audio = None if config.audio is None else AudioStem(config, config.audio)

    def __call__(self, inputs: context_lib.Inputs) -> Float[Array, "b s d"]:
        x = _look_up(self.table[...], inputs.tokens)
        if self.image is not None and inputs.patches is not None:
            assert inputs.patch_xy is not None
            assert inputs.patch_slot is not None
            x = _fill(x, self.image(inputs.patches, inputs.patch_xy), inputs.patch_slot)
        if self.audio is not None and inputs.audio is not None:
            assert inputs.audio_slot is not None
            x = _fill(x, self.audio(inputs.audio), inputs.audio_slot)
        return x


def _look_up(table: Float[Array, "v d"], tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """Rows of the token table, which stays where it is stored."""
    row_axes, column_axes = constrain.stored_axes("V D", shape=table.shape)
    local = functools.partial(lookup.rows, row_axes=row_axes, column_axes=column_axes, token_axes=constrain.mesh_axes("T"))
    return constrain.shard_local(local, inputs=(constrain.Stored("V D", gathered=False), "B S"), outputs="B S _")(table, tokens)


def _fill(x: Float[Array, "b s d"], media: Float[Array, "b p d"], slot: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """Puts ``media[b, slot]`` where a slot is given (>= 0). Every device has its rows' media whole and fills its part of them."""

    def local(x: Array, media: Array, slot: Array) -> Array:
        taken = jnp.take_along_axis(media, jnp.maximum(slot, 0)[..., None], axis=1, mode="promise_in_bounds")
        return jnp.where((slot >= 0)[..., None], taken, x)

    return constrain.shard_local(local, inputs=("B S _", "B _ _", "B S"), outputs="B S _")(x, media, slot)
