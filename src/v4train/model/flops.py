"""Model FLOPs per token: the work that the mathematics asks for, not what an implementation happens to do.

It is the numerator of MFU, so it must not reward waste. Recomputation (`remat`) does not count, and attention counts *sparsely*: only
the entries that a query attends, not the masked or unselected rest. Averaged over the positions of a row of ``S`` tokens that holds
one document, with ``t = 1..S`` the number of tokens seen:

* window: ``min(t, window)`` raw tokens,
* entries: ``floor(t / m)`` are visible; sparse CSA attends at most ``top_k`` of them. In the phases "dense" and "warmup" it attends
  all,
* indexer: scores every visible entry, also while fewer than ``top_k`` are visible. Not in the phase "dense". It is O(S^2 / m), and
  from about 64K tokens on the largest part of attention.

Rows packed with several documents attend less, so for them this is an upper bound.

A multiplication and an addition are two FLOPs. Counted are matrix products: two FLOPs per element of every matrix that a token goes
through (``linear``), and per attended key and head two products of width ``head_dim`` (``q k`` and ``p v``), so ``4 heads head_dim``.
Left out, as usual, are norms, softmax, rotations, pooling, Sinkhorn and the mixing of streams (vector work, limited by memory),
embedding look-ups, and the stems of images and audio, which only media slots pass. The rejected alternative, ``6 N + 12 L H K S``
with dense attention, credits V4-Flash's attention at 1M tokens with 51 times the work that it does, indexer included; it is here only
for comparison (`dense_attention`).

Training costs three forward passes: the backward pass multiplies twice for each product, once for the inputs and once for the
weights. In the warm-up of the indexer nothing else is differentiated and no logits are needed, so its credit is smaller (`training`).
"""

import dataclasses

from v4train.model import config as config_lib


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per token, averaged over a row, by part. `total` is their sum."""

    linear: float
    """Weight matrices of the layers: attention projections, compressors, the indexer's projections, router, experts, hyper-connections."""
    window: float
    """Attention to raw tokens."""
    entries: float
    """Attention to compressed entries."""
    indexer: float
    """Index scores (the indexer's projections are in ``linear``)."""
    head: float
    """Logits of the next token."""
    mtp: float
    """The multi-token prediction block with its attention and its own pass through the head."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def attention(self) -> float:
        """Window and entries, without the indexer."""
        return self.window + self.entries


@dataclasses.dataclass(frozen=True)
class LayerFlops:
    """FLOPs per token of one layer of a kind, averaged over a row. `total` is their sum."""

    projections: float
    """Attention: queries, key, output, compressors, the indexer's projections, and the two hyper-connections around the sublayers."""
    experts: float
    """Router, routed experts that a token uses, shared expert."""
    window: float
    """Attention to raw tokens."""
    entries: float
    """Attention to compressed entries."""
    indexer: float
    """Index scores."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def layer(config: config_lib.ModelConfig, kind: config_lib.AttentionKind, *, length: int) -> LayerFlops:
    """Of the forward pass of one layer, per token of a row of ``length`` tokens."""
    per_key = 4 * config.attention.heads * config.attention.head_dim
    entries, scores = 0.0, 0.0
    if kind.ratio:
        limit = kind.top_k if isinstance(kind, config_lib.CompressedSparseConfig) and kind.phase == "sparse" else None
        entries = per_key * _attended_entries(kind.ratio, top_k=limit, length=length) / length
        scores = _scoring(kind) * _attended_entries(kind.ratio, top_k=None, length=length) / length
    return LayerFlops(
        projections=2.0 * _attention_matrices(config, kind),
        experts=2.0 * _expert_matrices(config),
        window=per_key * _window_keys(config.attention.window, length=length) / length,
        entries=entries,
        indexer=scores,
    )


def forward(config: config_lib.ModelConfig, *, length: int) -> Flops:
    """Of the forward pass, per token of a row of ``length`` tokens."""
    layers = [layer(config, config.kind(name), length=length) for name in config.layer_kinds]
    head = 2.0 * config.hidden * config.vocab_size
    return Flops(
        linear=sum(one.projections + one.experts for one in layers) + 2.0 * _collapse(config),
        window=sum(one.window for one in layers),
        entries=sum(one.entries for one in layers),
        indexer=sum(one.indexer for one in layers),
        head=head,
        mtp=0.0 if config.mtp is None else 2.0 * _mtp_maps(config) + layer(config, config_lib.WindowConfig(), length=length).total + head,
    )


def training(config: config_lib.ModelConfig, *, length: int) -> Flops:
    """Of forward and backward pass, per token: three times the forward pass; in the warm-up of the indexer less."""
    once = forward(config, length=length)
    if not config.warming_up:
        return Flops(**{field.name: 3 * getattr(once, field.name) for field in dataclasses.fields(once)})
    return dataclasses.replace(once, linear=once.linear + 2 * indexer(config), indexer=3 * once.indexer, head=0.0, mtp=0.0)


def indexer(config: config_lib.ModelConfig) -> float:
    """Of the indexers' matrices in a forward pass, per token, all layers together (they are in ``linear``)."""
    return 2.0 * sum(_indexer_matrices(config, config.kind(name)) for name in config.layer_kinds)


def dense_attention(config: config_lib.ModelConfig, *, length: int) -> float:
    """FLOPs per token of a forward pass that attention *would* cost if every layer attended to all earlier tokens: for comparison only."""
    return 4 * config.attention.heads * config.attention.head_dim * (length + 1) / 2 * config.depth


def _window_keys(window: int, *, length: int) -> int:
    """Sum over t = 1..length of min(t, window)."""
    rising = min(window, length)
    return rising * (rising + 1) // 2 + (length - rising) * window


def _attended_entries(ratio: int, *, top_k: int | None, length: int) -> int:
    """Sum over t = 1..length of min(floor(t / ratio), top_k)."""
    rising = length if top_k is None else min(length, ratio * top_k - 1)
    blocks, rest = divmod(rising, ratio)
    visible = ratio * blocks * (blocks - 1) // 2 + blocks * (rest + 1)
    return visible + (length - rising) * (top_k or 0)


def _scoring(kind: config_lib.AttentionKind) -> int:
    """FLOPs of one index score; 0 where no indexer runs (a dense CSA layer declares one but leaves it idle)."""
    if not isinstance(kind, config_lib.CompressedSparseConfig) or kind.phase == "dense":
        return 0
    return 2 * kind.index_heads * kind.index_head_dim


def _attention_matrices(config: config_lib.ModelConfig, kind: config_lib.AttentionKind) -> int:
    """Elements of the matrices that one token passes in a layer outside of the experts."""
    a, d, n = config.attention, config.hidden, config.hyper.streams
    queries = d * a.query_rank + a.query_rank * a.heads * a.head_dim
    output = a.heads * a.head_dim * a.output_rank + a.output_groups * a.output_rank * d
    overlap = 2 if isinstance(kind, config_lib.CompressedSparseConfig) else 1
    compressor = 2 * d * a.head_dim * overlap if kind.ratio else 0
    mixing = 2 * n * d * (2 + n) * n if isinstance(config.hyper, config_lib.HyperConnectionConfig) else 0
    return queries + d * a.head_dim + output + compressor + _indexer_matrices(config, kind) + mixing


def _expert_matrices(config: config_lib.ModelConfig) -> int:
    """Elements of the matrices that one token passes in the experts of a layer, router included."""
    moe = config.moe
    return config.hidden * moe.experts + 3 * config.hidden * moe.ffn * (moe.top_k + moe.shared)


def _indexer_matrices(config: config_lib.ModelConfig, kind: config_lib.AttentionKind) -> int:
    """Elements of the indexer's matrices: queries, head weights, and its compressor with overlap."""
    if not isinstance(kind, config_lib.CompressedSparseConfig) or not _scoring(kind):
        return 0
    queries = config.attention.query_rank * kind.index_heads * kind.index_head_dim
    return queries + config.hidden * kind.index_heads + 4 * config.hidden * kind.index_head_dim


def _collapse(config: config_lib.ModelConfig) -> int:
    """Elements of the map that gates the streams before the head."""
    if not isinstance(config.hyper, config_lib.HyperConnectionConfig):
        return 0
    return config.hyper.streams**2 * config.hidden


def _mtp_maps(config: config_lib.ModelConfig) -> int:
    """Elements that one token passes in the MTP block besides its layer: one map of the embedding, one of each stream, a collapse."""
    return (1 + config.hyper.streams) * config.hidden**2 + _collapse(config)
