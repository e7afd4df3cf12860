"""CSA: overlapping compression (4 tokens an entry), a lightning indexer, and attention to the entries it selects (V4 report 2.3.1).

The indexer has its own small compressor for keys; its queries come from the same latent as the main ones. It reads detached inputs and the
selection has no derivative, so it learns from its KL loss alone, and the KL loss teaches nothing else.
"""

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model.attention import compressor, projections
from v4train.ops import compress, rope, sparse_attention


class Indexer(nnx.Module):
    """Scores entries for queries; see `ops.sparse_attention.Index`."""

    def __init__(self, config: config_lib.ModelConfig, kind: config_lib.CompressedSparseConfig):
        init = param.Normal(config.init_std)
        self.kind = kind
        self.wq_b = param.param((config.attention.query_rank, kind.index_heads * kind.index_head_dim), "R _", init, heads=kind.index_heads)
        self.weights_proj = param.param((config.hidden, kind.index_heads), "D _", init)
        self.compressor = compressor.Compressor(config, ratio=kind.ratio, width=kind.index_head_dim, overlap=True)

    def __call__(
        self, x: Float[Array, "b s d"], latent: Float[Array, "b s r"], context: context_lib.Context, *, blocks: compress.Blocks, freqs
    ) -> sparse_attention.Index:
        """Queries, weights and keys from detached inputs."""
        x, latent = jax.lax.stop_gradient(x), jax.lax.stop_gradient(latent)
        query, weight = self.queries(x, latent, context.inputs.positions, freqs=freqs)
        return sparse_attention.Index(query, weight, key=self.compressor(x, blocks, freqs=freqs))

    def queries(
        self, x: Float[Array, "b s d"], latent: Float[Array, "b s r"], positions: Int[Array, "b s"], *, freqs: np.ndarray
    ) -> tuple[Float[Array, "b s i j"], Float[Array, "b s i"]]:
        """Rotated index queries, and the weights of the index heads."""
        kind = self.kind
        query = (latent @ self.wq_b[...]).reshape(*x.shape[:2], kind.index_heads, kind.index_head_dim)
        weight = (x @ self.weights_proj[...]) * (kind.index_head_dim * kind.index_heads) ** -0.5
        return rope.rotate(query, positions, freqs=freqs), weight


class CompressedSparseAttention(nnx.Module):
    """Window, selected entries, and a sink in one softmax; rotation with YaRN."""

    def __init__(self, config: config_lib.ModelConfig, kind: config_lib.CompressedSparseConfig):
        self.config, self.kind = config.attention, kind
        self.projections = projections.Projections(config)
        self.compressor = compressor.Compressor(config, ratio=kind.ratio, width=config.attention.head_dim, overlap=True)
        self.indexer = param.tag(Indexer(config, kind), "indexer")

    def __call__(self, x: Float[Array, "b s d"], context: context_lib.Context) -> projections.AttentionOutput:
        p, blocks = self.projections, context.blocks.get(self.kind.ratio)
        freqs = projections.frequencies(self.config, compressed=True)
        latent = p.latent(x)
        entries, index, selection = None, None, None
        if blocks is not None:
            entries = context.entries(self.compressor(x, blocks, freqs=freqs), ratio=self.kind.ratio)
            if self.kind.phase != "dense":
                index = self.indexer(x, latent, context, blocks=blocks, freqs=freqs)
                sparse, k = self.kind.phase == "sparse", self.kind.top_k
                selection = sparse_attention.Selection(top_k=k if sparse else None, teach=True, recall_at=None if sparse else k)
        return p.attend(x, latent, context.inputs, freqs=freqs, entries=entries, index=index, selection=selection)
