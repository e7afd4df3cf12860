"""The whole model: embedding, residual streams, layers, collapse, norm, head, and the multi-token prediction block.

A `Transformer` is abstract until `core.param.bind` gives it arrays:

    model = Transformer(config)                                   # declarations only
    params = param.initialise(param.declarations(model), seed)
    outputs = param.bind(model, params)(inputs)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import embedding, hyper_connections, mtp, router, stack
from v4train.ops import cross_entropy, norm
from v4train.sharding import constrain


class Outputs(NamedTuple):
    """What a forward pass gives. Losses are sums over tokens and layers."""

    hidden: Float[Array, "b s d"]  # normalised; predicts token t + 1
    mtp_hidden: Float[Array, "b s d"] | None  # normalised; predicts token t + 2
    balance_loss: Float[Array, ""]
    indexer_loss: Float[Array, ""]
    loads: dict  # tokens per modality and expert: {"stack": {run: {place: [repeat, M, E]}}, "mtp": [M, E]}
    late: Float[Array, ""]  # (token, expert) pairs that waited for a further round of the exchange
    dropped: Float[Array, ""]  # and those that were left out
    recall: Float[Array, "3"] | None = (
        None  # in warm-up: the indexer's recall and the most it could be, over queries and layers; their number
    )
    experts: dict | None = None  # where tokens went, if that was asked for: {"stack": {run: {place: [repeat, b, s, k]}}, "mtp": [b, s, k]}


class Transformer(nnx.Module):
    """A V4 decoder."""

    def __init__(self, config: config_lib.ModelConfig):
        self.config = config
        self.embedding = param.tag(embedding.Embedding(config), "embedding")
        self.stack = stack.Stack(config)
        self.collapse = hyper_connections.collapse(config)
        self.norm = param.scale(config.hidden)
        self.head = param.param(
            (config.hidden, config.vocab_size), "D V", param.Normal(config.init_std), group="adamw", tags=frozenset({"head"})
        )
        self.mtp = None if config.mtp is None else param.tag(mtp.MultiTokenPrediction(config), "mtp")

    def __call__(
        self,
        inputs: context_lib.Inputs,
        *,
        context: context_lib.Context | None = None,
        given: dict | None = None,
        keep_experts: bool = False,
    ) -> Outputs:
        """Hidden states of every position; `token_losses` and `logits` turn them into predictions.

        Args:
            inputs: the batch.
            context: what the layers look at, if it is not what `context.make` finds in the batch.
            given: experts that replace the routers' choices, as ``experts`` of an earlier pass over the same batch; None: they choose.
            keep_experts: whether the outputs shall have ``experts``.
        """
        context = context or context_lib.make(inputs, config=self.config)
        embedded = constrain.constrain(_gathered(self.embedding)(inputs), "B S D")
        spread = constrain.constrain(self.spread(embedded), "B S N D")
        streams, stats = self.stack(spread, context, None if given is None else given["stack"], keep_experts=keep_experts)
        hidden = self.hidden(streams)
        layers = [layer for run in stats.values() for layer in run.values()]
        loads, experts = ({"stack": _of_layers(stats, field)} for field in ("load", "experts"))
        mtp_hidden = None
        if self.mtp is not None:
            foreseen = None if given is None else given["mtp"]
            mtp_hidden, mtp_stats = _gathered(self.mtp)(streams, embedded, context, foreseen, keep_experts=keep_experts)
            layers.append(mtp_stats)
            loads["mtp"], experts["mtp"] = mtp_stats.load, mtp_stats.experts
        recalls = [layer.recall.reshape(-1, 3).sum(axis=0) for layer in layers if layer.recall is not None]
        return Outputs(
            hidden=constrain.constrain(hidden, "B S D"),
            mtp_hidden=mtp_hidden,
            balance_loss=jnp.stack([layer.balance_loss.sum() for layer in layers]).sum(),
            indexer_loss=jnp.stack([layer.indexer_loss.sum() for layer in layers]).sum(),
            loads=loads,
            late=jnp.stack([layer.late.sum() for layer in layers]).sum(),
            dropped=jnp.stack([layer.dropped.sum() for layer in layers]).sum(),
            recall=jnp.stack(recalls).sum(axis=0) if recalls else None,
            experts=experts if keep_experts else None,
        )

    def spread(self, embedded: Float[Array, "b s d"]) -> Float[Array, "b s n d"]:
        """The residual streams before the first layer: the embedding, once for each."""
        return jnp.broadcast_to(embedded[:, :, None], (*embedded.shape[:2], self.config.hyper.streams, embedded.shape[-1]))

    def hidden(self, streams: Float[Array, "b s n d"]) -> Float[Array, "b s d"]:
        """Streams after the last layer as normalised hidden states, ready for the head."""
        return norm.rms_norm(self.collapse(streams), self.norm[...], eps=self.config.norm_eps)

    def _head(self) -> Float[Array, "d v"]:
        return constrain.unshard(self.head[...], self.head.get_metadata()["declaration"].axes)

    def _allowed(self) -> Bool[Array, "v"] | None:
        if not self.config.media_tokens:
            return None
        allowed = np.ones(self.config.vocab_size, bool)
        allowed[list(self.config.media_tokens)] = False
        return jnp.asarray(allowed)

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """fp32 logits; media placeholders get the lowest finite value."""
        return cross_entropy.logits(hidden, self._head(), allowed=self._allowed())

    def token_losses(self, hidden: Float[Array, "b s d"], targets: Int[Array, "b s"]) -> Float[Array, "b s"]:
        """Cross-entropy of each position, nats, fp32. Each device has its tokens and its part of the vocabulary."""
        # The backward pass gathers the head again, like every parameter, instead of keeping it.
        return jax.checkpoint(self._per_target(cross_entropy.cross_entropy, "B S"))(hidden, self.head[...], targets, self._allowed())

    def verdicts(self, hidden: Float[Array, "b s d"], targets: Int[Array, "b s"]) -> Float[Array, "b s 2"]:
        """Of each position: nats of its target, and whether no id is more likely; see `ops.cross_entropy.verdicts`. Not for training."""
        return self._per_target(cross_entropy.verdicts, "B S _")(hidden, self.head[...], targets, self._allowed())

    def _per_target(self, function: Callable[..., Array], outputs: str) -> Callable[..., Array]:
        """One of the functions of `ops.cross_entropy` on the mesh."""
        function = functools.partial(function, chunk=self.config.loss_chunk, axis_name=constrain.mesh_axis("V"))

        def local(hidden: Array, head: Array, targets: Array, allowed: Array | None) -> Array:
            return function(hidden, head, targets, allowed=allowed)

        return constrain.shard_local(local, inputs=("B S _", constrain.Stored("D V"), "B S", "V"), outputs=outputs)


def _of_layers(stats: dict[str, dict[str, Any]], field: str) -> dict[str, dict[str, Array]]:
    """One field of the statistics of all layers."""
    return {name: {place: getattr(layer, field) for place, layer in run.items()} for name, run in stats.items()}


def _gathered(module: nnx.Module) -> nnx.Module:
    """The module with its own parameters gathered; those of a layer in it are when the layer runs."""
    graph, layer, own = nnx.split(module, lambda path, _: "block" in path, ...)
    return nnx.merge(graph, layer, stack.unshard(own))


def update_router_biases(params: dict, loads: dict, *, speed: Float[Array, ""] | float) -> dict:
    """Moves every selection bias towards balance after a step; returns new parameters, the rest unchanged."""

    def moved(block: dict, load: Array) -> dict:
        new = router.update_bias(block["moe"]["router"]["bias"], load, speed=speed)
        return {**block, "moe": {**block["moe"], "router": {**block["moe"]["router"], "bias": new}}}

    layers = dict(params["stack"])
    for run, places in loads["stack"].items():
        layers[run] = {**layers[run], **{place: moved(layers[run][place], load) for place, load in places.items()}}
    new = {**params, "stack": layers}
    if "mtp" in loads:
        new["mtp"] = {**params["mtp"], "block": moved(params["mtp"]["block"], loads["mtp"])}
    return new


def fill_hash_tables(params: dict, *, declarations: dict, counts: np.ndarray, seed: int, kind: str = "balanced") -> dict:
    """Gives every hash-routed layer its table; returns new parameters, the rest unchanged.

    Args:
        kind: of table, `MoeConfig.hash_table`.
        counts: occurrences of each token id in the training data, ``[vocab]``.
    """

    def fill(path: tuple, declaration: param.Declaration, x: jax.Array) -> jax.Array:
        if "hash_table" not in declaration.tags:
            return x
        layers, _, top_k = declaration.shape
        name = param.path_name(path)
        experts = _experts_of(declarations, name)
        seeds = [param.fold(seed, f"{name}/{i}") for i in range(layers)]
        tables = [router.hash_table(kind, counts, experts=experts, top_k=top_k, seed=one) for one in seeds]
        return jax.device_put(np.stack(tables), x.sharding)

    return jax.tree_util.tree_map_with_path(fill, declarations, params, is_leaf=param.is_declaration)


def _experts_of(declarations: dict, table: str) -> int:
    return param.flatten(declarations)[table.removesuffix("table") + "bias"].shape[-1]
