"""Config of the model. Sizes are counts of features, tokens or heads; names follow the V4 report."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from v4train.config import base

_Positive = Annotated[int, pydantic.Field(gt=0)]
MODALITIES = ("text", "image", "audio")


class YarnConfig(base.Config):
    """YaRN scaling of the rotation on layers with compressed entries. No attention temperature."""

    factor: float = pydantic.Field(default=16.0, ge=1)
    """Slow frequencies are divided by this."""
    original_positions: _Positive = 65_536
    """Positions of the training before the scaling; slow and fast are judged by the turns made in these."""
    beta_fast: float = 32.0
    """Turns from which on a frequency is fast and stays as it is."""
    beta_slow: float = 1.0
    """Turns below which a frequency is slow; between the two lies a ramp."""


class WindowConfig(base.Config):
    """Attention to the last raw tokens only."""

    kind: Literal["window"] = "window"

    @property
    def ratio(self) -> int:
        """Tokens per compressed entry; 0 for a layer without entries."""
        return 0


class CompressedSparseConfig(base.Config):
    """CSA: overlapping compression, an indexer, and attention to the entries it selects."""

    kind: Literal["csa"] = "csa"
    ratio: Annotated[int, pydantic.Field(ge=1)] = 4
    """Tokens per compressed entry (m)."""
    index_heads: _Positive = 64
    """Query heads of the indexer."""
    index_head_dim: _Positive = 128
    """Width of one of them, and of an index key."""
    top_k: _Positive = 512
    """Entries that a query attends."""
    phase: Literal["dense", "warmup", "sparse"] = "sparse"
    """dense: every visible entry, no indexer; warmup: every visible entry, only the indexer learns; sparse: the selected entries."""


class HeavilyCompressedConfig(base.Config):
    """HCA: strong compression without overlap, attention to every visible entry."""

    kind: Literal["hca"] = "hca"
    ratio: Annotated[int, pydantic.Field(ge=1)] = 128
    """Tokens per compressed entry (m')."""


AttentionKind = Annotated[WindowConfig | CompressedSparseConfig | HeavilyCompressedConfig, pydantic.Field(discriminator="kind")]


class AttentionConfig(base.Config):
    """What the three kinds share."""

    heads: _Positive
    """Query heads; they share one head that is key and value."""
    head_dim: _Positive
    """Width of a head."""
    rope_dim: Annotated[int, pydantic.Field(gt=0, multiple_of=2)]
    """Trailing channels of a head that carry the rotation."""
    query_rank: _Positive
    """Width of the low-rank latent that queries are made of, the indexer's too."""
    output_groups: _Positive
    """Groups of heads that are projected out separately."""
    output_rank: _Positive
    """Width that each group is projected to, before one matrix takes all to the hidden width."""
    window: _Positive = 128
    """Raw tokens a query sees, itself included."""
    rope_theta: float = pydantic.Field(default=10_000.0, gt=0)
    """Of window layers."""
    compressed_rope_theta: float = pydantic.Field(default=160_000.0, gt=0)
    """Of layers with compressed entries: for queries, raw keys, entries and indexer alike."""
    yarn: YarnConfig | None = YarnConfig()
    """Of layers with compressed entries, from the first step on; null: none. Whether DeepSeek trained at 4K with it is not published. The
    scaling acts at all positions, so it is not only a matter of long rows. transformers and Megatron-LM have it at any length if the config
    has it; MaxText has none."""
    chunk: _Positive = 128
    """Queries computed at a time; memory grows with it, results do not depend on it."""

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.rope_dim > self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim} is larger than head_dim {self.head_dim}")
        if self.heads % self.output_groups:
            raise ValueError(f"heads {self.heads} must be a multiple of output_groups {self.output_groups}")
        return self


class HyperConnectionConfig(base.Config):
    """Manifold-constrained hyper-connections (mHC). Without a `kind`, `hyper` is this."""

    kind: Literal["mhc"] = "mhc"

    streams: _Positive = 4
    """Residual streams."""
    iterations: _Positive = 20
    """Sinkhorn steps."""
    eps: float = pydantic.Field(default=1e-6, gt=0)
    """Added to the divisors of Sinkhorn and to the gates."""
    scale_init: float = 0.01
    """First value of the gating factors. The paper says that they start small, not how small. Megatron-LM: 0.01; transformers: 1."""


class ResidualConfig(base.Config):
    """Plain residuals, ``x + sublayer(x)``: one stream and no parameters. For comparison; released checkpoints have no such form."""

    kind: Literal["residual"] = "residual"

    @property
    def streams(self) -> int:
        """Residual streams."""
        return 1


HyperKind = Annotated[HyperConnectionConfig | ResidualConfig, pydantic.Field(discriminator="kind")]


class ExchangeConfig(base.Config):
    """How tokens travel to experts on other devices. Without `overflow: drop` results do not depend on it, memory and time do."""

    transport: Literal["ragged", "padded", "gathered"] | None = None
    """ragged: an all-to-all of the routed rows only; padded: an all-to-all of as many rows for every pair of devices; gathered: all-gather
    and reduce-scatter. null: the platform's (TPU and the CPU's emulated devices: ragged, GPU: padded)."""
    capacity: float | None = pydantic.Field(default=None, gt=0)
    """Rows of the buffers relative to a balanced load. null: 1.25, and the worst case, as many as there are devices, for ragged."""
    overflow: Literal["rounds", "drop"] = "rounds"
    """What does not fit into the buffers: rounds: travels in further rounds; drop: is left out, lowest weights first, and counted."""
    waves: _Positive = 1
    """Parts that a device's tokens are taken in: buffers shrink, and a part can travel while another is computed."""

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.overflow == "drop" and self.capacity is None:
            raise ValueError("overflow: drop needs a capacity, the rows beyond which slots are left out; set capacity: 1.25, for example")
        return self


class MoeConfig(base.Config):
    """Mixture of experts, in every layer."""

    experts: _Positive
    """Routed experts of a layer."""
    top_k: _Positive
    """Routed experts that a token uses."""
    ffn: _Positive
    """Hidden width of an expert, the shared one included."""
    shared: _Positive = 1
    """Width of the shared expert, as a multiple of `ffn`."""
    affinity: Literal["sqrt_softplus", "sigmoid"] = "sqrt_softplus"
    """What makes a score of the gate's logit: V4 takes sqrt_softplus, V3 took sigmoid."""
    scaling: float = pydantic.Field(default=1.5, gt=0)
    """Factor on the normalised mixing weights (1.5 Flash, 2.5 Pro)."""
    swiglu_limit: float = pydantic.Field(default=10.0, gt=0)
    """The gate is cut above this, the other factor at plus and minus this."""
    clamp_shared: bool = True
    """The shared expert is cut, too. The paper does not say. transformers and NeMo Automodel cut it, both after a correction; DeepSeek's
    first published inference code cut the routed experts only."""
    hash_layers: int = pydantic.Field(default=3, ge=0)
    """First layers, whose text tokens are routed by a fixed table of token ids. V4: 3; V4.1: none."""
    hash_table: Literal["balanced", "round_robin", "random"] = "balanced"
    """How the tables are made, of which nothing is published. balanced: by token counts of the training data, frequent tokens first, each
    to the least loaded experts (as kexue.fm 11750 proposes); round_robin: token t to the experts from k t on (Megatron-LM, which warns
    of the imbalance); random: k experts drawn for each token (AMD Primus). transformers and MaxText have zeros until a checkpoint is
    loaded: all tokens on one expert."""
    bias_speed: float = pydantic.Field(default=0.001, ge=0)
    """Change of the selection bias per step. V4: 0.001."""
    bias_warmup_steps: int = pydantic.Field(default=0, ge=0)
    """Steps over which the change rises to `bias_speed`, in a straight line. Whether DeepSeek had a warm-up is not published. Megatron-LM
    (`moe_router_bias_update_rate`) and MaxText (`routed_bias_update_rate`) have none."""
    balance_loss: float = pydantic.Field(default=1e-4, ge=0)
    """Weight of the sequence-wise balance loss."""
    exchange: ExchangeConfig = ExchangeConfig()

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is larger than experts {self.experts}")
        return self


class ImageStemConfig(base.Config):
    """Image patches -> embeddings, without a pretrained encoder."""

    patch: _Positive = 32
    """Pixels of a patch's side; three uint8 channels."""
    grid: _Positive = 1120
    """Rows of each position table: the most patches along one side."""


class AudioStemConfig(base.Config):
    """dMel frames -> embeddings."""

    bins: _Positive = 80
    """Mel channels of a frame."""
    levels: _Positive = 16
    """Levels of a channel."""


class MtpConfig(base.Config):
    """Multi-token prediction, depth 1: predicts the token after the next with a block of its own."""

    loss_weight: float = pydantic.Field(default=0.3, ge=0)
    """Of its cross-entropy in the objective."""


class LayerRun(base.Config):
    """``pattern`` of attention kinds, ``repeat`` times."""

    pattern: tuple[str, ...] = pydantic.Field(min_length=1)
    """Kinds in order, as `kinds` names them."""
    repeat: _Positive = 1
    """Times that the pattern comes."""


class ModelConfig(base.Config):
    """The whole model."""

    vocab_size: _Positive
    """Token ids, at least those of the tokenizer."""
    hidden: _Positive
    """Width d of the residual streams."""
    kinds: tuple[AttentionKind, ...] = (WindowConfig(), CompressedSparseConfig(), HeavilyCompressedConfig())
    """One entry per attention kind used."""
    layers: tuple[LayerRun, ...] = pydantic.Field(min_length=1)
    """The layers in order, first to last."""
    attention: AttentionConfig
    hyper: HyperKind = HyperConnectionConfig()
    moe: MoeConfig
    mtp: MtpConfig | None = MtpConfig()
    image: ImageStemConfig | None = None
    audio: AudioStemConfig | None = None
    media_tokens: tuple[int, ...] = ()
    """Token ids that mark media slots: they are never predicted."""
    max_positions: _Positive = 1_048_576
    """Longest row that the model may be given, tokens."""
    norm_eps: float = pydantic.Field(default=1e-6, gt=0)
    """Added to the mean square in every norm."""
    init_std: float = pydantic.Field(default=0.02, gt=0)
    """Standard deviation of first values. That of DeepSeek's run is not published; the released config.json and Megatron-LM's default
    (`init_method_std`) are 0.02; MaxText draws by fan-in instead."""
    indexer_loss: float = pydantic.Field(default=1e-2, ge=0)
    """Weight of the indexer's KL loss. DeepSeek's is not published. Megatron-LM's recipe: 0.01; NeMo Automodel freezes the indexer, and
    MaxText's main branch has no such loss."""
    remat: Literal["none", "full", "dots"] = "full"
    """What a layer keeps for the backward pass. none: everything; dots: results of matrix products; full: its input only."""
    loss_chunk: _Positive = 2048
    """Positions per row whose logits exist at a time."""

    @pydantic.field_validator("hyper", mode="before")
    @classmethod
    def _mhc_unless_said(cls, hyper: Any) -> Any:
        return {"kind": "mhc"} | hyper if isinstance(hyper, dict) else hyper

    @pydantic.model_validator(mode="after")
    def _check(self):
        names = [kind.kind for kind in self.kinds]
        if len(set(names)) != len(names):
            raise ValueError(f"kinds lists an attention kind twice: {names}")
        for run in self.layers:
            for name in run.pattern:
                if name not in names:
                    raise ValueError(f"layers names the attention kind {name!r}, which kinds does not define (defined: {names})")
        if self.moe.hash_layers > self.depth:
            raise ValueError(f"moe.hash_layers {self.moe.hash_layers} is larger than the number of layers {self.depth}")
        for kind in self.kinds:
            if isinstance(kind, CompressedSparseConfig) and kind.index_head_dim < self.attention.rope_dim:
                raise ValueError(f"index_head_dim {kind.index_head_dim} is smaller than attention.rope_dim {self.attention.rope_dim}")
        return self

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of every layer."""
        return tuple(name for run in self.layers for _ in range(run.repeat) for name in run.pattern)

    @property
    def depth(self) -> int:
        """Number of layers, without the MTP block."""
        return len(self.layer_kinds)

    @property
    def warming_up(self) -> bool:
        """The phase in which only the indexer learns."""
        return any(isinstance(kind, CompressedSparseConfig) and kind.phase == "warmup" for kind in self.kinds)

    def kind(self, name: str) -> WindowConfig | CompressedSparseConfig | HeavilyCompressedConfig:
        """The config of an attention kind."""
        return next((kind for kind in self.kinds if kind.kind == name), WindowConfig())

    def at_stage(self, *, attention: str | None, mtp_weight: float | None) -> "ModelConfig":
        """The same model with another phase of its CSA kind and another weight of its MTP, which change no parameter."""
        sparse = CompressedSparseConfig
        kinds = tuple(kind.model_copy(update={"phase": attention}) if isinstance(kind, sparse) else kind for kind in self.kinds)
        mtp = None if self.mtp is None else self.mtp.model_copy(update={"loss_weight": mtp_weight})
        return self.model_copy(update={"kinds": kinds, "mtp": mtp})

    def after(self, stages: Sequence[Mapping[str, Any]]) -> "ModelConfig":
        """The model as the last of the stages that a checkpoint has gone through has it; ``stages`` are its metadata's, oldest first."""
        return self.at_stage(attention=stages[-1]["attention"], mtp_weight=stages[-1]["mtp_weight"]) if stages else self

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """Tokens per entry of every layer, and a last 0 for the MTP block, as the released config files list them."""
        return (*(self.kind(name).ratio for name in self.layer_kinds), 0)
