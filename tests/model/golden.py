"""Reads a golden case into our parameters: config, arrays, and which reference gradient each of our gradients belongs to.

The released tensor names (`model.safetensors`) and those of the reference class (`golden.npz`) differ, so there is a table for each. Our
matrices are ``[in, out]``, theirs ``[out, in]``; ours are stacked over the layers of a run.
"""

import json
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from safetensors.numpy import load_file

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import stack, transformer

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
_KINDS = {"sliding_attention": "window", "compressed_sparse_attention": "csa", "heavily_compressed_attention": "hca"}
_ATTENTION = {  # ours -> (released name, transposed)
    "projections/wq_a": ("wq_a.weight", True),
    "projections/q_norm": ("q_norm.weight", False),
    "projections/wq_b": ("wq_b.weight", True),
    "projections/wkv": ("wkv.weight", True),
    "projections/kv_norm": ("kv_norm.weight", False),
    "projections/sink": ("attn_sink", False),
    "projections/wo_b": ("wo_b.weight", True),
    "compressor/wkv": ("compressor.wkv.weight", True),
    "compressor/wgate": ("compressor.wgate.weight", True),
    "compressor/ape": ("compressor.ape", False),
    "compressor/norm": ("compressor.norm.weight", False),
    "indexer/wq_b": ("indexer.wq_b.weight", True),
    "indexer/weights_proj": ("indexer.weights_proj.weight", True),
    "indexer/compressor/wkv": ("indexer.compressor.wkv.weight", True),
    "indexer/compressor/wgate": ("indexer.compressor.wgate.weight", True),
    "indexer/compressor/ape": ("indexer.compressor.ape", False),
    "indexer/compressor/norm": ("indexer.compressor.norm.weight", False),
}
_REST = {
    "attention_mix/fn": ("hc_attn_fn", True),
    "attention_mix/base": ("hc_attn_base", False),
    "attention_mix/scale": ("hc_attn_scale", False),
    "moe_mix/fn": ("hc_ffn_fn", True),
    "moe_mix/base": ("hc_ffn_base", False),
    "moe_mix/scale": ("hc_ffn_scale", False),
    "attention_norm": ("attn_norm.weight", False),
    "moe_norm": ("ffn_norm.weight", False),
    "moe/router/gate": ("ffn.gate.weight", True),
    "moe/router/table": ("ffn.gate.tid2eid", False),
    **{f"moe/shared/{w}": (f"ffn.shared_experts.{w}.weight", True) for w in ("w1", "w2", "w3")},
}
_TOP = {
    "embedding/table": ("embed.weight", False),
    "head": ("head.weight", True),
    "norm": ("norm.weight", False),
    "collapse/fn": ("hc_head_fn", True),
    "collapse/base": ("hc_head_base", False),
    "collapse/scale": ("hc_head_scale", False),
}
_SHARED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_GRADIENTS = {  # ours -> the reference's; what is fused there has the same name twice
    "attention/projections/wq_a": "self_attn.q_a_proj.weight",
    "attention/projections/q_norm": "self_attn.q_a_norm.weight",
    "attention/projections/wq_b": "self_attn.q_b_proj.weight",
    "attention/projections/wkv": "self_attn.kv_proj.weight",
    "attention/projections/kv_norm": "self_attn.kv_norm.weight",
    "attention/projections/sink": "self_attn.sinks",
    "attention/projections/wo_a": "self_attn.o_a_proj.weight",
    "attention/projections/wo_b": "self_attn.o_b_proj.weight",
    "attention/compressor/wkv": "self_attn.compressor.kv_proj.weight",
    "attention/compressor/wgate": "self_attn.compressor.gate_proj.weight",
    "attention/compressor/ape": "self_attn.compressor.position_bias",
    "attention/compressor/norm": "self_attn.compressor.kv_norm.weight",
    **{f"attention_mix/{x}": f"attn_hc.{x}" for x in ("fn", "base", "scale")},
    **{f"moe_mix/{x}": f"ffn_hc.{x}" for x in ("fn", "base", "scale")},
    "attention_norm": "input_layernorm.weight",
    "moe_norm": "post_attention_layernorm.weight",
    "moe/router/gate": "mlp.gate.weight",
    "moe/experts/w1": "mlp.experts.gate_up_proj",
    "moe/experts/w3": "mlp.experts.gate_up_proj",
    "moe/experts/w2": "mlp.experts.down_proj",
    **{f"moe/shared/{ours}": f"mlp.shared_experts.{theirs}.weight" for ours, theirs in _SHARED.items()},
}
_TOP_GRADIENTS = {
    "embedding/table": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    **{f"collapse/{x}": f"model.hc_head.hc_{x}" for x in ("fn", "base", "scale")},
}


def config(name: str, **changes) -> config_lib.ModelConfig:
    """Our config of a golden case."""
    c = json.loads((FOLDER / name / "config.json").read_text())
    yarn = c["rope_parameters"]["compress"]
    yarn = (
        None
        if yarn["rope_type"] == "default"
        else {
            "factor": yarn["factor"],
            "original_positions": yarn["original_max_position_embeddings"],
            "beta_fast": yarn["beta_fast"],
            "beta_slow": yarn["beta_slow"],
        }
    )
    values = {
        "vocab_size": c["vocab_size"],
        "hidden": c["hidden_size"],
        "kinds": [
            {"kind": "window"},
            {
                "kind": "csa",
                "ratio": c["compress_rates"]["compressed_sparse_attention"],
                "index_heads": c["index_n_heads"],
                "index_head_dim": c["index_head_dim"],
                "top_k": c["index_topk"],
            },
            {"kind": "hca", "ratio": c["compress_rates"]["heavily_compressed_attention"]},
        ],
        "layers": [{"pattern": [_KINDS[kind] for kind in c["layer_types"]]}],
        "attention": {
            "heads": c["num_attention_heads"],
            "head_dim": c["head_dim"],
            "rope_dim": c["qk_rope_head_dim"],
            "query_rank": c["q_lora_rank"],
            "output_groups": c["o_groups"],
            "output_rank": c["o_lora_rank"],
            "window": c["sliding_window"],
            "chunk": 32,
            "compressed_rope_theta": c["compress_rope_theta"],
            "yarn": yarn,
        },
        "moe": {
            "experts": c["n_routed_experts"],
            "top_k": c["num_experts_per_tok"],
            "ffn": c["moe_intermediate_size"],
            "scaling": c["routed_scaling_factor"],
            "swiglu_limit": c["swiglu_limit"],
            "hash_layers": c["mlp_layer_types"].count("hash_moe"),
        },
        "mtp": None,
    }
    return config_lib.ModelConfig.model_validate({**values, **changes})


def _layer(tensors: dict, layer: int, model: config_lib.ModelConfig) -> dict[str, np.ndarray]:
    prefix, out = f"layers.{layer}.", {}
    for names, under, theirs in ((_ATTENTION, "attention/", "attn."), (_REST, "", "")):
        for ours, (name, transposed) in names.items():
            if (value := tensors.get(f"{prefix}{theirs}{name}")) is not None:
                out[f"{under}{ours}"] = value.T if transposed else value
    groups = model.attention.output_groups
    stacked = tensors[f"{prefix}attn.wo_a.weight"].reshape(groups, model.attention.output_rank, -1)
    out["attention/projections/wo_a"] = stacked.swapaxes(1, 2)
    for w in ("w1", "w2", "w3"):
        out[f"moe/experts/{w}"] = np.stack([tensors[f"{prefix}ffn.experts.{e}.{w}.weight"].T for e in range(model.moe.experts)])
    bias = tensors.get(f"{prefix}ffn.gate.bias", np.zeros(model.moe.experts, np.float32))
    out["moe/router/bias"] = np.broadcast_to(bias, (len(config_lib.MODALITIES), model.moe.experts))
    return out


def _places(model: config_lib.ModelConfig) -> Iterator[tuple[str, int]]:
    """Where each layer's parameters are: path of its place in the pattern, and index along the stacked axis."""
    for i, run in enumerate(stack.factor(stack.layer_specs(model))):
        yield from ((f"stack/run_{i}/layer_{place}", repeat) for repeat in range(run.repeat) for place in range(len(run.pattern)))


def parameters(name: str, model: config_lib.ModelConfig) -> dict:
    """Our parameters with the golden case's values."""
    tensors = load_file(FOLDER / name / "model.safetensors")
    flat = {ours: tensors[theirs].T if transposed else tensors[theirs] for ours, (theirs, transposed) in _TOP.items()}
    parts: dict[str, list[np.ndarray]] = {}
    for layer, (place, _) in enumerate(_places(model)):
        for ours, value in _layer(tensors, layer, model).items():
            parts.setdefault(f"{place}/{ours}", []).append(value)
    flat |= {path: np.stack(values) for path, values in parts.items()}
    declared = param.flatten(param.declarations(transformer.Transformer(model)))
    assert declared.keys() == flat.keys(), declared.keys() ^ flat.keys()
    assert all(flat[path].shape == d.shape for path, d in declared.items())
    nested: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(value)
    return nested


def gradient_norms(gradients: dict, model: config_lib.ModelConfig) -> dict[str, float]:
    """L2 norms under the reference's names. The indexer's gradients, which the reference does not have, are left out."""
    leaves = jax.tree_util.tree_flatten_with_path(gradients)[0]
    flat = {param.path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
    squares: dict[str, float] = {}
    for ours, theirs in _TOP_GRADIENTS.items():
        squares[theirs] = float(np.sum(flat[ours] ** 2))
    for layer, (place, repeat) in enumerate(_places(model)):
        for ours, theirs in _GRADIENTS.items():
            if (gradient := flat.get(f"{place}/{ours}")) is not None:
                reference = f"model.layers.{layer}.{theirs}"
                squares[reference] = squares.get(reference, 0.0) + float(np.sum(gradient[repeat] ** 2))
    return {name: math.sqrt(square) for name, square in squares.items()}
