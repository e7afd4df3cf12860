"""What every layer may look at besides the residual streams: the same for all layers of a batch."""

from typing import NamedTuple

from jaxtyping import Array, Int

from v4train.model import config as config_lib
from v4train.ops import compress


class Inputs(NamedTuple):
    """A batch, as far as the model reads it. ``P`` and ``A`` are budgets; slots are -1 where a token is not of that modality."""

    tokens: Int[Array, "b s"]
    segment_ids: Int[Array, "b s"]  # documents 1.., padding 0
    positions: Int[Array, "b s"]  # in the document
    modality: Int[Array, "b s"]  # index into `config.MODALITIES`
    patches: Int[Array, "b p x"] | None = None  # uint8, 3 * patch^2 values
    patch_slot: Int[Array, "b s"] | None = None
    patch_xy: Int[Array, "b p 2"] | None = None
    audio: Int[Array, "b a bins"] | None = None  # uint8 levels
    audio_slot: Int[Array, "b s"] | None = None


class Context(NamedTuple):
    """Inputs, and the table of compressed blocks for each ratio in use."""

    inputs: Inputs
    blocks: dict[int, compress.Blocks]


def make(inputs: Inputs, *, config: config_lib.ModelConfig) -> Context:
    """Finds the blocks once for all layers."""
    ratios = {ratio for ratio in config.compress_ratios if ratio}
    tables = {r: compress.block_table(inputs.segment_ids, inputs.positions, ratio=r) for r in sorted(ratios) if r <= inputs.tokens.shape[1]}
    return Context(inputs, tables)
