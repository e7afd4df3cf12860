"""One layer: hyper-connection around attention, hyper-connection around experts."""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import hyper_connections, moe
from v4train.model.attention import compressed_sparse, heavily_compressed, window
from v4train.ops import norm
from v4train.sharding import constrain

_ATTENTION = {
    "window": window.WindowAttention,
    "csa": compressed_sparse.CompressedSparseAttention,
    "hca": heavily_compressed.HeavilyCompressedAttention,
}


class LayerSpec(NamedTuple):
    """What distinguishes layers of one model."""

    kind: str
    hashed: bool


class LayerStats(NamedTuple):
    """What a layer reports; losses are sums over tokens."""

    load: Float[Array, "m e"]
    balance_loss: Float[Array, ""]
    indexer_loss: Float[Array, ""]
    late: Float[Array, ""]  # (token, expert) pairs that waited for a further round of the exchange
    dropped: Float[Array, ""]  # and those that were left out
    experts: Int[Array, "b s k"] | None = None  # where each token went, if that was asked for
    recall: Float[Array, "3"] | None = None  # in the indexer's warm-up: its recall and the most it could be, over queries, and their number


class Block(nnx.Module):
    """A layer of the given kind."""

    def __init__(self, config: config_lib.ModelConfig, spec: LayerSpec):
        kind = config.kind(spec.kind)
        self.eps = config.norm_eps
        self.attention_mix = hyper_connections.site(config)
        self.attention_norm = param.scale(config.hidden)
        self.attention = _ATTENTION[spec.kind](config, kind)
        self.moe_mix = hyper_connections.site(config)
        self.moe_norm = param.scale(config.hidden)
        self.moe = moe.Moe(config, hashed=spec.hashed)

    def __call__(
        self,
        streams: Float[Array, "b s n d"],
        context: context_lib.Context,
        given: Int[Array, "b s k"] | None = None,
        *,
        keep_experts: bool = False,
    ) -> tuple[Float[Array, "b s n d"], LayerStats]:
        """The streams after the layer. ``given`` experts replace the router's choice; ``keep_experts`` reports where tokens went."""
        x, mixing = self.attention_mix(streams)
        attended = self.attention(norm.rms_norm(x, self.attention_norm[...], eps=self.eps), context)
        streams = constrain.constrain(hyper_connections.write_back(streams, attended.out, mixing), "B S N D")
        x, mixing = self.moe_mix(streams)
        mixed = self.moe(norm.rms_norm(x, self.moe_norm[...], eps=self.eps), context.inputs, given)
        streams = constrain.constrain(hyper_connections.write_back(streams, mixed.out, mixing), "B S N D")
        losses = mixed.routing.balance_loss, attended.indexer_loss
        return streams, LayerStats(
            mixed.routing.load,
            *losses,
            late=mixed.late,
            dropped=mixed.dropped,
            experts=mixed.routing.experts if keep_experts else None,
            recall=attended.recall,
        )
