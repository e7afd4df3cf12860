"""Held-out loss, in nats a target and in bits a byte, by data source and by modality.

**Bits per byte** are all nats of the targets over ``ln 2`` and over the bytes of the text that these targets spell: the quantity that
lm-eval calls ``bits_per_byte``. It does not depend on the tokenizer, nats per token do. A target that stands for no text (``eos``) adds
its nats and no bytes, so a model pays for knowing where a document ends. Media are never targets, so they add neither.

**The modality** of a target is that of its segment, the part of a document that its row holds: ``text`` if the segment has no media
tokens, ``image``, ``audio``, or ``image+audio``. It says what the model could be told beside the text, and cuts across sources: a
source may hold all four. A caption in front of its image counts as ``image`` too: what is named is the document, not the place in it.

All is summed over the batches and divided once: a mean of means would weigh a row with few targets like one with many.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4train.core import param, tree
from v4train.data import batch as batch_lib
from v4train.data import tokenizer as tokenizer_lib
from v4train.model import config as model_config
from v4train.model import transformer
from v4train.numerics import config as numerics_config
from v4train.numerics import policy
from v4train.train import loss as loss_lib
from v4train.train import precision
from v4train.train import state as state_lib

MODALITIES = ("text", "image", "audio", "image+audio")
"""Of a segment, by what media it has: the index is 1 for images plus 2 for sound."""


class Sums(NamedTuple):
    """Of all targets of a batch."""

    nats: Float[Array, "sources"]
    targets: Float[Array, "sources"]
    bytes: Float[Array, "sources"]
    modality_nats: Float[Array, "4"]
    modality_targets: Float[Array, "4"]
    modality_bytes: Float[Array, "4"]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluate:
    """``evaluate(params and buffers, batch) -> Sums``; changes nothing.

    Attributes:
        model: abstract.
        declarations: of all its parameters.
        numerics: formats.
        sources: number of data sources.
        byte_counts: ``i32[ids]``, bytes of each id; ids beyond have none.
    """

    model: transformer.Transformer
    declarations: dict
    numerics: numerics_config.NumericsConfig
    sources: int
    byte_counts: np.ndarray

    def __call__(self, state: state_lib.State, batch: batch_lib.Batch) -> Sums:
        whole = tree.merge(state.params, state.buffers)
        bound = param.bind(self.model, policy.cast_for_compute(whole, declarations=self.declarations, config=self.numerics))
        ids, weight = loss_lib.targets(batch, ahead=1)
        with precision.formats(self.numerics):
            nats = bound.token_losses(bound(loss_lib.model_inputs(batch, config=self.model.config)).hidden, ids) * weight
        spelt = jnp.take(jnp.asarray(self.byte_counts), ids, mode="fill", fill_value=0) * weight
        of_source = jax.nn.one_hot(batch.source, self.sources, dtype=jnp.float32)
        of_modality = jax.nn.one_hot(modality_of_segments(batch), len(MODALITIES), dtype=jnp.float32)
        tokens = (nats, weight, spelt)
        return Sums(*(x.sum(axis=1) @ of_source for x in tokens), *(jnp.einsum("bs,bsm->m", x, of_modality) for x in tokens))


def modality_of_segments(batch: batch_lib.Batch) -> Int[Array, "b s"]:
    """Of each token's segment, an index of `MODALITIES`."""
    segments, modality = jnp.asarray(batch.segment_ids), jnp.asarray(batch.modality)
    rows = jnp.arange(segments.shape[0])[:, None]
    kinds = [model_config.MODALITIES.index(name) for name in MODALITIES[1:3]]

    def anywhere(kind: int) -> Array:
        blank = jnp.zeros((segments.shape[0], segments.shape[1] + 1), jnp.int32)
        return blank.at[rows, segments].max((modality == kind).astype(jnp.int32))[rows, segments]

    return anywhere(kinds[0]) + 2 * anywhere(kinds[1])


def byte_counts(tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
    """Bytes of each id, for `Evaluate`."""
    return tokenizer.byte_counts()


def fields(sums: Sequence[Sums], *, sources: Sequence[str]) -> dict[str, float]:
    """What a record says: ``loss/<source>`` in nats a target, ``bpb/<source>`` and ``modality_bpb/<modality>`` in bits a byte.

    What has no targets, or targets without text, is left out.
    """
    total = Sums(*(np.sum([np.asarray(x, np.float64) for x in part], axis=0) for part in zip(*sums, strict=True)))
    losses = {f"loss/{name}": float(n / t) for name, n, t in zip(sources, total.nats, total.targets, strict=True) if t > 0}
    by_source = {f"bpb/{name}": bits(n, b) for name, n, b in zip(sources, total.nats, total.bytes, strict=True) if b > 0}
    kinds = zip(MODALITIES, total.modality_nats, total.modality_bytes, strict=True)
    return losses | by_source | {f"modality_bpb/{name}": bits(n, b) for name, n, b in kinds if b > 0}


def bits(nats: float, count: float) -> float:
    """Nats of so many bytes -> bits per byte."""
    return float(nats) / math.log(2) / float(count)
