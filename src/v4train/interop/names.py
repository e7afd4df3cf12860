"""Their names and ours: the one table between a released checkpoint and our tree of parameters, used in both directions.

A released checkpoint has a tensor per layer and per expert, matrices as ``[out, in]``. Ours are ``[in, out]``, stacked over the layers
of a run and over experts. A `Slot` is one released tensor and the block of our arrays that it is: the slots of a model cover every element
of every parameter exactly once, so a conversion is a loop over slots, one block in memory at a time.

Three spellings are read (`canonical`). *Released*: ``layers.7.attn.wq_a.weight``. What `transformers` *saves*: the same with ``model.`` in
front and a few leaves of its own. What its class calls them, ``model.layers.7.self_attn.q_a_proj.weight``: the names of its gradients, and
of a checkpoint saved with ``save_original_format=False``. There the experts of a layer are one array, w1 above w3.

A tensor's number format follows from its role (`stored_as`), never from its size. The released layouts keep the
matrices of attention, shared expert and MTP input in FP8 and the routed experts in FP4 ("instruct") or FP8 ("base"); what is
small or decides discretely (norms, router, compressors, indexer weights) is BF16, and what multiplies streams or shifts scores is FP32.

What only our models have is named too, under ``v4train.``: stems of images and audio, and the router's bias for modalities other than
text. It goes to a file of its own (`EXTRAS_STEM`), which no index lists, so `transformers` loads the rest without an unexpected key. (The
rejected alternative, the same names in the main files, makes every loader warn of unexpected keys.)
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import stack, transformer

EXTRAS_STEM = "multimodal"
"""``multimodal.safetensors`` lies beside the released files, with the tensors whose names begin with ``v4train.``."""

Turn = Literal["same", "transposed", "grouped"]
Format = Literal["fp4", "fp8", "bf16", "fp32", "int64"]
Precision = Literal["instruct", "base", "bf16", "fp32"]
"""Number formats of a whole checkpoint: FP4 experts and FP8 matrices; FP8 for both; neither; FP32 throughout."""

FORMATS: dict[str, Format] = {
    "routed_expert": "fp4",
    "attention": "fp8",
    "indexer": "fp8",
    "shared_expert": "fp8",
    "mtp_projection": "fp8",
    "embedding": "bf16",
    "head": "bf16",
    "norm": "bf16",
    "router": "bf16",
    "compressor": "bf16",
    "indexer_weights": "bf16",
    "position_table": "fp32",
    "sink": "fp32",
    "router_bias": "fp32",
    "hyper_connection": "fp32",
    "stem": "fp32",
    "hash_table": "int64",
}
"""Kind of tensor -> its format in the released instruct checkpoints."""


class _Row(NamedTuple):
    """``ours`` and ``released`` below a layer; ``theirs`` is the name in the `transformers` class."""

    ours: str
    released: str
    theirs: str
    turn: Turn
    kind: str


def _compressor(ours: str, released: str, theirs: str) -> tuple[_Row, ...]:
    return (
        _Row(f"{ours}/wkv", f"{released}.wkv.weight", f"{theirs}.kv_proj.weight", "transposed", "compressor"),
        _Row(f"{ours}/wgate", f"{released}.wgate.weight", f"{theirs}.gate_proj.weight", "transposed", "compressor"),
        _Row(f"{ours}/ape", f"{released}.ape", f"{theirs}.position_bias", "same", "position_table"),
        _Row(f"{ours}/norm", f"{released}.norm.weight", f"{theirs}.kv_norm.weight", "same", "norm"),
    )


def _mix(ours: str, released: str, theirs: str) -> tuple[_Row, ...]:
    turns: dict[str, Turn] = {"fn": "transposed", "base": "same", "scale": "same"}
    return tuple(_Row(f"{ours}/{x}", f"{released}_{x}", theirs + x, turn, "hyper_connection") for x, turn in turns.items())


_PROJECTION, _SHARED = "attention/projections/", "ffn.shared_experts."
_LAYER = (
    *_mix("attention_mix", "hc_attn", "attn_hc."),
    _Row("attention_norm", "attn_norm.weight", "input_layernorm.weight", "same", "norm"),
    _Row(f"{_PROJECTION}wq_a", "attn.wq_a.weight", "self_attn.q_a_proj.weight", "transposed", "attention"),
    _Row(f"{_PROJECTION}q_norm", "attn.q_norm.weight", "self_attn.q_a_norm.weight", "same", "norm"),
    _Row(f"{_PROJECTION}wq_b", "attn.wq_b.weight", "self_attn.q_b_proj.weight", "transposed", "attention"),
    _Row(f"{_PROJECTION}wkv", "attn.wkv.weight", "self_attn.kv_proj.weight", "transposed", "attention"),
    _Row(f"{_PROJECTION}kv_norm", "attn.kv_norm.weight", "self_attn.kv_norm.weight", "same", "norm"),
    _Row(f"{_PROJECTION}sink", "attn.attn_sink", "self_attn.sinks", "same", "sink"),
    _Row(f"{_PROJECTION}wo_a", "attn.wo_a.weight", "self_attn.o_a_proj.weight", "grouped", "attention"),
    _Row(f"{_PROJECTION}wo_b", "attn.wo_b.weight", "self_attn.o_b_proj.weight", "transposed", "attention"),
    *_compressor("attention/compressor", "attn.compressor", "self_attn.compressor"),
    _Row("attention/indexer/wq_b", "attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight", "transposed", "indexer"),
    _Row(
        "attention/indexer/weights_proj",
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
        "transposed",
        "indexer_weights",
    ),
    *_compressor("attention/indexer/compressor", "attn.indexer.compressor", "self_attn.compressor.indexer"),
    *_mix("moe_mix", "hc_ffn", "ffn_hc."),
    _Row("moe_norm", "ffn_norm.weight", "post_attention_layernorm.weight", "same", "norm"),
    _Row("moe/router/gate", "ffn.gate.weight", "mlp.gate.weight", "transposed", "router"),
    _Row("moe/router/bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias", "same", "router_bias"),
    _Row("moe/router/table", "ffn.gate.tid2eid", "mlp.gate.tid2eid", "same", "hash_table"),
    _Row("moe/experts/w1", "ffn.experts.{}.w1.weight", "mlp.experts.gate_up_proj", "transposed", "routed_expert"),
    _Row("moe/experts/w2", "ffn.experts.{}.w2.weight", "mlp.experts.down_proj", "transposed", "routed_expert"),
    _Row("moe/experts/w3", "ffn.experts.{}.w3.weight", "mlp.experts.gate_up_proj", "transposed", "routed_expert"),
    _Row("moe/shared/w1", f"{_SHARED}w1.weight", "mlp.shared_experts.gate_proj.weight", "transposed", "shared_expert"),
    _Row("moe/shared/w2", f"{_SHARED}w2.weight", "mlp.shared_experts.down_proj.weight", "transposed", "shared_expert"),
    _Row("moe/shared/w3", f"{_SHARED}w3.weight", "mlp.shared_experts.up_proj.weight", "transposed", "shared_expert"),
)
_TOP = (
    _Row("embedding/table", "embed.weight", "embed_tokens.weight", "same", "embedding"),
    *_mix("collapse", "hc_head", "hc_head.hc_"),
    _Row("norm", "norm.weight", "norm.weight", "same", "norm"),
    _Row("head", "head.weight", "lm_head.weight", "transposed", "head"),
)
_MTP = (  # `transformers` has no MTP block, so there is no spelling of its own
    _Row("mtp/enorm", "enorm.weight", "", "same", "norm"),
    _Row("mtp/hnorm", "hnorm.weight", "", "same", "norm"),
    _Row("mtp/e_proj", "e_proj.weight", "", "transposed", "mtp_projection"),
    _Row("mtp/h_proj", "h_proj.weight", "", "transposed", "mtp_projection"),
    *_mix("mtp/collapse", "hc_head", "hc_head.hc_"),
    _Row("mtp/norm", "norm.weight", "", "same", "norm"),
)
_STEMS = ("image/up", "image/down", "image/columns", "image/rows", "image/norm", "audio/table", "audio/norm")
_SAVED = {"attn.norm.weight": "attn.kv_norm.weight"}
"""What `transformers` saves under neither the released name nor its own: its renaming of norms is ambiguous when it is turned around."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a released checkpoint, and the block of one of our parameters that it is.

    Attributes:
        path: of our parameter, as `core.param.flatten` names it.
        index: selects the block from our array: place in the run's stack, expert, rows of modalities.
        released: the tensor's name.
        spelled: its name in the `transformers` class; the w1 and w3 of all experts of a layer share one. Empty: it has none.
        turn: how to get from the block to the tensor. "transposed": swap the two axes; "grouped": ``[G, in, R]`` to ``[G R, in]``.
        kind: role of the tensor, a key of `FORMATS`.
        block_shape: of the block, ours.
        dtype: of our parameter, as declared.
        otherwise: of a tensor of `EXTRAS_STEM` that may be absent: the released tensor that it then repeats, or "zeros".
    """

    path: str
    index: tuple[int | slice, ...]
    released: str
    spelled: str
    turn: Turn
    kind: str
    block_shape: tuple[int, ...]
    dtype: np.dtype
    otherwise: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the released tensor, not packed."""
        if self.turn == "same":
            return self.block_shape
        *groups, width, out = self.block_shape
        return (math.prod(groups) * out, width)

    @property
    def extra(self) -> bool:
        """Whether it belongs to `EXTRAS_STEM`."""
        return self.released.startswith("v4train.")

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our block from a tensor of `shape`; a view."""
        if self.turn == "same":
            return tensor
        if self.turn == "transposed":
            return tensor.T
        groups, width, out = self.block_shape
        return tensor.reshape(groups, out, width).swapaxes(1, 2)

    def to_released(self, block: np.ndarray) -> np.ndarray:
        """The tensor from our block: the inverse of `to_ours`, contiguous."""
        if self.turn != "same":
            block = block.swapaxes(-1, -2).reshape(self.shape)
        return np.ascontiguousarray(block)


def stored_as(slot: Slot, precision: Precision) -> Format:
    """The number format of a tensor in a checkpoint of this precision (reference implementation's dtypes; a property of the role)."""
    format = FORMATS[slot.kind]
    if format == "int64" or slot.extra:
        return format
    if precision == "fp32":
        return "fp32"
    if precision == "bf16" and format in ("fp4", "fp8"):
        return "bf16"
    if precision == "base" and format == "fp4":
        return "fp8"
    return format


def slots(model: config_lib.ModelConfig) -> tuple[Slot, ...]:
    """Every tensor of a checkpoint of this model, in the order of the layers: the released ones and those of `EXTRAS_STEM`."""
    declared = param.flatten(param.declarations(transformer.Transformer(model)))
    found = list(_from_rows(_TOP, declared, ours="", place=(), prefix="", spelled=""))
    for layer, (path, place) in enumerate(_places(model)):
        hashed = layer < model.moe.hash_layers
        found += _layer(declared, f"{path}/", place, prefix=f"layers.{layer}.", spelled=f"model.layers.{layer}.", hashed=hashed)
    if model.mtp is not None:
        found += _from_rows(_MTP, declared, ours="", place=(), prefix="mtp.0.", spelled=None)
        found += _layer(declared, "mtp/block/", (), prefix="mtp.0.", spelled=None, hashed=False)
    for name in _STEMS:
        if d := declared.get(f"embedding/{name}"):
            released = f"v4train.{name.replace('/', '.')}"
            found.append(Slot(f"embedding/{name}", (), released, "", "same", "stem", d.shape, np.dtype(d.dtype)))
    return tuple(found)


def _places(model: config_lib.ModelConfig) -> Iterator[tuple[str, tuple[int]]]:
    """Where each layer's parameters are: path of its place in the pattern, and index along the stacked axis."""
    for i, run in enumerate(stack.factor(stack.layer_specs(model))):
        yield from ((f"stack/run_{i}/layer_{place}", (repeat,)) for repeat in range(run.repeat) for place in range(len(run.pattern)))


def _layer(declared: dict, ours: str, place: tuple[int, ...], *, prefix: str, spelled: str | None, hashed: bool) -> Iterator[Slot]:
    """The tensors of one block. A hash layer has no bias for text; what biases other modalities have is an extra."""
    rows = (row for row in _LAYER if not (hashed and row.kind == "router_bias"))
    yield from _from_rows(rows, declared, ours=ours, place=place, prefix=prefix, spelled=spelled)
    path = f"{ours}moe/router/bias"
    d = declared[path]
    modalities, experts = d.shape[-2:]
    first, otherwise = (0, "zeros") if hashed else (1, f"{prefix}ffn.gate.bias")
    shape = (modalities - first, experts)
    name = f"v4train.{prefix}ffn.gate.bias"
    yield Slot(path, (*place, slice(first, modalities)), name, "", "same", "router_bias", shape, np.dtype(d.dtype), otherwise)


def _from_rows(rows, declared: dict, *, ours: str, place: tuple[int, ...], prefix: str, spelled: str | None) -> Iterator[Slot]:
    for row in rows:
        path = ours + row.ours
        if path not in declared:
            continue
        d = declared[path]
        inner: list[tuple[int, ...]] = [()]
        if row.kind == "routed_expert":
            inner = [(expert,) for expert in range(d.shape[len(place)])]
        elif row.kind == "router_bias":
            inner = [(0,)]
        theirs = "" if spelled is None else _spelled(spelled, row)
        for expert in inner:
            index, name = (*place, *expert), prefix + row.released.format(*expert)
            yield Slot(path, index, name, theirs, row.turn, row.kind, d.shape[len(index) :], np.dtype(d.dtype))


def _spelled(prefix: str, row: _Row) -> str:
    return row.theirs if row.kind == "head" else f"{prefix or 'model.'}{row.theirs}"


_NAME = re.compile(r"(?:model\.)?((?:layers|mtp)\.\d+\.)?(.*)")
_EXPERT = re.compile(r"(?:ffn|mlp)\.experts\.(\d+)\.(\w+)\.(weight|scale)")
_SCALE = re.compile(r"\.weight_scale(_inv)?$")
_FUSED = {"mlp.experts.gate_up_proj": "ffn.experts.gate_up_proj", "mlp.experts.down_proj": "ffn.experts.down_proj"}
_LEAVES = {row.theirs: row.released for row in (*_TOP, *_LAYER) if row.theirs and row.kind != "routed_expert"} | _SAVED | _FUSED


def canonical(name: str) -> str:
    """The released name of a tensor in any of the three spellings; what is known in none is returned as it is.

    Experts fused to one array have no released name: ``layers.7.ffn.experts.gate_up_proj`` and ``...down_proj`` stand for them.
    The scale beside a weight is spelled like the weight, and ends in ``.scale`` (`transformers`: ``.weight_scale_inv``).
    """
    if name.startswith("v4train."):
        return name
    found = _NAME.fullmatch(name)
    assert found is not None, name
    layer, leaf = found[1] or "", _SCALE.sub(".scale", found[2])
    if expert := _EXPERT.fullmatch(leaf):
        return f"{layer}ffn.experts.{expert[1]}.{expert[2]}.{expert[3]}"
    if leaf in _LEAVES:
        return layer + _LEAVES[leaf]
    if leaf.endswith(".scale") and (weight := _LEAVES.get(f"{leaf.removesuffix('scale')}weight")):
        return f"{layer}{weight.removesuffix('weight')}scale"
    return layer + leaf


class Part(NamedTuple):
    """An expert's matrix within the array of all experts of a layer: ``name`` (`canonical`) of the array, ``[expert, rows]`` of it."""

    name: str
    expert: int
    rows: slice
    shape: tuple[int, int, int]  # of the array


def fused(slot: Slot, *, experts: int) -> Part | None:
    """Where an expert's matrix is when the experts of a layer are one array; None for other tensors.

    Args:
        experts: routed experts of a layer.
    """
    if slot.kind != "routed_expert" or not slot.spelled:
        return None
    (out, width), expert, last = slot.shape, slot.index[-1], slot.path[-2:]
    assert isinstance(expert, int)
    first, height = {"w1": (0, 2 * out), "w2": (0, out), "w3": (out, 2 * out)}[last]
    return Part(canonical(slot.spelled), expert, slice(first, first + out), (experts, height, width))
