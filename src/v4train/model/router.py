"""Which experts a token goes to, and how their load is balanced (V4 report 2.1; per-modality bias as V4.1's `bias_vl`).

Affinity is ``sqrt(softplus(logit))``, or V3's sigmoid, in fp32. Selection ranks affinity *plus* a bias; the mixing weights are the
*unbiased* affinities of the chosen experts, normalised to sum 1, times a constant. The bias has a row per modality (an image's patches
and a text's words load experts differently) and no gradient: after a step it moves by a fixed speed towards balance (`update_bias`).

The first layers are hash-routed: a fixed table gives the experts of a text token by its id, the gate still weighs them. All slots
of an image carry the same placeholder id and would land on the same experts, so media tokens use the learned gate there too. The
table is balanced by the token frequencies of the training data (`balanced_table`); a table of zeros, or one that ignores
frequencies, floods a few experts.

The choice may also be *given*: made for the same tokens by a forward pass with other parameters (anticipatory routing, V4 report). Then
only the selection is foreign: affinities, weights, balance loss and load are those of the current parameters.

The balance loss is sequence-wise: per document ``E / (k T^2) sum_i (tokens that chose i) (sum of normalised affinity i)``, 1 when
balanced and E / k when collapsed; weighted by document length.
"""

import functools
import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.ops import gather, segments
from v4train.sharding import constrain


class Routing(NamedTuple):
    """Where tokens go. Padding goes nowhere: expert id ``E``, weight 0."""

    experts: Int[Array, "b s k"]
    weights: Float[Array, "b s k"]
    load: Float[Array, "m e"]  # tokens per modality and expert
    balance_loss: Float[Array, ""]  # summed over tokens; 0 on a hash layer


_AFFINITIES = {"sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)), "sigmoid": jax.nn.sigmoid}


class Router(nnx.Module):
    """The gate of one layer, with its bias and, on a hash layer, its table."""

    def __init__(self, config: config_lib.ModelConfig, *, hashed: bool):
        self.config, self.hashed = config.moe, hashed
        moe = config.moe
        gate = {"precision": "fp32", "tags": frozenset({"router_gate"})}
        self.gate = param.param((config.hidden, moe.experts), "D _", param.Normal(config.init_std), **gate)
        self.bias = param.buffer((len(config_lib.MODALITIES), moe.experts), "M _", dtype=jnp.float32, tags=frozenset({"router_bias"}))
        if hashed:
            self.table = param.buffer((config.vocab_size, moe.top_k), "_ _", dtype=jnp.int32, tags=frozenset({"hash_table"}))

    def __call__(self, x: Float[Array, "b s d"], inputs: context_lib.Inputs, given: Int[Array, "b s k"] | None = None) -> Routing:
        """Where the tokens go: to the ``given`` experts, as an earlier `Routing` of the same batch has them, or to the best ones (None)."""
        real = inputs.segment_ids > 0
        affinity = _AFFINITIES[self.config.affinity](x.astype(jnp.float32) @ self.gate[...])
        experts = self._choose(affinity, inputs) if given is None else jnp.where(real[..., None], given, 0)
        return self._routed(affinity, experts, inputs, real)

    def _choose(self, affinity: Float[Array, "b s e"], inputs: context_lib.Inputs) -> Int[Array, "b s k"]:
        biased = jax.lax.stop_gradient(affinity) + self.bias[...].at[inputs.modality].get(mode="promise_in_bounds")
        experts = constrain.shard_local(functools.partial(_best, k=self.config.top_k), inputs=("B S _",), outputs="B S _")(biased)
        if self.hashed:
            by_id = self.table[...].at[inputs.tokens].get(mode="promise_in_bounds")
            experts = jnp.where((inputs.modality == 0)[..., None], by_id, experts)
        return experts

    def _routed(self, affinity: Array, experts: Array, inputs: context_lib.Inputs, real: Array) -> Routing:
        moe = self.config
        chosen = gather.take_elements(affinity, experts)
        weights = chosen / jnp.sum(chosen, axis=-1, keepdims=True) * moe.scaling
        picked = jax.nn.one_hot(experts, moe.experts, dtype=jnp.float32).sum(axis=2) * real[..., None]
        modality = jax.nn.one_hot(inputs.modality, len(config_lib.MODALITIES), dtype=jnp.float32)
        return Routing(
            experts=jnp.where(real[..., None], experts, moe.experts),
            weights=jnp.where(real[..., None], weights, 0.0),
            load=jnp.einsum("bsm,bse->me", modality, picked),
            balance_loss=jnp.zeros(()) if self.hashed else _balance_loss(affinity, picked, inputs.segment_ids, moe.top_k),
        )


def _best(scores: Float[Array, "b s e"], *, k: int) -> Int[Array, "b s k"]:
    """Left to itself, the compiler gathers the scores of all tokens in order to sort those of each."""
    return jax.lax.top_k(scores, k)[1]


def _balance_loss(affinity: Array, picked: Array, segment_ids: Array, top_k: int) -> Array:
    """Only the affinities have a gradient, so each token takes its document's choices from differences of a running sum: no scatter."""
    share = affinity / jnp.sum(affinity, axis=-1, keepdims=True)
    totals = functools.partial(segments.totals, axis_name=constrain.mesh_axis("S"))
    totals = constrain.shard_local(totals, inputs=("B S _", "B S"), outputs="B S _")
    chosen = totals(jax.lax.stop_gradient(picked), segment_ids)
    real = (segment_ids > 0).astype(jnp.float32)
    tokens = jnp.maximum(totals(real[..., None], segment_ids)[..., 0], 1.0)
    return jnp.sum(jnp.sum(share * chosen, axis=-1) * real / tokens) * affinity.shape[-1] / top_k


def update_bias(
    bias: Float[Array, "... m e"], load: Float[Array, "... m e"], *, speed: Float[Array, ""] | float
) -> Float[Array, "... m e"]:
    """Raises the bias of experts below the mean load of a modality and lowers it above, by ``speed``; absent modalities keep theirs."""
    return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def hash_table(kind: str, counts: np.ndarray, *, experts: int, top_k: int, seed: int) -> np.ndarray:
    """The hash table of one layer, as `MoeConfig.hash_table` says: i32 ``[vocab, top_k]``, distinct experts per token."""
    makers = {"balanced": balanced_table, "round_robin": _round_robin_table, "random": _random_table}
    return makers[kind](counts, experts=experts, top_k=top_k, seed=seed)


def _round_robin_table(counts: np.ndarray, *, experts: int, top_k: int, seed: int) -> np.ndarray:
    """The same in every layer."""
    del seed
    return ((np.arange(len(counts))[:, None] * top_k + np.arange(top_k)) % experts).astype(np.int32)


def _random_table(counts: np.ndarray, *, experts: int, top_k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = np.array_split(np.arange(len(counts)), max(1, len(counts) // 4096))
    return np.concatenate([rng.random((len(rows), experts), np.float32).argsort(axis=1)[:, :top_k] for rows in blocks]).astype(np.int32)


def balanced_table(counts: np.ndarray, *, experts: int, top_k: int, seed: int) -> np.ndarray:
    """The hash table of one layer: i32 ``[vocab, top_k]``, distinct experts per token, load balanced by frequency.

    Greedy: tokens from most to least frequent take the ``top_k`` least loaded experts. Ties are broken at random, by ``seed``, so
    that layers differ.

    Args:
        counts: occurrences of each token id in the training data, ``[vocab]``; ids that never occur count a little.
    """
    rng = np.random.default_rng(seed)
    weights = np.asarray(counts, np.float64) + max(float(np.sum(counts)), 1.0) * 1e-6 / len(counts)
    table = np.zeros((len(counts), top_k), np.int32)
    heap: list[tuple[float, float, int]] = [(0.0, float(tie), int(expert)) for expert, tie in enumerate(rng.permutation(experts))]
    heapq.heapify(heap)
    for token in np.argsort(-weights, kind="stable"):
        taken = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in taken]
        for load, _, expert in taken:
            heapq.heappush(heap, (load + float(weights[token]), float(rng.random()), expert))
    return table
