"""The released ``config.json`` and our model config, both ways.

Three generations of the file say the same in different words, and all are read: the released one (``compress_ratios`` of L + 1 entries, the
last for the MTP block; ``rope_scaling``; ``num_hash_layers``), what `transformers` writes (``layer_types`` with ``compress_rates``;
``rope_parameters`` with ``main`` and ``compress``; ``mlp_layer_types``), and what `config_json` writes, which is both at once.

Nothing is guessed. Public code has fallbacks for absent keys (theta 40,000, factor 40, another order of layers) that belong to no released
model, so an absent key is an error here, and so is a key whose value asks for something that the model does not compute. All are told at
once. Keys that change no result of a forward pass (dropout, ids of special tokens, coefficients of training) are ignored.

The file has no word for some fields of our config. They keep our defaults and come from the recipe: `UNSAID`. What is architecture but
unknown to the released format, stems of images and audio, stands under the key ``v4train``, which `transformers` carries along unread.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pydantic

from v4train.interop import names
from v4train.model import config as config_lib

UNSAID = (
    "kinds.*.phase",
    "attention.chunk",
    "hyper.scale_init",
    "moe.hash_table",
    "moe.bias_speed",
    "moe.bias_warmup_steps",
    "moe.balance_loss",
    "moe.exchange.transport",
    "moe.exchange.capacity",
    "moe.exchange.overflow",
    "moe.exchange.waves",
    "mtp.loss_weight",
    "indexer_loss",
    "remat",
    "loss_chunk",
)
"""Fields of `ModelConfig` that a config.json does not say: stages and weights of training, first values, memory,
how tokens travel."""

_TYPES = {"sliding_attention": "window", "compressed_sparse_attention": "csa", "heavily_compressed_attention": "hca"}
_RELEASED_RATIOS = {0: "window", 4: "csa", 128: "hca"}
_ONLY: dict[str, tuple] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
}
"""Keys that may be absent but, where present, must have one of these values: the model computes nothing else."""
_OURS = ("image", "audio", "media_tokens")


@dataclasses.dataclass
class _Reader:
    """Takes values out of the file and collects what is wrong."""

    values: Mapping[str, Any]
    problems: list[str] = dataclasses.field(default_factory=list)

    def number(self, key: str, *, kind: type[int] | type[float] = int, within: Mapping[str, Any] | None = None, name: str = "") -> Any:
        """The number under ``key``; a problem and 1 where there is none."""
        values, name = self.values if within is None else within, name or key
        value = values.get(key)
        allowed = int if kind is int else int | float
        if value is None:
            self.problems.append(f"{name} is missing")
        elif isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
            self.problems.append(f"{name} is {json.dumps(value)}, expected {'an integer' if kind is int else 'a number'}")
        else:
            return kind(value)
        return kind(1)

    def entries(self, key: str, *, of: type) -> list | None:
        """The list under ``key``, None where there is none; a problem where it is not a list of that type."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, list) and all(type(x) is of for x in value)):
            self.problems.append(f"{key} is {json.dumps(value)}, expected a list of {of.__name__}")
            return None
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """The mapping under ``key``, empty where there is none; a problem where it is none."""
        value = self.values.get(key) or {}
        self.require(isinstance(value, dict), f"{key} is {json.dumps(value)}, expected a mapping")
        return value if isinstance(value, dict) else {}

    def require(self, ok: object, message: str) -> None:
        """Notes the problem unless it is ok."""
        if not ok:
            self.problems.append(message)


def model_config(config_json: Mapping[str, Any], *, subject: str = "config.json") -> config_lib.ModelConfig:
    """Our config of the model that a config.json describes; fields of `UNSAID` have our defaults, CSA its sparse phase.

    Raises:
        ValueError: lists every missing, contradictory and unsupported key.
    """
    reader = _Reader(config_json)
    for key, allowed in _ONLY.items():
        value = config_json.get(key, allowed[0])
        supported = " or ".join(json.dumps(x) for x in allowed)
        reader.require(
            value in allowed and isinstance(value, bool) == isinstance(allowed[0], bool),
            f"{key} is {json.dumps(value)}, supported is {supported}",
        )
    kinds, layers = _layers(reader)
    mtp = reader.number("num_nextn_predict_layers")
    reader.require(mtp in (0, 1), f"num_nextn_predict_layers is {mtp}, supported is 0 or 1")
    ours = reader.mapping("v4train")
    unknown = sorted(set(ours) - set(_OURS))
    reader.require(not unknown, f"v4train has unknown keys {', '.join(unknown)} (known: {', '.join(_OURS)})")
    values = {
        "vocab_size": reader.number("vocab_size"),
        "hidden": reader.number("hidden_size"),
        "kinds": kinds,
        "layers": layers,
        "attention": _attention(reader),
        "hyper": {
            "streams": reader.number("hc_mult"),
            "iterations": reader.number("hc_sinkhorn_iters"),
            "eps": reader.number("hc_eps", kind=float),
        },
        "moe": _moe(reader, depth=sum(len(run["pattern"]) * run["repeat"] for run in layers)),
        "mtp": {} if mtp else None,
        "max_positions": reader.number("max_position_embeddings"),
        "norm_eps": reader.number("rms_norm_eps", kind=float),
        "init_std": reader.number("initializer_range", kind=float) if "initializer_range" in config_json else 0.02,
        **ours,
    }
    try:
        if not reader.problems:
            return config_lib.ModelConfig.model_validate(values)
    except pydantic.ValidationError as error:
        reader.problems += [f"{'.'.join(map(str, e['loc'])) or 'the model'}: {e['msg']}" for e in error.errors()]
    problems = list(dict.fromkeys(reader.problems))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ValueError("\n  ".join([f"{subject} cannot be used: {count}", *problems]))


def _layers(reader: _Reader) -> tuple[list[dict], list[dict]]:
    """The attention kinds in use, and the layers as runs."""
    depth = reader.number("num_hidden_layers")
    if reader.problems and reader.problems[-1].startswith("num_hidden_layers"):
        return [{"kind": "window"}], runs(["window"])
    rates, ratios, types = _rates(reader), reader.entries("compress_ratios", of=int), reader.entries("layer_types", of=str)
    if types is not None:
        reader.require(len(types) == depth, f"layer_types has {len(types)} entries, num_hidden_layers is {depth}")
        unknown = sorted(set(types) - set(_TYPES))
        reader.require(not unknown, f"layer_types has unknown entries {', '.join(unknown)} (known: {', '.join(_TYPES)})")
        kinds = [_TYPES.get(x, "window") for x in types]
    elif ratios is not None:
        by_ratio = {**_RELEASED_RATIOS, **{rate: kind for kind, rate in rates.items()}}
        unknown = ", ".join(str(x) for x in sorted(set(ratios) - set(by_ratio)))
        reader.require(not unknown, f"compress_ratios has {unknown}: without layer_types or compress_rates it is not known of which kind")
        kinds = [by_ratio.get(x, "window") for x in ratios[:depth]]
    else:
        reader.problems.append("compress_ratios or layer_types is missing: which layer has which attention is not guessed")
        kinds = ["window"]
    found = {"window": 0, **rates}
    if ratios is not None:
        reader.require(
            len(ratios) in (depth, depth + 1), f"compress_ratios has {len(ratios)} entries, expected {depth}, or {depth + 1} with MTP"
        )
        reader.require(ratios[depth:] in ([], [0]), f"compress_ratios ends with {ratios[depth:]}: the MTP block has window attention, 0")
        for kind in dict.fromkeys(kinds):
            here = sorted({x for x, other in zip(ratios, kinds, strict=False) if other == kind})
            said = found.setdefault(kind, here[0] if here else 1)
            reader.require(set(here) <= {said}, f"compress_ratios gives the {kind} layers {here}, expected {said} for each")
    for kind in dict.fromkeys(kinds):
        reader.require(kind in found, f"compress_rates has no entry for the {kind} layers, and there are no compress_ratios")
    return [_kind(reader, kind, ratio=found.get(kind, 1)) for kind in ("window", "csa", "hca") if kind in kinds], runs(kinds)


def _rates(reader: _Reader) -> dict[str, int]:
    """Tokens per entry, by kind, as far as the file says it apart from ``compress_ratios``."""
    values = reader.values
    given = dict(reader.mapping("compress_rates"))
    given |= {name: values[f"compress_rate_{kind}"] for name, kind in _TYPES.items() if f"compress_rate_{kind}" in values}
    unknown = sorted(set(given) - set(_TYPES))
    reader.require(not unknown, f"compress_rates has unknown keys {', '.join(unknown)}")
    known = [name for name in given if name in _TYPES]
    return {_TYPES[name]: reader.number(name, within=given, name=f"compress_rates.{name}") for name in known}


def _kind(reader: _Reader, kind: str, *, ratio: int) -> dict:
    if kind == "window":
        return {"kind": kind}
    if kind == "hca":
        return {"kind": kind, "ratio": ratio}
    sizes = {"index_heads": "index_n_heads", "index_head_dim": "index_head_dim", "top_k": "index_topk"}
    return {"kind": kind, "ratio": ratio} | {ours: reader.number(theirs) for ours, theirs in sizes.items()}


def runs(kinds: list[str], *, longest: int = 4) -> list[dict]:
    """A sequence of kinds as the entries of `ModelConfig.layers`: repetitions are folded, as a person would write them.

    ``[w, w, c, h, c, h, c]`` is ``w x 2, (c, h) x 2, c``. The model depends on the sequence only, not on how it is folded.
    """
    out: list[dict] = []
    at = 0
    while at < len(kinds):
        best = (1, 1)
        for size in range(1, longest + 1):
            repeat = 1
            while kinds[at + size * repeat : at + size * (repeat + 1)] == kinds[at : at + size]:
                repeat += 1
            if repeat > 1 and size * repeat > best[0] * best[1]:
                best = (size, repeat)
        size, repeat = best
        pattern = kinds[at : at + size]
        if repeat == 1 and out and out[-1]["repeat"] == 1:
            out[-1]["pattern"] += pattern
        else:
            out.append({"pattern": pattern, "repeat": repeat})
        at += size * repeat
    return out


def _attention(reader: _Reader) -> dict:
    head_dim, rope_dim = reader.number("head_dim"), _rope_dim(reader)
    theta, compressed_theta, yarn = _rotation(reader, rope_dim=rope_dim, head_dim=head_dim)
    return {
        "heads": reader.number("num_attention_heads"),
        "head_dim": head_dim,
        "rope_dim": rope_dim,
        "query_rank": reader.number("q_lora_rank"),
        "output_groups": reader.number("o_groups"),
        "output_rank": reader.number("o_lora_rank"),
        "window": reader.number("sliding_window"),
        "rope_theta": theta,
        "compressed_rope_theta": compressed_theta,
        "yarn": yarn,
    }


def _rope_dim(reader: _Reader) -> int:
    """``qk_rope_head_dim``, or what the fraction that `transformers` keeps says."""
    values = reader.values
    if values.get("partial_rotary_factor") is None:
        return reader.number("qk_rope_head_dim")
    turning = int(reader.number("head_dim") * reader.number("partial_rotary_factor", kind=float))
    said = values.get("qk_rope_head_dim", turning)
    reader.require(said == turning, f"qk_rope_head_dim is {said}, partial_rotary_factor makes it {turning}")
    return turning


def _rotation(reader: _Reader, *, rope_dim: int, head_dim: int) -> tuple[float, float, dict | None]:
    """Theta of window layers, theta of compressed layers, and YaRN of the latter."""
    said = any(key in reader.values for key in ("rope_parameters", "rope_scaling"))
    reader.require(said, "rope_scaling or rope_parameters is missing: write null if there is no YaRN")
    nested, flat = reader.mapping("rope_parameters"), reader.mapping("rope_scaling")
    # `transformers` takes the second then, other readers the first.
    reader.require(not (nested and flat), "rope_parameters and rope_scaling are both there: remove one of them")
    scaling = nested or flat
    if not ("main" in scaling or "compress" in scaling):
        thetas = reader.number("rope_theta", kind=float), reader.number("compress_rope_theta", kind=float)
        return (*thetas, _yarn(reader, scaling, name="rope_scaling", forced=True))
    found = []
    for part in ("main", "compress"):
        inner, name = scaling.get(part), f"rope_parameters.{part}"
        if not isinstance(inner, dict):
            reader.problems.append(f"{name} is {json.dumps(inner)}, expected a mapping")
            return 1.0, 1.0, None
        key = "partial_rotary_factor"
        turning = int(head_dim * reader.number(key, kind=float, within={key: 1.0, **inner}, name=f"{name}.{key}"))
        reader.require(turning == rope_dim, f"{name}.partial_rotary_factor makes {turning} channels turn, qk_rope_head_dim is {rope_dim}")
        found.append(reader.number("rope_theta", kind=float, within=inner, name=f"{name}.rope_theta"))
    kind = scaling["main"].get("rope_type", "default")
    reader.require(kind == "default", f"rope_parameters.main.rope_type is {json.dumps(kind)}, supported is default")
    return found[0], found[1], _yarn(reader, scaling["compress"], name="rope_parameters.compress", forced=False)


def _yarn(reader: _Reader, scaling: Mapping[str, Any], *, name: str, forced: bool) -> dict | None:
    """YaRN, or None. ``forced``: an absent attention factor is 1; else `transformers` would compute another one."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        reader.problems.append(f"{name} is of type {json.dumps(kind)}, supported is yarn or default")
        return None
    factor = scaling.get("attention_factor", 1.0 if forced else None)
    reader.require(factor == 1.0, f"{name}.attention_factor is {json.dumps(factor)}, supported is 1.0: V4 has no attention temperature")
    reader.require(scaling.get("truncate", True) is True, f"{name}.truncate is false, supported is true")
    keys = {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_positions": "original_max_position_embeddings",
    }
    kinds = {"original_positions": int}
    return {
        ours: reader.number(theirs, kind=kinds.get(ours, float), within=scaling, name=f"{name}.{theirs}") for ours, theirs in keys.items()
    }


def _moe(reader: _Reader, *, depth: int) -> dict:
    values = reader.values
    hashed = values.get("num_hash_layers")
    if (types := reader.entries("mlp_layer_types", of=str)) is not None:
        first = next((i for i, kind in enumerate(types) if kind != "hash_moe"), len(types))
        ok = len(types) == depth and set(types[first:]) <= {"moe"}
        reader.require(ok, f"mlp_layer_types must be {depth} entries, first hash_moe, then moe")
        reader.require(hashed in (None, first), f"num_hash_layers is {hashed}, mlp_layer_types has {first}")
    else:
        first = reader.number("num_hash_layers")
    return {
        "experts": reader.number("n_routed_experts"),
        "top_k": reader.number("num_experts_per_tok"),
        "ffn": reader.number("moe_intermediate_size"),
        "shared": reader.number("n_shared_experts"),
        "scaling": reader.number("routed_scaling_factor", kind=float),
        "swiglu_limit": reader.number("swiglu_limit", kind=float),
        "hash_layers": first,
    }


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens, for whoever generates text; the model itself has none."""

    bos: int | None = 0
    eos: int | None = 1
    pad: int | None = None


def config_json(model: config_lib.ModelConfig, *, precision: names.Precision = "bf16", tokens: TokenIds | None = None) -> dict[str, Any]:
    """The content of a config.json for this model, in the released words and in those of `transformers`, which agree.

    Args:
        precision: of the checkpoint that it stands beside.
        tokens: ids to write; None: the released ones.

    Raises:
        ValueError: the model cannot be said in a config.json.
    """
    if model.moe.shared != 1:
        raise ValueError(
            f"moe.shared is {model.moe.shared}: `transformers` gives the shared expert the width of a routed one, so only 1 can be exported"
        )
    if not isinstance(model.hyper, config_lib.HyperConnectionConfig):
        raise ValueError(
            f"hyper.kind is {model.hyper.kind}: the released layout has hyper-connections in every layer, so only a model trained with "
            "hyper.kind: mhc can be exported"
        )
    if model.moe.affinity != "sqrt_softplus":
        raise ValueError(
            f"moe.affinity is {model.moe.affinity}: the V4 class of `transformers` computes sqrt_softplus only, so no other can be exported"
        )
    if not model.moe.clamp_shared:
        raise ValueError(
            "moe.clamp_shared is false: the V4 class of `transformers` cuts the shared expert, too, so only a model trained with "
            "moe.clamp_shared: true can be exported"
        )
    tokens = tokens or TokenIds()
    types = {ours: theirs for theirs, ours in _TYPES.items()}
    ours = {key: value for key, value in model.model_dump(mode="json", include=set(_OURS)).items() if value}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.depth,
        "num_nextn_predict_layers": int(model.mtp is not None),
        "compress_ratios": list(model.compress_ratios),
        "layer_types": [types[kind] for kind in model.layer_kinds],
        "compress_rates": {types[kind]: model.kind(kind).ratio for kind in ("csa", "hca") if kind in model.layer_kinds},
        **_said_attention(model),
        **_said_experts(model),
        "hc_mult": model.hyper.streams,
        "hc_sinkhorn_iters": model.hyper.iterations,
        "hc_eps": model.hyper.eps,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "use_cache": True,
        **_said_precision(precision),
        **({"v4train": ours} if ours else {}),
    }


def _said_attention(model: config_lib.ModelConfig) -> dict[str, Any]:
    a = model.attention
    fraction = a.rope_dim / a.head_dim
    if int(a.head_dim * fraction) != a.rope_dim:  # `transformers` cuts the product off, and the quotient may have been rounded down
        fraction = math.nextafter(fraction, 1.0)
    scaling: dict[str, Any] = {"rope_type": "default"}
    if a.yarn is not None:
        scaling = {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": a.yarn.factor,
            "original_max_position_embeddings": a.yarn.original_positions,
            "beta_fast": a.yarn.beta_fast,
            "beta_slow": a.yarn.beta_slow,
            "attention_factor": 1.0,
        }
    csa = model.kind("csa")
    indexer = {}
    if isinstance(csa, config_lib.CompressedSparseConfig):
        indexer = {"index_n_heads": csa.index_heads, "index_head_dim": csa.index_head_dim, "index_topk": csa.top_k}
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": 1,
        "head_dim": a.head_dim,
        "qk_rope_head_dim": a.rope_dim,
        "partial_rotary_factor": fraction,
        "q_lora_rank": a.query_rank,
        "o_groups": a.output_groups,
        "o_lora_rank": a.output_rank,
        "sliding_window": a.window,
        "attention_bias": False,
        **indexer,
        "rope_theta": a.rope_theta,
        "compress_rope_theta": a.compressed_rope_theta,
        "rope_scaling": scaling,
    }


def _said_experts(model: config_lib.ModelConfig) -> dict[str, Any]:
    moe = model.moe
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn,
        "routed_scaling_factor": moe.scaling,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "swiglu_limit": moe.swiglu_limit,
        "hidden_act": "silu",
        "num_hash_layers": moe.hash_layers,
        "mlp_layer_types": ["hash_moe"] * moe.hash_layers + ["moe"] * (model.depth - moe.hash_layers),
    }


def _said_precision(precision: names.Precision) -> dict[str, Any]:
    if precision in ("bf16", "fp32"):
        return {"dtype": {"bf16": "bfloat16", "fp32": "float32"}[precision]}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return {"dtype": "bfloat16", "quantization_config": fp8, "expert_dtype": {"instruct": "fp4", "base": "fp8"}[precision]}
