"""Manifold-constrained hyper-connections (mHC): several residual streams, mixed by a doubly stochastic matrix (V4 report 2.2).

Around a sublayer: its input is a gated sum of the streams; its output is written back to each stream with a gate, and the streams
are mixed by ``comb``. The write-back is ``new_k = post_k * out + sum_j comb[j, k] * stream_j``: the transpose of comb is applied.
comb is not symmetric, and a model with the wrong direction trains nearly as well, so a test holds it.

A plain residual is the same with one stream whose coefficients are all 1 and neither stored nor computed (`Residual`, `OnlyStream`);
`site` and `collapse` choose.

All coefficients are fp32. They come from the RMS-normalised concatenation of the streams (no learned weight); the norm is a scalar
per token, so it is applied after the product with `fn`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4train.core import param
from v4train.model import config as config_lib
from v4train.ops import sinkhorn


class Mixing(NamedTuple):
    """How one sublayer's output goes back into the streams."""

    post: Float[Array, "b s n"]
    comb: Float[Array, "n n b s"]


def _coefficients(streams: Float[Array, "b s n d"], fn: Float[Array, "nd c"], *, eps: float) -> Float[Array, "b s c"]:
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)
    return (flat @ fn) * scale


def write_back(streams: Float[Array, "b s n d"], out: Float[Array, "b s d"], mixing: Mixing | None) -> Float[Array, "b s n d"]:
    """``new_k = post_k * out + sum_j comb[j, k] * stream_j``; without coefficients ``stream + out``."""
    if mixing is None:
        return streams + out[:, :, None].astype(streams.dtype)
    mixed = jnp.einsum("jkbs,bsjd->bskd", mixing.comb, streams.astype(jnp.float32))
    return (mixed + mixing.post[..., None] * out.astype(jnp.float32)[:, :, None]).astype(streams.dtype)


class HyperConnection(nnx.Module):
    """One site: before attention, or before the experts."""

    def __init__(self, config: config_lib.ModelConfig):
        assert isinstance(config.hyper, config_lib.HyperConnectionConfig)
        self.config, self.eps = config.hyper, config.norm_eps
        n = config.hyper.streams
        fixed = {"group": "adamw", "decay": False, "precision": "fp32", "tags": frozenset({"hyper_gate"})}
        self.fn = param.param((n * config.hidden, (2 + n) * n), "D _", param.Normal(config.init_std), precision="fp32")
        self.scale = param.param((3,), "_", param.Constant(config.hyper.scale_init), **fixed)
        self.base = param.param(((2 + n) * n,), "_", param.Constant(0.0), **fixed)

    def __call__(self, streams: Float[Array, "b s n d"]) -> tuple[Float[Array, "b s d"], Mixing]:
        """The sublayer's input, and how to write its output back."""
        n, eps = self.config.streams, self.config.eps
        raw = _coefficients(streams, self.fn[...], eps=self.eps)
        pre, post, comb = jnp.split(raw, [n, 2 * n], axis=-1)
        base_pre, base_post, base_comb = jnp.split(self.base[...], [n, 2 * n])
        scale = self.scale[...]
        pre = jax.nn.sigmoid(pre * scale[0] + base_pre[None, None]) + eps
        post = 2 * jax.nn.sigmoid(post * scale[1] + base_post[None, None])
        comb = jnp.moveaxis(comb * scale[2] + base_comb[None, None], -1, 0).reshape(n, n, *comb.shape[:2])
        comb = sinkhorn.doubly_stochastic(comb, iterations=self.config.iterations, eps=eps)
        collapsed = jnp.einsum("bsn,bsnd->bsd", pre, streams.astype(jnp.float32)).astype(streams.dtype)
        return collapsed, Mixing(post, comb)


class HeadCollapse(nnx.Module):
    """Collapses the streams after the last layer with learned sigmoid gates."""

    def __init__(self, config: config_lib.ModelConfig):
        assert isinstance(config.hyper, config_lib.HyperConnectionConfig)
        self.config, self.eps = config.hyper, config.norm_eps
        n = config.hyper.streams
        fixed = {"group": "adamw", "decay": False, "precision": "fp32", "tags": frozenset({"hyper_gate"})}
        self.fn = param.param((n * config.hidden, n), "D _", param.Normal(config.init_std), precision="fp32")
        self.scale = param.param((1,), "_", param.Constant(config.hyper.scale_init), **fixed)
        self.base = param.param((n,), "_", param.Constant(0.0), **fixed)

    def __call__(self, streams: Float[Array, "b s n d"]) -> Float[Array, "b s d"]:
        raw = _coefficients(streams, self.fn[...], eps=self.eps)
        gates = jax.nn.sigmoid(raw * self.scale[...][None, None] + self.base[...][None, None]) + self.config.eps
        return jnp.einsum("bsn,bsnd->bsd", gates, streams.astype(jnp.float32)).astype(streams.dtype)


class Residual(nnx.Module):
    """One site of a model with plain residuals: the sublayer reads the only stream."""

    def __init__(self, config: config_lib.ModelConfig):
        assert config.hyper.streams == 1

    def __call__(self, streams: Float[Array, "b s 1 d"]) -> tuple[Float[Array, "b s d"], None]:
        return streams[:, :, 0], None


class OnlyStream(nnx.Module):
    """What the head of such a model reads."""

    def __init__(self, config: config_lib.ModelConfig):
        assert config.hyper.streams == 1

    def __call__(self, streams: Float[Array, "b s 1 d"]) -> Float[Array, "b s d"]:
        return streams[:, :, 0]


_KINDS = {config_lib.HyperConnectionConfig: (HyperConnection, HeadCollapse), config_lib.ResidualConfig: (Residual, OnlyStream)}


def site(config: config_lib.ModelConfig) -> HyperConnection | Residual:
    """What stands before a sublayer of this model."""
    return _KINDS[type(config.hyper)][0](config)


def collapse(config: config_lib.ModelConfig) -> HeadCollapse | OnlyStream:
    """What stands before the head of this model."""
    return _KINDS[type(config.hyper)][1](config)
