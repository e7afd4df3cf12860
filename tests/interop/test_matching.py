"""What does not fit is told, all of it, in few lines; what fits is found, whatever its spelling and number format."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from tests.model import small
from v4train.interop import matching, names, quantised

MODEL = small.config("window", "csa", "hca", "csa", moe={"ffn": 32, "experts": 4})
EXTRA = ": belongs in multimodal.safetensors"
F32, E8M0 = np.dtype(np.float32), quantised.E8M0


@dataclasses.dataclass
class Info:
    dtype: np.dtype
    shape: tuple[int, ...]


def table(model=MODEL, *, extras: bool = True) -> dict[str, Info]:
    """A checkpoint in FP32 under the released names."""
    kinds = {"hash_table": np.dtype(np.int64)}
    return {slot.released: Info(kinds.get(slot.kind, F32), slot.shape) for slot in names.slots(model) if extras or not slot.extra}


def complaints(stored: dict[str, Info], model=MODEL) -> list[str]:
    with pytest.raises(ValueError, match="some/directory") as caught:
        matching.check(model, table=stored, subject="some/directory")
    return [line.strip() for line in str(caught.value).splitlines()]


def test_every_slot_has_a_source():
    found = matching.check(MODEL, table=table())
    assert found == {slot.released: matching.Source(slot.released) for slot in names.slots(MODEL)}


def test_all_problems_are_told_at_once():
    stored = table()
    del stored["layers.2.attn.compressor.ape"], stored["embed.weight"]
    stored["layers.1.attn.wq_a.wieght"] = stored.pop("layers.1.attn.wq_a.weight")
    stored["layers.0.attn_norm.weight"].shape = (31,)
    stored["layers.3.ffn.gate.bias"].dtype = np.dtype(np.int64)
    stored["layers.0.ffn.gate.tid2eid"].dtype = F32
    stored["lm_head.weight"] = stored["head.weight"]
    text = complaints(stored)
    assert text[0] == "some/directory: 8 tensors do not fit the model of config.json"
    assert "missing (3): the model of config.json has these, the files do not" in text
    assert {"layers.2.attn.compressor.ape", "embed.weight", "layers.1.attn.wq_a.weight"} <= set(text)
    assert "layers.1.attn.wq_a.wieght: did you mean `layers.N.attn.wq_a.weight`?" in text
    assert "layers.0.attn_norm.weight: [31], expected [32]" in text
    assert "layers.3.ffn.gate.bias: int64, expected float32 or bfloat16 or float16" in text
    assert "layers.0.ffn.gate.tid2eid: float32, expected int64 or int32" in text
    assert "lm_head.weight: also stored as head.weight" in text


def test_names_that_differ_in_numbers_only_are_one_line():
    stored = table()
    for layer in (0, 1, 3):
        for expert in (0, 2, 3):
            del stored[f"layers.{layer}.ffn.experts.{expert}.w1.weight"]
    del stored["layers.2.ffn.experts.1.w1.weight"]
    text = complaints(stored)
    assert text[0] == "some/directory: 10 tensors do not fit the model of config.json"
    assert text[2:] == ["layers.{0-1,3}.ffn.experts.{0,2-3}.w1.weight", "layers.2.ffn.experts.1.w1.weight"]


def test_layers_that_are_missing_or_too_many_are_one_line_each():
    deeper = small.config("window", "csa", "hca", "csa", "hca", "csa", moe={"ffn": 32, "experts": 4})
    text = complaints(table(), deeper)
    assert text[2:] == ["layers.{4-5}.*: every tensor", f"v4train.layers.{{4-5}}.ffn.gate.bias{EXTRA}"]
    assert f"missing ({len(table(deeper)) - len(table())})" in text[1]
    text = complaints(table(deeper))
    assert "layers.{4-5}.*: every tensor" in text


def test_half_an_mtp_block_is_an_error():
    stored = table()
    for name in [name for name in stored if name.startswith("mtp.0.attn")]:
        del stored[name]
    assert "mtp.0.attn.wkv.weight" in complaints(stored)


def test_many_problems_without_a_pattern_are_cut_but_counted():
    stored = table() | {f"strange{chr(97 + i // 26)}{chr(97 + i % 26)}.weight": Info(F32, (1,)) for i in range(100)}
    text = complaints(stored)
    assert text[0].startswith("some/directory: 100 tensors")
    assert text[-1] == "and 60 more lines"


def test_a_nearest_name_is_sought_once_for_each_kind_of_tensor(monkeypatch):
    """Of a large checkpoint with foreign names there are tens of thousands, and comparing one with all takes milliseconds."""
    asked = []
    monkeypatch.setattr(matching.explain, "nearest", lambda name, known: asked.append(name) or "")
    complaints({f"decoder.{name}": info for name, info in table().items()})
    assert len(set(asked)) == len(asked) < 60


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([1], "1"), ([1, 2], "{1-2}"), ([0, 1, 2, 4, 6, 7], "{0-2,4,6-7}"), ([3, 5], "{3,5}")],
)
def test_ranges(numbers, text):
    assert matching.compact([f"layers.{i}.x" for i in numbers]) == [f"layers.{text}.x"]


def test_extras_are_all_there_or_none():
    plain = small.config("window", "csa", "hca", "csa", moe={"ffn": 32, "experts": 4}, image=None, audio=None, media_tokens=())
    assert not any(name.startswith("v4train.") for name in matching.check(plain, table=table(plain, extras=False)))
    partial = table(plain)
    del partial["v4train.layers.1.ffn.gate.bias"]
    assert complaints(partial, plain)[2:] == [f"v4train.layers.1.ffn.gate.bias{EXTRA}"]
    text = complaints(table(extras=False))  # stems of images and audio cannot be made up
    assert {f"v4train.image.up{EXTRA}", f"v4train.audio.table{EXTRA}"} <= set(text)
    assert not any("gate.bias" in line for line in text)


def quantise(stored: dict[str, Info], name: str, format: str) -> None:
    rows, columns = stored[name].shape
    scale = name.replace(".weight", ".scale")
    if format == "fp8":
        stored[name] = Info(quantised.E4M3, (rows, columns))
        stored[scale] = Info(E8M0, (-(-rows // 128), -(-columns // 128)))
    else:
        stored[name] = Info(np.dtype(np.int8), (rows, columns // 2))
        stored[scale] = Info(E8M0, (rows, columns // 32))


EXPERT, PROJECTION = "layers.1.ffn.experts.2.w2", "layers.1.attn.wq_a"


def test_number_formats_are_recognised():
    stored = table()
    quantise(stored, f"{EXPERT}.weight", "fp4")
    quantise(stored, f"{PROJECTION}.weight", "fp8")
    stored["embed.weight"].dtype = np.dtype(ml_dtypes.bfloat16)
    found = matching.check(MODEL, table=stored)
    assert found[f"{EXPERT}.weight"] == matching.Source(f"{EXPERT}.weight", "fp4", f"{EXPERT}.scale")
    assert found[f"{PROJECTION}.weight"] == matching.Source(f"{PROJECTION}.weight", "fp8", f"{PROJECTION}.scale")
    assert found["embed.weight"].format == "plain"
    stored[f"{PROJECTION}.scale"].dtype = F32
    matching.check(MODEL, table=stored)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (f"{PROJECTION}.scale", None, ": the weight is float8_e4m3fn"),
        (f"{EXPERT}.scale", None, ": the weight is int8"),
        (f"{EXPERT}.scale", {"shape": (32, 2)}, ": [32, 2], expected [32, 1]"),
        (f"{EXPERT}.weight", {"shape": (32, 32)}, ": [32, 32], expected [32, 16]"),
        (f"{PROJECTION}.scale", {"dtype": np.dtype(np.int8)}, ": int8, expected float8_e8m0fnu or float32"),
        ("layers.1.attn_norm.weight", {"dtype": quantised.E4M3}, ": float8_e4m3fn, expected float32 or bfloat16 or float16"),
        (f"{EXPERT}.weight", {"dtype": np.dtype(np.uint16)}, ": uint16, expected float32"),
    ],
)
def test_scales_that_do_not_fit(name, change, complaint):
    stored = table()
    quantise(stored, f"{EXPERT}.weight", "fp4")
    quantise(stored, f"{PROJECTION}.weight", "fp8")
    if change is None:
        del stored[name]
    else:
        stored[name] = dataclasses.replace(stored[name], **change)
    assert any(line.startswith(name + complaint) for line in complaints(stored)), complaints(stored)


def test_a_scale_beside_a_plain_weight_is_unknown():
    stored = table() | {f"{PROJECTION}.scale": Info(E8M0, (1, 1))}
    assert complaints(stored)[2:] == [f"{PROJECTION}.scale: a scale beside a weight that is not quantised"]


def fuse(stored: dict[str, Info]) -> dict[str, Info]:
    """The same checkpoint as `transformers` names it in memory."""
    found = {name: info for name, info in stored.items() if ".experts." not in name or name.startswith("mtp.")}
    for layer in range(MODEL.depth):
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = Info(F32, (4, 64, 32))
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = Info(F32, (4, 32, 32))
    return found


def test_fused_experts_are_found():
    found = matching.check(MODEL, table=fuse(table()))
    part = found["layers.2.ffn.experts.3.w3.weight"].part
    assert found["layers.2.ffn.experts.3.w3.weight"].name == "model.layers.2.mlp.experts.gate_up_proj"
    assert (part.expert, part.rows) == (3, slice(32, 64))
    assert found["mtp.0.ffn.experts.3.w3.weight"].part is None


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        (Info(F32, (4, 32, 64)), "model.layers.1.mlp.experts.gate_up_proj: [4, 32, 64], expected [4, 64, 32]"),
        (Info(F32, (5, 64, 32)), "model.layers.1.mlp.experts.gate_up_proj: [5, 64, 32], expected [4, 64, 32]"),
        (Info(quantised.E4M3, (4, 64, 32)), "fused experts are not read quantised"),
    ],
)
def test_fused_experts_that_do_not_fit_are_one_problem(info, complaint):
    stored = fuse(table()) | {"model.layers.1.mlp.experts.gate_up_proj": info}
    text = complaints(stored)
    assert text[0] == "some/directory: 1 tensor does not fit the model of config.json"
    assert complaint in text[-1]
