"""The table of names against checkpoints of the public PyTorch class, the released files' headers, and itself: all elements, once each."""

import json
import pathlib
import re

import numpy as np
import pytest
from safetensors import safe_open

from tests.model import golden, small
from v4train.core import param
from v4train.interop import names, released_config

MODELS = {
    "everything": small.config("window", "window", "csa", "hca", "csa", "hca", "csa", moe={"hash_layers": 3}),
    "no mtp": small.config("hca", "csa", mtp=None, image=None, audio=None, media_tokens=()),
    "no hash": small.config("csa", "csa", "csa", moe={"hash_layers": 0}),
    "all hash": small.config("window", moe={"hash_layers": 1}, audio=None, media_tokens=()),
}
RELEASED = {
    path.stem: released_config.model_config(json.loads(path.read_text()))
    for path in (pathlib.Path(__file__).parent / "released").glob("*.json")
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_element_is_in_exactly_one_tensor(model):
    declared = param.flatten(small.declarations(model))
    covered = {path: np.zeros(d.shape, int) for path, d in declared.items()}
    slots = names.slots(model)
    for slot in slots:
        block = covered[slot.path][slot.index]
        assert block.shape == slot.block_shape
        assert slot.dtype == declared[slot.path].dtype
        covered[slot.path][slot.index] += 1
    assert all((count == 1).all() for count in covered.values())
    assert len({slot.released for slot in slots}) == len(slots)
    assert all(slot.kind in names.FORMATS for slot in slots)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_block_comes_back_from_its_tensor(model):
    rng = np.random.default_rng(0)
    for slot in names.slots(model):
        block = rng.standard_normal(slot.block_shape)
        tensor = slot.to_released(block)
        assert tensor.shape == slot.shape
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(slot.to_ours(tensor), block)


def test_the_groups_of_the_output_projection_are_stacked_along_its_rows():
    slot = next(slot for slot in names.slots(small.config()) if slot.turn == "grouped")
    groups, width, rank = slot.block_shape
    block = np.arange(groups * width * rank).reshape(slot.block_shape)
    tensor = slot.to_released(block)
    for group in range(groups):
        np.testing.assert_array_equal(tensor[group * rank : (group + 1) * rank], block[group].T)


@pytest.mark.parametrize("name", ["untied", "mixed", "yarn"])
def test_names_and_shapes_are_those_that_the_public_class_saves(name):
    with safe_open(golden.FOLDER / name / "model.safetensors", "np") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    slots = names.slots(golden.config(name))
    assert {slot.released: slot.shape for slot in slots if not slot.extra} == stored
    assert {slot.released for slot in slots if slot.extra} == {f"v4train.layers.{i}.ffn.gate.bias" for i in range(len({*_layers(stored)}))}


def _layers(stored):
    return (match[1] for name in stored if (match := re.match(r"layers\.(\d+)\.", name)))


def test_the_classes_parameters_are_spelled_as_its_gradients_are():
    reference = set(np.load(golden.FOLDER / "untied" / "golden.npz")["grad_names"].tolist())
    spelled = {slot.spelled for slot in names.slots(golden.config("untied")) if "/indexer/" not in slot.path and slot.spelled}
    buffers = {name for name in spelled if name.endswith(("e_score_correction_bias", "tid2eid"))}
    assert spelled - buffers == reference
    assert len(buffers) == golden.config("untied").depth


def stored(model, precision) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a checkpoint as its headers list them, worked out by the rules of the formats alone."""
    found = {}
    for slot in names.slots(model):
        format = names.stored_as(slot, precision)
        rows, *columns = slot.shape
        if format == "fp8":
            found[slot.released] = "F8_E4M3", slot.shape
            found[slot.released.replace(".weight", ".scale")] = "F8_E8M0", (-(-rows // 128), -(-columns[0] // 128))
        elif format == "fp4":
            found[slot.released] = "I8", (rows, columns[0] // 2)
            found[slot.released.replace(".weight", ".scale")] = "F8_E8M0", (rows, columns[0] // 32)
        else:
            found[slot.released] = {"bf16": "BF16", "fp32": "F32", "int64": "I64"}[format], slot.shape
    return found


FLASH = {  # headers of the released instruct checkpoint
    "mtp.0.attn.wq_a.weight": ("F8_E4M3", (1024, 4096)),
    "mtp.0.attn.wq_a.scale": ("F8_E8M0", (8, 32)),
    "mtp.0.attn.wq_b.scale": ("F8_E8M0", (256, 8)),
    "mtp.0.attn.wkv.weight": ("F8_E4M3", (512, 4096)),
    "mtp.0.attn.wo_a.weight": ("F8_E4M3", (8192, 4096)),
    "mtp.0.attn.wo_b.scale": ("F8_E8M0", (32, 64)),
    "mtp.0.e_proj.weight": ("F8_E4M3", (4096, 4096)),
    "mtp.0.h_proj.scale": ("F8_E8M0", (32, 32)),
    "mtp.0.ffn.shared_experts.w2.weight": ("F8_E4M3", (4096, 2048)),
    "mtp.0.attn.attn_sink": ("F32", (64,)),
    "mtp.0.attn.q_norm.weight": ("BF16", (1024,)),
    "mtp.0.attn.kv_norm.weight": ("BF16", (512,)),
    "mtp.0.enorm.weight": ("BF16", (4096,)),
    "mtp.0.hnorm.weight": ("BF16", (4096,)),
    "mtp.0.norm.weight": ("BF16", (4096,)),
    "mtp.0.ffn.gate.weight": ("BF16", (256, 4096)),
    "mtp.0.ffn.gate.bias": ("F32", (256,)),
    "mtp.0.hc_attn_fn": ("F32", (24, 16384)),
    "mtp.0.hc_attn_base": ("F32", (24,)),
    "mtp.0.hc_ffn_scale": ("F32", (3,)),
    "mtp.0.hc_head_fn": ("F32", (4, 16384)),
    "mtp.0.hc_head_base": ("F32", (4,)),
    "mtp.0.hc_head_scale": ("F32", (1,)),
    "mtp.0.ffn.experts.255.w1.weight": ("I8", (2048, 2048)),
    "mtp.0.ffn.experts.255.w1.scale": ("F8_E8M0", (2048, 128)),
    "mtp.0.ffn.experts.0.w2.weight": ("I8", (4096, 1024)),
    "mtp.0.ffn.experts.0.w2.scale": ("F8_E8M0", (4096, 64)),
    "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6)),
    "layers.3.ffn.gate.bias": ("F32", (256,)),
}
PRO = {
    "embed.weight": ("BF16", (129280, 7168)),
    "head.weight": ("BF16", (129280, 7168)),
    "norm.weight": ("BF16", (7168,)),
    "layers.0.attn.compressor.wkv.weight": ("BF16", (512, 7168)),
    "layers.0.attn.compressor.ape": ("F32", (128, 512)),
    "layers.2.attn.compressor.wkv.weight": ("BF16", (1024, 7168)),
    "layers.2.attn.compressor.ape": ("F32", (4, 1024)),
    "layers.60.attn.indexer.compressor.wkv.weight": ("BF16", (256, 7168)),
    "layers.60.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1536)),
    "layers.60.attn.indexer.weights_proj.weight": ("BF16", (64, 7168)),
    "layers.0.attn.attn_sink": ("F32", (128,)),
    "layers.0.attn.wo_a.weight": ("F8_E4M3", (16384, 4096)),
    "layers.0.attn.wo_b.weight": ("F8_E4M3", (7168, 16384)),
    "layers.0.attn.wq_b.weight": ("F8_E4M3", (65536, 1536)),
    "layers.0.ffn.experts.383.w1.weight": ("I8", (3072, 3584)),
    "layers.0.ffn.experts.383.w1.scale": ("F8_E8M0", (3072, 224)),
    "layers.0.ffn.gate.tid2eid": ("I64", (129280, 6)),
    "layers.0.hc_attn_fn": ("F32", (24, 28672)),
    "mtp.0.hc_head_fn": ("F32", (4, 28672)),
    "mtp.0.e_proj.weight": ("F8_E4M3", (7168, 7168)),
}


@pytest.mark.parametrize(("name", "headers"), [("v4_flash", FLASH), ("v4_pro", PRO)])
def test_a_released_checkpoint_has_these_headers(name, headers):
    found = stored(RELEASED[name], "instruct")
    assert {key: found.get(key) for key in headers} == headers
    experts = RELEASED[name].moe.experts
    assert sum(key.startswith("mtp.0.") for key in found) == 6 * experts + 39  # 1575 in Flash
    assert "layers.0.ffn.gate.bias" not in found
    assert "layers.3.ffn.gate.tid2eid" not in found


@pytest.mark.parametrize(
    ("precision", "formats"),
    [
        ("instruct", {"fp4", "fp8", "bf16", "fp32", "int64"}),
        ("base", {"fp8", "bf16", "fp32", "int64"}),
        ("bf16", {"bf16", "fp32", "int64"}),
        ("fp32", {"fp32", "int64"}),
    ],
)
def test_what_decides_stays_in_high_precision(precision, formats):
    slots = names.slots(MODELS["everything"])
    assert {names.stored_as(slot, precision) for slot in slots} == formats
    for slot in slots:
        format = names.stored_as(slot, precision)
        if re.search(r"hc_|\.ape$|attn_sink|gate\.bias|^v4train", slot.released):
            assert format == "fp32", slot.released
        if re.search(r"norm|compressor|weights_proj|gate\.weight|^embed|^head", slot.released) and ".ape" not in slot.released:
            assert format in ("bf16", "fp32"), slot.released
        if slot.released.endswith("tid2eid"):
            assert format == "int64"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_released_names_are_canonical(model):
    for slot in names.slots(model):
        assert names.canonical(slot.released) == slot.released
        if names.FORMATS[slot.kind] in ("fp4", "fp8"):
            scale = slot.released.replace(".weight", ".scale")
            assert names.canonical(scale) == scale


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_classes_spelling_is_understood(model):
    for slot in names.slots(model):
        part = names.fused(slot, experts=model.moe.experts)
        if part is not None:
            assert names.canonical(slot.spelled) == part.name
            assert part.shape[1] == (2 * model.moe.ffn if "gate_up" in part.name else model.hidden)
        elif slot.spelled:
            assert names.canonical(slot.spelled) == slot.released


@pytest.mark.parametrize(
    ("spelled", "released"),
    [
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.attn.compressor.norm.weight", "layers.7.attn.compressor.norm.weight"),
        ("model.layers.7.self_attn.q_a_proj.weight_scale_inv", "layers.7.attn.wq_a.scale"),
        ("layers.7.attn.wq_a.scale", "layers.7.attn.wq_a.scale"),
        ("model.layers.7.mlp.experts.12.w1.weight", "layers.7.ffn.experts.12.w1.weight"),
        ("model.layers.7.attn_hc.scale", "layers.7.hc_attn_scale"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.mtp.0.attn.norm.weight", "mtp.0.attn.kv_norm.weight"),
        ("v4train.image.up", "v4train.image.up"),
        ("model.layers.7.self_attn.strange", "layers.7.self_attn.strange"),
    ],
)
def test_other_spellings(spelled, released):
    assert names.canonical(spelled) == released


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_all_that_transformers_writes_has_a_name(tmp_path):
    """Its three ways to name a checkpoint, each with exactly our tensors."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV4Config(**json.loads((golden.FOLDER / "yarn" / "config.json").read_text()))
    model = transformers.DeepseekV4ForCausalLM(config)
    slots = [slot for slot in names.slots(golden.config("yarn")) if not slot.extra]
    assert {slot.spelled for slot in slots} == set(model.state_dict())
    for original in (True, False):
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
        with safe_open(tmp_path / str(original) / "model.safetensors", "np") as file:
            found = {names.canonical(key) for key in file.keys()}  # noqa: SIM118
        if original:
            assert found == {slot.released for slot in slots}
        else:
            parts = {slot: names.fused(slot, experts=8) for slot in slots}
            assert found == {slot.released if part is None else part.name for slot, part in parts.items()}
