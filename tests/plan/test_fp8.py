"""Products of FP8 codes are found in a program's text by name, and nothing else is taken for them; a step lowered for GPUs and one compiled
for an H100 have them."""

import collections
import importlib.util
import pathlib
import re

import pytest

from v4train import recipe as recipe_lib
from v4train.cli import plan_compile
from v4train.ops import select
from v4train.plan import fp8
from v4train.sharding import mesh as mesh_lib
from v4train.train import build

PRECISION = pathlib.Path(__file__).parents[2] / "configs/bench/precision.yaml"


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


@pytest.mark.slow  # 10 s of a core
def test_a_step_for_gpus_multiplies_the_codes_of_every_projection():
    """Two layers of eight: forward, and two gradients each. Nothing is compiled."""
    overrides = ["mesh.emulate_devices=null", "mesh.fsdp=2", "mesh.tensor=2", "numerics.linear=fp8"]
    recipe = recipe_lib.resolve(str(PRECISION), overrides=overrides).config
    abstract = build.abstract(recipe, mesh=mesh_lib.abstract(recipe.mesh))
    with select.compiling_for("gpu"):
        text = build.trace_step(abstract, abstract.variant_at(0)).lower(lowering_platforms=("cuda",)).as_text()
    found = collections.Counter(re.findall(r'name = "(fp8_\w+)"', text))
    assert found == {"fp8_rows_by_matrices": 2 * 2 * 8, "fp8_rows_by_rows": 2 * 8}


@pytest.mark.slow  # a minute, and only where the vendor's compiler is installed (make aot)
def test_the_step_compiled_for_a_gpu_multiplies_codes():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the vendor's compiler is not installed here: make aot")

    def products(*overrides):
        mesh = ["mesh.emulate_devices=null", "mesh.fsdp=2"]  # of one GPU that is not here, Pallas does not know what it is
        recipe = recipe_lib.resolve(str(PRECISION), overrides=[*mesh, *overrides]).config
        return set(plan_compile.run(recipe, target="H100:1x2").fp8)

    assert products() == set()
    assert products("numerics.linear=fp8") == products("numerics.experts=fp8") == {"fp8_rows_by_matrices", "fp8_rows_by_rows"}
