"""The README.md of exported weights: what the model is, what it was trained on, how its numbers are stored, and how to load it.

Everything in it comes from the checkpoint and the conversion; nothing is praise. What is unknown is said to be.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from v4train.interop import exporting, names
from v4train.model import config as config_lib
from v4train.model import count


@dataclasses.dataclass(frozen=True)
class Source:
    """Training data, as a reader should see them; ``licence`` and ``origin`` are empty where the store cannot be read any more."""

    name: str
    share: float
    licence: str = ""
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Training:
    """Where the weights come from.

    Attributes:
        name: of the run.
        steps: done.
        tokens: of all of them.
        row: tokens of a row.
        sources: the data.
        begun_from: what the first values were taken from, or "".
        imported: the weights are an import, so the rest of this is not known.
    """

    name: str
    steps: int
    tokens: int
    row: int
    sources: Sequence[Source]
    begun_from: str = ""
    imported: str = ""


_FORMATS = {
    "fp32": "Every tensor in FP32: the weights as they were trained",
    "bf16": "Matrices and norms in BF16; position tables, sinks, router biases and hyper-connections in FP32",
    "base": "Matrices of attention and experts in FP8 (E4M3, 128 x 128 blocks, UE8M0 scales), the rest as in the BF16 format",
    "instruct": "Routed experts in FP4 (E2M1, a UE8M0 scale per 32 inputs), other matrices in FP8 (E4M3, 128 x 128 blocks, UE8M0 scales), "
    "the rest as in the BF16 format",
}


def text(
    model: config_lib.ModelConfig,
    *,
    precision: names.Precision,
    counted: count.ParameterCount,
    training: Training,
    rows: Sequence[exporting.Row],
    version: str,
) -> str:
    """The card, in Markdown with the front matter that model hubs read."""
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [deepseek_v4, v4train]\n---",
        f"# {training.name}",
        f"A mixture-of-experts language model of the DeepSeek-V4 architecture: {counted.total:,} parameters, "
        f"{counted.active:,} of them used per token{_mtp(counted)}. Exported by v4train {version}.",
        "## Architecture",
        _table(_architecture(model)),
        "## Weights",
        f"{_FORMATS[precision]}. Measured on these weights against the checkpoint that they were exported from:",
        exporting.table(list(rows)),
        "## Training",
        _training(training),
        "## Loading",
        _loading(precision),
        "## Limits",
        _limits(model, training, misread=len(exporting.misread_by_transformers(model, precision=precision))),
    ]
    return "\n\n".join(sections) + "\n"


def _mtp(counted: count.ParameterCount) -> str:
    return f" (and {counted.mtp:,} in the multi-token prediction block)" if counted.mtp else ""


def _architecture(model: config_lib.ModelConfig) -> Mapping[str, Any]:
    kinds = {"window": "window", "csa": "compressed sparse (CSA)", "hca": "heavily compressed (HCA)"}
    layers = {kind: model.layer_kinds.count(name) for name, kind in kinds.items() if name in model.layer_kinds}
    a, moe = model.attention, model.moe
    assert isinstance(model.hyper, config_lib.HyperConnectionConfig), "no other model can be exported"
    rows = {
        "layers": f"{model.depth}: " + ", ".join(f"{number} {kind}" for kind, number in layers.items()),
        "hidden width": model.hidden,
        "vocabulary": model.vocab_size,
        "attention": f"{a.heads} query heads of {a.head_dim}, one shared key and value head, window of {a.window} tokens",
        "experts": f"{moe.experts} routed, {moe.top_k} per token, and a shared one, of width {moe.ffn}",
        "layers routed by token id": f"the first {moe.hash_layers}" if moe.hash_layers else "none",
        "hyper-connections": f"{model.hyper.streams} streams, {model.hyper.iterations} Sinkhorn iterations",
        "longest row": f"{model.max_positions:,} tokens",
        "multi-token prediction": "depth 1" if model.mtp else "none",
        "other modalities": ", ".join(name for name in ("image", "audio") if getattr(model, name)) or "none",
    }
    return {key: f"{value:,}" if isinstance(value, int) else value for key, value in rows.items()}


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def _training(training: Training) -> str:
    if training.imported:
        return f"Imported from {training.imported} and not trained further; what these weights were trained on is for their source to say."
    begun = f" It began with the weights of `{training.begun_from}`." if training.begun_from else ""
    lines = [
        f"{training.steps:,} steps, {training.tokens:,} tokens in rows of {training.row:,}.{begun} The whole recipe is in `recipe.yaml`.",
        "",
        "| data | share of the rows | licence | origin |",
        "| --- | ---: | --- | --- |",
    ]
    total = sum(source.share for source in training.sources)
    lines += [
        f"| {source.name} | {source.share / total:.1%} | {source.licence or 'unknown'} | {source.origin or 'unknown'} |"
        for source in training.sources
    ]
    return "\n".join(lines)


def _loading(precision: names.Precision) -> str:
    dtype, note = "float32", ""
    if precision in ("base", "instruct"):
        dtype = "bfloat16"
        note = (
            "\n\nWithout a GPU `transformers` (5.23, with `accelerate`) unpacks FP8 and FP4 to BF16, which holds their values exactly. Do "
            "not ask it for another dtype: it would mix the two. `model.float()` afterwards computes in FP32 without further loss."
        )
    return (
        "```python\nimport torch, transformers\n\n"
        'model = transformers.AutoModelForCausalLM.from_pretrained(".", dtype=torch.' + dtype + ")\n"
        'tokenizer = transformers.AutoTokenizer.from_pretrained(".")\n```'
        f"{note}\n\nTo train on: `v4train convert import . imported`, then a recipe with `init_from: imported`."
    )


def _limits(model: config_lib.ModelConfig, training: Training, *, misread: int) -> str:
    lines = ["- A language model repeats what it was trained on, mistakes included; it has not been aligned or tested for safety."]
    if not training.imported:
        lines.append("- It was trained with v4train; no benchmark has been run on it unless this page says so.")
    if model.image or model.audio:
        lines.append(
            "- `transformers` has no stems for images and audio: it runs the model on text. Their weights are in `multimodal.safetensors`."
        )
    if model.mtp:
        lines.append("- `transformers` ignores the multi-token prediction block (`mtp.*`).")
    if misread:
        lines.append(
            f"- `transformers` (5.23) cannot read {misread} of the FP8 matrices: it assumes sides of at most 128 or multiples of 128. "
            "Use the BF16 format there."
        )
    return "\n".join(lines)
