"""FP8 instructions are found in PTX by kernel, and nothing else is taken for them. The compiled step: with a vendor's compiler."""

import importlib.util
import pathlib

import pytest

from v4train import recipe as recipe_lib
from v4train.cli import plan_compile
from v4train.plan import fp8

PTX = """
.visible .entry fp8_rows_by_matrices(
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1}, %rd1, %rd2, p, 1, 1;
	wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1}, %rd1, %rd2, p, 1, 1;
	cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2;
.visible .entry loop_fusion(
	cvt.rn.f16x2.e4m3x2 %r1, %rs1;
.visible .entry bf16_rows(
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
.visible .entry older(
	mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%f1}, {%r1}, {%r2}, {%f1};
"""


def test_instructions_are_counted_by_kernel(tmp_path):
    (tmp_path / "module_0001.ptx").write_text(PTX)
    assert fp8.kernels(tmp_path, program="") == {"fp8_rows_by_matrices": 2, "older": 1}
    call = '%c = custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8"'
    assert fp8.kernels(tmp_path / "empty", program=call) == {"__cublas$lt$matmul$f8": 1}
    assert fp8.kernels(tmp_path / "empty", program='custom_call_target="__cublas$lt$matmul"') == {}


@pytest.mark.slow  # a minute, and only where the vendor's compiler is installed (make aot)
def test_the_step_compiled_for_an_h100_multiplies_experts_in_fp8_units():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the vendor's compiler is not installed here: make aot")
    path = pathlib.Path(__file__).parents[2] / "configs/bench/precision.yaml"

    def kernels(*overrides):
        found = plan_compile.run(recipe_lib.resolve(str(path), overrides=overrides).config, target="H100:1x1").fp8
        return {next((name for name in ("fp8_rows_by_matrices", "fp8_rows_by_rows") if name in kernel), kernel) for kernel in found}

    assert kernels() == set()
    assert kernels("numerics.linear=fp8", "numerics.experts=fp8") == {"fp8_rows_by_matrices", "fp8_rows_by_rows"}
