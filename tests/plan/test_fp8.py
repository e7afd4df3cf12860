"""Products of FP8 codes are found in a program's text by name, and nothing else is taken for them; a step compiled for an H100 has them."""

import importlib.util
import pathlib

import pytest

from v4train import recipe as recipe_lib
from v4train.cli import plan_compile
from v4train.plan import fp8


def call(name, *operands):
    return (
        '  %k = bf16[8,8]{1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={'
        + ", ".join(operands)
        + f'}}, api_version=API_VERSION_TYPED_FFI, metadata={{op_name="jit(step)/{name}/pallas_call"}}\n'
    )


def test_products_are_counted_by_name():
    codes, scales, wide = "f8e4m3fn[8,8]{1,0}", "f32[8,1]{1,0}", "bf16[8,8]{1,0}"
    program = call("fp8_rows", codes, scales, codes, scales) * 2 + call("rows", wide, wide) + call("mixed", codes, wide)
    assert fp8.products(program) == {"fp8_rows": 2}
    library = '%c = custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8"'
    assert fp8.products(library) == {"__cublas$lt$matmul$f8": 1}
    assert fp8.products('custom_call_target="__cublas$lt$matmul"') == {}


@pytest.mark.slow  # a minute, and only where the vendor's compiler is installed (make aot)
def test_the_step_compiled_for_a_gpu_multiplies_the_codes_of_experts():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the vendor's compiler is not installed here: make aot")
    path = pathlib.Path(__file__).parents[2] / "configs/bench/precision.yaml"

    def products(*overrides):
        mesh = ["mesh.emulate_devices=null", "mesh.fsdp=2"]  # of one GPU that is not here, Pallas does not know what it is
        recipe = recipe_lib.resolve(str(path), overrides=[*mesh, *overrides]).config
        return set(plan_compile.run(recipe, target="H100:1x2").fp8)

    assert products() == set()
    assert products("numerics.linear=fp8", "numerics.experts=fp8") == {"fp8_rows_by_matrices", "fp8_rows_by_rows"}
