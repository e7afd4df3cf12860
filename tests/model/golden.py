"""Reads a golden case into our parameters: config, arrays, and which of our parameters each reference gradient belongs to."""

import json
import pathlib

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


def parameters(name: str, model: config_lib.ModelConfig) -> dict:
    """Our parameters with the golden case's values."""
    tensors = load_file(FOLDER / name / "model.safetensors")
    flat = {ours: tensors[theirs].T if transposed else tensors[theirs] for ours, (theirs, transposed) in _TOP.items()}
    layer = 0
    for i, run in enumerate(stack.factor(stack.layer_specs(model))):
        parts: dict[str, list[np.ndarray]] = {}
        for _ in range(run.repeat):
            for place in range(len(run.pattern)):
                for ours, value in _layer(tensors, layer, model).items():
                    parts.setdefault(f"stack/run_{i}/layer_{place}/{ours}", []).append(value)
                layer += 1
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
