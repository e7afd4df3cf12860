"""Exports against independent readers: the safetensors library, our importer, and formats computed on whole arrays."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.interop import steps
from v4train.checkpoint import streaming
from v4train.interop import exporting, importing, names, quantised, tensor_files
from v4train.interop import released as released_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def made():
    return steps.recipe()


@pytest.fixture(scope="module")
def arrays(made):
    return steps.values(made.model)


@pytest.fixture(scope="module")
def step(made, arrays, tmp_path_factory):
    return steps.write(tmp_path_factory.mktemp("run"), made, arrays)


def export(step, directory, model, precision, **options):
    directory.mkdir()
    rows = exporting.write_weights(streaming.Reader(step), directory, model=model, precision=precision, **options)
    exporting.write_config(directory, model=model, precision=precision, tokens=None)
    return rows


def imported(directory, where):
    importing.write_step(released_lib.Released.open(directory), where, values={})
    return where / "step_00000000"


def test_fp32_there_and_back_is_bit_equal_and_stays_so(step, made, arrays, tmp_path):
    export(step, tmp_path / "out", made.model, "fp32", shard_bytes=300_000)
    back = imported(tmp_path / "out", tmp_path / "back")
    steps.assert_same_bits(steps.read(back), arrays)
    export(back, tmp_path / "again", made.model, "fp32", shard_bytes=300_000)
    for file in sorted((tmp_path / "out").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_in_pieces_the_files_are_the_same(step, made, arrays, tmp_path, monkeypatch):
    """The embedding and the head take the path that those of a large vocabulary take."""
    export(step, tmp_path / "whole", made.model, "bf16")
    monkeypatch.setattr(exporting, "PIECE_BYTES", 9_000)
    monkeypatch.setattr(importing, "PIECE_BYTES", 9_000)
    export(step, tmp_path / "pieces", made.model, "bf16")
    assert (tmp_path / "whole/checksums.json").read_bytes() == (tmp_path / "pieces/checksums.json").read_bytes()
    export(step, tmp_path / "fp32", made.model, "fp32")
    steps.assert_same_bits(steps.read(imported(tmp_path / "fp32", tmp_path / "back")), arrays)


@pytest.mark.parametrize("case", ["mixed", "yarn", "untied"])
def test_the_golden_cases_come_out_as_pytorch_wrote_them(case, tmp_path):
    """Import and export of files that the public class saved: same names, and same bytes of every tensor."""
    released = released_lib.Released.open(GOLDEN / case)
    importing.write_step(released, tmp_path / "steps", values={})
    export(tmp_path / "steps/step_00000000", tmp_path / "out", released.model, "fp32")
    theirs = {names.canonical(name): x for name, x in safetensors_numpy.load_file(GOLDEN / case / "model.safetensors").items()}
    ours = safetensors_numpy.load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name, x in theirs.items() if ours[name].tobytes() != np.asarray(x).tobytes()] == []


def _oracle(tensor: np.ndarray, format: str) -> np.ndarray:
    """What the format makes of a tensor, by brute force over its codes, in fp64."""
    if format in ("fp32", "int64"):
        return tensor
    if format == "bf16":
        return tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
    block, dtype = ((1, 32), ml_dtypes.float4_e2m1fn) if format == "fp4" else ((128, 128), ml_dtypes.float8_e4m3fn)
    top = float(ml_dtypes.finfo(dtype).max)
    out = np.empty_like(tensor)
    for i in range(0, tensor.shape[0], block[0]):
        for j in range(0, tensor.shape[1], block[1]):
            part = tensor[i : i + block[0], j : j + block[1]].astype(np.float64)
            largest = np.abs(part).max()
            scale = min(s for s in 2.0 ** np.arange(-40, 10) if _fits(largest / s, dtype, top))
            out[i : i + block[0], j : j + block[1]] = (part / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale
    return out


def _fits(value: float, dtype, top: float) -> bool:
    """Whether the nearest code of a format without an end is within this one's."""
    step = top - float(np.nextafter(np.array(top, dtype), np.array(0, dtype)))
    return value < top + step / 2 or (value == top + step / 2 and dtype == ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("precision", ["bf16", "base", "instruct"])
def test_formats_are_those_of_the_release(step, made, arrays, tmp_path, precision):
    rows = export(step, tmp_path / "out", made.model, precision)
    back = steps.read(imported(tmp_path / "out", tmp_path / "back"))
    table = tensor_files.TensorFiles.open(tmp_path / "out").table
    squares = {}
    for slot in names.slots(made.model):
        stored = next(name for name in arrays if name.partition("/")[2] == slot.path)
        source = slot.to_released(arrays[stored][slot.index])
        format = names.stored_as(slot, precision)
        expected = _oracle(source, format)
        assert np.array_equal(slot.to_released(back[stored][slot.index]), expected), slot.released
        error, total = squares.get((slot.kind, format), (0.0, 0.0))
        squares[slot.kind, format] = (
            error + np.sum((source - expected.astype(np.float64)) ** 2),
            total + np.sum(source.astype(np.float64) ** 2),
        )
        if not slot.extra:
            dtype = {"fp4": "int8", "fp8": "float8_e4m3fn", "bf16": "bfloat16", "fp32": "float32", "int64": "int64"}[format]
            assert table[slot.released].dtype.name == dtype
    assert {(row.kind, row.format) for row in rows} == squares.keys()
    for row in rows:
        error, total = squares[row.kind, row.format]
        assert row.deviation.relative_rms == pytest.approx(np.sqrt(error / total) if row.format != "int64" else 0.0, rel=1e-6), row
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("expert_dtype") == {"bf16": None, "base": "fp8", "instruct": "fp4"}[precision]
    assert ("quantization_config" in config) == (precision != "bf16")


def test_writing_what_was_read_from_quantised_files_keeps_their_bits(step, made, tmp_path):
    """The values lie on the format's grid, so a second export finds the same scales and codes."""
    export(step, tmp_path / "out", made.model, "instruct")
    export(imported(tmp_path / "out", tmp_path / "back"), tmp_path / "again", made.model, "instruct")
    assert (tmp_path / "out/checksums.json").read_bytes() == (tmp_path / "again/checksums.json").read_bytes()


def test_what_transformers_does_not_have_is_in_a_file_of_its_own(step, made, tmp_path):
    export(step, tmp_path / "out", made.model, "fp32")
    main = safetensors_numpy.load_file(tmp_path / "out/model.safetensors")
    extras = safetensors_numpy.load_file(tmp_path / "out/multimodal.safetensors")
    assert not [name for name in main if name.startswith("v4train.")]
    assert all(name.startswith("v4train.") for name in extras)
    assert "v4train.image.up" in extras
    assert "mtp.0.e_proj.weight" in main


def test_a_width_without_fp4_form_is_refused_with_every_name(made):
    model = made.model.model_copy(update={"moe": made.model.moe.model_copy(update={"ffn": 48})})
    with pytest.raises(ValueError) as caught:
        exporting.plan(model, precision="instruct")
    text = str(caught.value)
    assert text.startswith("40 tensors have no FP4 form")  # w2 of 8 experts in 4 layers and MTP
    assert "  layers.0.ffn.experts.0.w2.weight: rows of 48 values" in text
    assert text.endswith("Export as fp8 or bf16.")
    exporting.plan(model, precision="base")


def test_matrices_that_transformers_would_read_wrongly_are_named(made):
    """It derives the block from the number of scales: 192 rows with two scales are blocks of 96 to it, of 128 and 64 to the format."""
    assert exporting.misread_by_transformers(made.model, precision="base") == []
    model = made.model.model_copy(update={"hidden": 192})
    found = exporting.misread_by_transformers(model, precision="base")
    assert "layers.0.attn.wq_a.weight" in found
    assert "layers.0.ffn.experts.0.w1.weight" in found
    assert not [name for name in found if name.startswith("mtp.")]  # it does not read these at all
    assert not [name for name in exporting.misread_by_transformers(model, precision="instruct") if "experts.0" in name]
    assert exporting.misread_by_transformers(model, precision="bf16") == []


def test_a_step_of_another_model_is_refused(step, made, tmp_path):
    model = made.model.model_copy(update={"moe": made.model.moe.model_copy(update={"ffn": 64})})
    with pytest.raises(
        ValueError, match=r"the arrays of the checkpoint are not those of its recipe's model; \d+ differ:\n  params/"
    ) as caught:
        export(step, tmp_path / "out", model, "fp32")
    assert "moe/experts/w1" in str(caught.value)


def test_a_weight_that_is_not_finite_is_named(made, arrays, tmp_path):
    broken = dict(arrays)
    broken["params/norm"] = np.full_like(arrays["params/norm"], np.nan)
    step = steps.write(tmp_path, made, broken)
    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match=r"norm\.weight: there is NaN in it"):
            export(step, tmp_path / precision, made.model, precision)


def test_the_report_is_a_table_of_kinds():
    rows = [
        exporting.Row("routed_expert", "fp4", 3, 2_000_000, quantised.Deviation(10, 1.0, 100.0, 0.5, 2.0)),
        exporting.Row("sink", "fp32", 1, 64, quantised.Deviation(16)),
    ]
    lines = exporting.table(rows).splitlines()
    assert lines[2:] == ["| routed expert | FP4 | 3 | 2.0 | 1.00e-01 | 2.50e-01 |", "| sink | FP32 | 1 | 0.0 | exact | exact |"]
    assert rows[0] + rows[0] == exporting.Row("routed_expert", "fp4", 6, 4_000_000, quantised.Deviation(20, 2.0, 200.0, 0.5, 2.0))
