"""Days and dollars: one formula for our recipes and for a run whose bill is public.

    chip hours = tokens x FLOPs a token / (peak x MFU) / 3600

FLOPs a token are counted as everywhere here: forward and backward of what the mathematics asks for. For our own recipes the MFU is that of
`timing`, a prediction. To see whether the formula and the counting are right, it is also applied to DeepSeek-V3, of which everything is
published: the shape, 14.8T tokens and 2.664M H800 hours of pre-training (180K an hour for each trillion), 0.119M for the two
extensions of the context and 0.005M for post-training, 2.788M in all (arXiv 2412.19437, table 1); and, from measuring a step of the
same training on the same 2,048 chips, 385 TFLOP/s a chip, an MFU of 38.94% with causal attention (arXiv 2505.09343, table 4). So the
formula's one free number is not fitted to the bill that it is compared with: it is a published measurement of speed. Nor is the count of
FLOPs: the same paper says 250 GFLOP a token (table 2), ours is 250.5. What the comparison
tests is our count of FLOPs and the bookkeeping; it says nothing about how fast *our* program is.
"""

import dataclasses

from v4train.core import hardware

DEFAULT_PRICE = 2.0
"""Dollars for a chip hour: what the DeepSeek-V3 report takes for an H800."""


@dataclasses.dataclass(frozen=True)
class Bill:
    """What a run takes.

    Attributes:
        tokens: trained on.
        chip_hours: of all chips together.
        days: of the machine.
        dollars: at the price given.
    """

    tokens: float
    chip_hours: float
    days: float
    dollars: float


def chip_hours(*, tokens: float, flops_per_token: float, peak: float, mfu: float) -> float:
    """The formula above."""
    return tokens * flops_per_token / (peak * mfu) / 3600


def bill(*, tokens: float, hours: float, chips: int, price: float) -> Bill:
    """Hours of chips as days of the machine and as dollars."""
    return Bill(tokens, hours, hours / chips / 24, hours * price)


@dataclasses.dataclass(frozen=True)
class Peer:
    """DeepSeek-V3's shape, as far as its FLOPs need it (arXiv 2412.19437, 4.2)."""

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    heads: int = 128
    query_rank: int = 1536
    key_rank: int = 512
    plain_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    dense_ffn: int = 18_432
    expert_ffn: int = 2048
    experts: int = 256
    active_experts: int = 9  # 8 routed and a shared one
    vocabulary: int = 129_280

    @property
    def matrices(self) -> int:
        """Elements of the matrices that a token passes: two FLOPs each in a forward pass."""
        d, h, qk = self.hidden, self.heads, self.plain_dim + self.rope_dim
        queries = d * self.query_rank + self.query_rank * h * qk
        keys = d * (self.key_rank + self.rope_dim) + self.key_rank * h * (self.plain_dim + self.value_dim)
        attention = queries + keys + h * self.value_dim * d
        sparse = 3 * d * self.expert_ffn * self.active_experts + d * self.experts
        dense = 3 * d * self.dense_ffn
        return self.layers * attention + self.dense_layers * dense + (self.layers - self.dense_layers) * sparse + d * self.vocabulary

    def training_flops(self, *, length: int) -> float:
        """Per token of a row of ``length`` tokens, causal, without the MTP module (as DeepSeek's own MFU counts it)."""
        per_key = 2 * self.heads * (self.plain_dim + self.rope_dim + self.value_dim)
        return 3 * (2.0 * self.matrices + self.layers * per_key * (length + 1) / 2)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of DeepSeek-V3's training.

    Attributes:
        name: of the stage.
        tokens: trained on: steps x rows x length.
        length: of a row.
        published_hours: of an H800; 0 where only the sum of several stages is published.
    """

    name: str
    tokens: float
    length: int
    published_hours: float


V3_STAGES = (
    Stage("pre-training, 4K", 14.8e12, 4096, 2_664_000),
    Stage("extension to 32K", 1000 * 1920 * 32_768, 32_768, 0),
    Stage("extension to 128K", 1000 * 480 * 131_072, 131_072, 119_000),
)
"""Each extension is 1,000 steps of about 63M tokens; their hours are published together."""
V3_POST_TRAINING_HOURS = 5_000
V3_TOTAL_HOURS = 2_788_000
V3_MFU = 0.3894
"""Measured by DeepSeek on 2,048 H800, against the bf16 peak, causal attention."""
V3_CHIPS = 2048
V3_CHIP = "H800"


def v3_hours() -> list[tuple[Stage, float]]:
    """The formula's hours for each stage of DeepSeek-V3."""
    peer, peak = Peer(), hardware.CHIPS[V3_CHIP].bf16_flops
    return [
        (stage, chip_hours(tokens=stage.tokens, flops_per_token=peer.training_flops(length=stage.length), peak=peak, mfu=V3_MFU))
        for stage in V3_STAGES
    ]
