"""Queries, the shared key/value head and the grouped output: common to all attention kinds (V4 report 2.3).

The low-rank query latent is also what the indexer reads. Queries get an RMSNorm per head without a weight, after the up-projection;
the key/value head gets one with a weight. Heads are projected out in groups: each group has its own matrix to a low rank, then one
matrix takes all groups to the hidden width.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import product
from v4train.ops import norm, rope, select, sparse_attention
from v4train.sharding import constrain


class AttentionOutput(NamedTuple):
    """What an attention layer gives: its contribution to the streams, and the indexer's loss summed over tokens (0 without one). In the
    indexer's warm-up also its recall, summed over queries, and their number."""

    out: Float[Array, "b s d"]
    indexer_loss: Float[Array, ""]
    recall: Float[Array, "3"] | None = None


def frequencies(config: config_lib.AttentionConfig, *, compressed: bool) -> np.ndarray:
    """Rotation of a layer kind: plain 10k for window layers, 160k with YaRN for layers with compressed entries."""
    if not compressed:
        return rope.frequencies(config.rope_dim, theta=config.rope_theta)
    scaling = {} if config.yarn is None else config.yarn.model_dump()
    return rope.frequencies(config.rope_dim, theta=config.compressed_rope_theta, **scaling)


def _on_mesh(
    query: Float[Array, "b s h k"],
    keys: Float[Array, "b s k"],
    sink: Float[Array, "h"],
    *,
    segment_ids: Int[Array, "b s"],
    entries: sparse_attention.Entries | None,
    index: sparse_attention.Index | None,
    **settings,
) -> sparse_attention.Attended:
    """`sparse_attention.attend`, each device for its rows, its part of them, and its heads."""

    selection = settings["selection"]
    measured = index is not None and selection is not None and selection.recall_at is not None

    def local(query, keys, sink, segment_ids, values, end, segment, *index) -> tuple[Array, ...]:
        attended = sparse_attention.attend(
            query,
            keys,
            sink,
            segment_ids=segment_ids,
            entries=None if values is None else sparse_attention.Entries(values, end, segment),
            index=None if index[0] is None else sparse_attention.Index(*index),
            axis_name=constrain.mesh_axis("S"),
            heads_axis=constrain.mesh_axis("H"),
            **settings,
        )
        recall = () if attended.recall is None else (attended.recall[:, None],)
        return attended.out, attended.indexer_loss[:, None], *recall

    of_entries, of_index = ("B S _", "B _", "B _"), ("B S _ _", "B S _", "B S _")
    outputs = ("B S H _", "B S", *(["B S _"] if measured else []))
    run = constrain.shard_local(local, inputs=("B S H _", "B S _", "H", "B S", *of_entries, *of_index), outputs=outputs)
    out, *sums = run(query, keys, sink, segment_ids, *(entries or (None,) * 3), *(index or (None,) * 3))
    return sparse_attention.Attended(out, *(x.sum(axis=1) for x in sums))


class Projections(nnx.Module):
    """The weights around the attention operation."""

    def __init__(self, config: config_lib.ModelConfig):
        a, d, init = config.attention, config.hidden, param.Normal(config.init_std)
        self.config, self.eps = a, config.norm_eps
        self.wq_a = param.param((d, a.query_rank), "D R", init, product="linear")
        self.q_norm = param.scale(a.query_rank, "R")
        self.wq_b = param.param((a.query_rank, a.heads * a.head_dim), "R H", init, heads=a.heads, product="linear")
        self.wkv = param.param((d, a.head_dim), "D K", init, product="linear")
        self.kv_norm = param.scale(a.head_dim, "K")
        scalar = {"group": "adamw", "decay": False, "precision": "fp32", "tags": frozenset({"sink"})}
        self.sink = param.param((a.heads,), "_", param.Constant(0.0), **scalar)
        self.wo_a = param.param((a.output_groups, a.heads // a.output_groups * a.head_dim, a.output_rank), "G H R", init, product="linear")
        self.wo_b = param.param((a.output_groups * a.output_rank, d), "O D", init, product="linear")

    def latent(self, x: Float[Array, "b s d"]) -> Float[Array, "b s r"]:
        """The normalised low-rank latent that queries and index queries are made of."""
        return norm.rms_norm(product.times(x, self.wq_a), self.q_norm[...], eps=self.eps)

    def queries(self, latent: Float[Array, "b s r"], positions: Int[Array, "b s"], *, freqs: np.ndarray) -> Float[Array, "b s h k"]:
        """Rotated queries."""
        query = product.times(latent, self.wq_b).reshape(*latent.shape[:2], self.config.heads, -1)
        return rope.rotate(norm.rms_norm(query, eps=self.eps), positions, freqs=freqs)

    def keys(self, x: Float[Array, "b s d"], positions: Int[Array, "b s"], *, freqs: np.ndarray) -> Float[Array, "b s k"]:
        """Rotated raw keys, which are the values too."""
        return rope.rotate(norm.rms_norm(product.times(x, self.wkv), self.kv_norm[...], eps=self.eps), positions, freqs=freqs)

    def attend(
        self,
        x: Float[Array, "b s d"],
        latent: Float[Array, "b s r"],
        inputs: context_lib.Inputs,
        *,
        freqs: np.ndarray,
        entries: sparse_attention.Entries | None = None,
        index: sparse_attention.Index | None = None,
        selection: sparse_attention.Selection | None = None,
    ) -> AttentionOutput:
        """Attention to the window and to ``entries``, turned back by the query's position and projected to the hidden width."""
        query, keys = self.queries(latent, inputs.positions, freqs=freqs), self.keys(x, inputs.positions, freqs=freqs)
        chosen = select.implementation("sparse_attention")
        attend = functools.partial(
            _on_mesh if chosen == "chunked" else chosen, window=self.config.window, chunk=self.config.chunk, selection=selection
        )
        attended = attend(query, keys, self.sink[...], segment_ids=inputs.segment_ids, entries=entries, index=index)
        return self.output(attended, inputs.positions, freqs=freqs, dtype=x.dtype)

    def output(
        self, attended: sparse_attention.Attended, positions: Int[Array, "b s"], *, freqs: np.ndarray, dtype: jnp.dtype
    ) -> AttentionOutput:
        """Turns the result back by the query's position and projects it to the hidden width."""
        heads = rope.rotate(attended.out, positions, freqs=freqs, inverse=True).astype(dtype)
        grouped = heads.reshape(*heads.shape[:2], self.config.output_groups, -1)
        low = product.times(grouped, self.wo_a)
        recall = None if attended.recall is None else attended.recall.sum(axis=0)
        return AttentionOutput(product.times(low.reshape(*heads.shape[:2], -1), self.wo_b), attended.indexer_loss.sum(), recall)
