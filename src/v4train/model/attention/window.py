"""Window attention: the last raw tokens and a sink. The first layers of V4-Flash, and every MTP block."""

from flax import nnx
from jaxtyping import Array, Float

from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model.attention import projections


class WindowAttention(nnx.Module):
    """Attention without compressed entries; plain rotation with theta 10,000."""

    def __init__(self, config: config_lib.ModelConfig, kind: config_lib.WindowConfig):
        self.config = config.attention
        self.projections = projections.Projections(config)

    def __call__(self, x: Float[Array, "b s d"], context: context_lib.Context) -> projections.AttentionOutput:
        p = self.projections
        freqs = projections.frequencies(self.config, compressed=False)
        return p.attend(x, p.latent(x), context.inputs, freqs=freqs)
