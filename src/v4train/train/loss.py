"""The training loss: named terms, kept as sums over tokens until the whole batch is in.

A mean of per-device or per-microbatch means is wrong under packing, because parts hold different numbers of targets. All denominators
(`Counts`) are properties of the batch alone, so they are known before the first microbatch, and the gradient of the sum over microbatches
is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4train.core import param
from v4train.data import batch as batch_lib
from v4train.model import config as model_config
from v4train.model import context, transformer


class Counts(NamedTuple):
    """What the sums are divided by."""

    text: Float[Array, ""]  # weight of next-token targets
    mtp: Float[Array, ""]  # weight of targets two tokens ahead
    tokens: Float[Array, ""]  # tokens that are not padding


class Terms(NamedTuple):
    """The parts of the loss as sums over tokens, and what else a forward pass reports."""

    text: Float[Array, "sources"]  # cross-entropy by data source, nats
    text_weight: Float[Array, "sources"]  # targets by data source
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    indexer: Float[Array, ""]
    loads: dict  # tokens per modality and expert of every layer
    late: Float[Array, ""]  # (token, expert) pairs that waited for a further round of the exchange
    dropped: Float[Array, ""]  # and those that were left out
    recall: Float[Array, "3"] | None = (
        None  # in warm-up: the indexer's recall and the most it could be, over queries and layers; their number
    )


def targets(batch: batch_lib.Batch, *, ahead: int) -> tuple[Array, Array]:
    """Target ids ``[B, S]`` and their weights: the token ``ahead`` of each position, if it is of the same document and counts."""
    tokens, segments, weight = (context.ahead(jnp.asarray(x), by=ahead) for x in (batch.tokens, batch.segment_ids, batch.loss_weight))
    return tokens, jnp.where((segments == batch.segment_ids) & (batch.segment_ids > 0), weight, 0.0)


def count(batch: batch_lib.Batch) -> Counts:
    """The denominators of a whole batch; at least 1, so that a batch without targets has loss 0."""
    sums = [targets(batch, ahead=1)[1].sum(), targets(batch, ahead=2)[1].sum(), (batch.segment_ids > 0).sum().astype(jnp.float32)]
    return Counts(*(jnp.maximum(x, 1.0) for x in sums))


def model_inputs(batch: batch_lib.Batch, *, config: model_config.ModelConfig) -> context.Inputs:
    """The batch as the model reads it; media that the model has no stem for are left out."""
    media: dict[str, Array] = {}
    if config.image is not None:
        media |= {name: jnp.asarray(getattr(batch, name)) for name in ("patches", "patch_slot", "patch_xy")}
    if config.audio is not None:
        media |= {name: jnp.asarray(getattr(batch, name)) for name in ("audio", "audio_slot")}
    return context.Inputs(
        tokens=jnp.asarray(batch.tokens),
        segment_ids=jnp.asarray(batch.segment_ids),
        positions=jnp.asarray(batch.positions),
        modality=jnp.asarray(batch.modality, jnp.int32),
        **media,
    )


def terms(model: transformer.Transformer, params: dict, batch: batch_lib.Batch, *, sources: int, given: dict | None = None) -> Terms:
    """Forward pass and the sums of all loss terms. ``given`` experts: see `transformer.Transformer`."""
    bound = param.bind(model, params)
    out = bound(model_inputs(batch, config=model.config), given=given)
    ids, weight = targets(batch, ahead=1)
    nats = bound.token_losses(out.hidden, ids) * weight
    of_source = jax.nn.one_hot(batch.source, sources, dtype=jnp.float32)
    mtp = jnp.zeros(())
    if out.mtp_hidden is not None:
        ids_ahead, weight_ahead = targets(batch, ahead=2)
        mtp = jnp.sum(bound.token_losses(out.mtp_hidden, ids_ahead) * weight_ahead)
    return Terms(
        text=nats.sum(axis=1) @ of_source,
        text_weight=weight.sum(axis=1) @ of_source,
        mtp=mtp,
        balance=out.balance_loss,
        indexer=out.indexer_loss,
        loads=out.loads,
        late=out.late,
        dropped=out.dropped,
        recall=out.recall,
    )


def total(sums: Terms, counts: Counts, *, config: model_config.ModelConfig) -> Float[Array, ""]:
    """The scalar whose gradient is taken. With an indexer in warm-up nothing but the indexer learns, so its loss stands alone."""
    indexer = config.indexer_loss * sums.indexer / counts.tokens
    if config.warming_up:
        return indexer
    loss = sums.text.sum() / counts.text + config.moe.balance_loss * sums.balance / counts.tokens + indexer
    return loss if config.mtp is None else loss + config.mtp.loss_weight * sums.mtp / counts.mtp
