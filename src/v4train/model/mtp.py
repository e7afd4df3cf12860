"""Multi-token prediction of depth 1 (V4 report, after V3): from the streams at t and the embedding of token t + 1, predict token t + 2.

Each stream gets the projected embedding of the next token added to its own projection; one window-attention block with experts
follows; its own collapse and norm lead to the shared output head. At the end of a document there is no next token: the embedding is
zero there, never the first of the next document.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import block as block_lib
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import hyper_connections, stack
from v4train.ops import norm


class MultiTokenPrediction(nnx.Module):
    """The MTP block with its projections."""

    def __init__(self, config: config_lib.ModelConfig):
        d, init = config.hidden, param.Normal(config.init_std)
        self.eps, self.remat = config.norm_eps, config.remat
        self.enorm, self.hnorm, self.norm = param.scale(d), param.scale(d), param.scale(d)
        self.e_proj = param.param((d, d), "D _", init)
        self.h_proj = param.param((d, d), "D _", init)
        self.block = block_lib.Block(config, block_lib.LayerSpec("window", hashed=False))
        self.collapse = hyper_connections.collapse(config)

    def __call__(
        self,
        streams: Float[Array, "b s n d"],
        embedded: Float[Array, "b s d"],
        context: context_lib.Context,
        given: Int[Array, "b s k"] | None = None,
        *,
        keep_experts: bool = False,
    ) -> tuple[Float[Array, "b s d"], block_lib.LayerStats]:
        """Normalised hidden states that predict token t + 2. ``given`` and ``keep_experts``: see `block.Block`."""
        segments = context.inputs.segment_ids
        goes_on = segments == context_lib.ahead(segments, by=1)
        following = jnp.where(goes_on[..., None], context_lib.ahead(embedded, by=1), 0)
        streams, stats = stack.remember(self.block, policy=self.remat, keep_experts=keep_experts)(
            self.join(streams, following), context, given
        )
        return self.hidden(streams), stats

    def join(self, streams: Float[Array, "b s n d"], following: Float[Array, "b s d"]) -> Float[Array, "b s n d"]:
        """The block's input, from the streams at t and the embedding of token t + 1."""
        extra = norm.rms_norm(following, self.enorm[...], eps=self.eps) @ self.e_proj[...]
        return norm.rms_norm(streams, self.hnorm[...], eps=self.eps) @ self.h_proj[...] + extra[:, :, None]

    def hidden(self, streams: Float[Array, "b s n d"]) -> Float[Array, "b s d"]:
        """The block's output streams as normalised hidden states, ready for the head."""
        return norm.rms_norm(self.collapse(streams), self.norm[...], eps=self.eps)
