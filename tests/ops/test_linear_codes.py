"""Projections by kernels of FP8 codes, in Pallas' interpreter, against the emulation: on one device and on meshes that split rows, tokens
and widths; and what a program for a GPU has of them."""

import contextlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v4train.core import param
from v4train.model import product
from v4train.numerics import policy
from v4train.ops import products, select
from v4train.sharding import config as sharding_config
from v4train.sharding import constrain, mesh

# name -> [b, s, *g, d], shape and letters of the weight; widths that `tensor` splits are whole tiles on two devices.
CASES = {
    "whole": ((4, 256, 160), (160, 48), "D R"),
    "cut_off_rows": ((4, 40, 160), (160, 48), "D K"),
    "split_output": ((4, 256, 64), (64, 256), "D F"),
    "split_input": ((4, 256, 256), (256, 64), "F D"),
    "groups": ((4, 256, 2, 160), (2, 160, 48), "G H R"),
    "groups_that_do_not_divide": ((4, 256, 3, 256), (3, 256, 48), "G H R"),
}
MESHES = {"rows": {"fsdp": 2, "replica": 2, "context": 2}, "widths": {"tensor": 2, "expert": 2, "context": 2}}


def weight_of(shape, letters, value):
    return nnx.Param(value, declaration=param.param(shape, letters, param.Normal(1.0), product="linear").get_metadata()["declaration"])


def program(units, letters):
    """Forward and all gradients as one function of arrays: the output, then gradients of the input, the weight and the probe."""

    def run(x, w, dy, probe):
        def of(x, w, probe):
            with select.using("linear_product", implementation=products.Fp8(probe)), select.using("fp8_linear", implementation=units):
                return product.times(x, weight_of(w.shape, letters, w))

        y, pull = jax.vjp(of, x, w, probe)
        return y, *pull(dy)

    return run


def arrays(case):
    of_x, of_w, letters = CASES[case]
    rng = np.random.default_rng(len(case))

    def wide(*shape):
        return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.normal(size=shape) * 2), jnp.float32)

    w = policy.straight_through(wide(*of_w), "fp8")
    return (wide(*of_x), w, wide(*of_x[:-1], of_w[-1]), jnp.zeros(products.PROBE_SHAPE)), letters


def assert_products_agree(found, expected, given):
    """But for the order of sums in fp32: within ``n 2^-23`` of the sums of magnitudes, as of any two orders of n terms. Rounding makes
    products of magnitudes larger by less than a fifth."""
    x, w, dy, _ = (np.abs(np.asarray(a, np.float64)) for a in given)
    g = "g" * (w.ndim - 2)
    sums = (
        np.einsum(f"bs{g}d,{g}df->bs{g}f", x, w),
        np.einsum(f"bs{g}f,{g}df->bs{g}d", dy, w),
        np.einsum(f"bs{g}d,bs{g}f->{g}df", x, dy),
    )
    terms = (w.shape[-2], w.shape[-1], x.shape[0] * x.shape[1])
    for name, a, b, most, n in zip(("y", "dx", "dw"), found, expected, sums, terms, strict=False):
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert np.all(error <= 1.2 * n * 2.0**-23 * most + 1e-30), (name, (error / most).max())
        assert np.abs(np.asarray(b)).max() > 0
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_one_device(case):
    given, letters = arrays(case)
    expected = jax.jit(program("emulated", letters))(*given)
    assert_products_agree(jax.jit(program("fp8_interpreted", letters))(*given), expected, given)


@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("case", ["whole", "split_output", "split_input", "groups", "groups_that_do_not_divide"])
def test_meshes(case, layout):
    """Rows of the batch, tokens and widths on 8 devices: the numbers of the emulation on one."""
    given, letters = arrays(case)
    expected = jax.jit(program("emulated", letters))(*given)
    with constrain.on_mesh(mesh.make(sharding_config.MeshConfig(**MESHES[layout]))):
        found = jax.jit(program("fp8_interpreted", letters))(*given)
    assert_products_agree(found, expected, given)


def test_shards_of_widths_that_are_no_whole_tiles():
    """96 of 192 outputs a device. Codes of weights are exact in other blocks too, and tiles along tokens are the same: only the gradient of
    the input has other tiles, each of its factors rounded by half a step of E4M3 at most, like the emulation's."""
    x, w, dy = (jnp.asarray(np.random.default_rng(6).normal(size=shape), jnp.float32) for shape in ((4, 256, 64), (64, 192), (4, 256, 192)))
    given = x, policy.straight_through(w, "fp8"), dy, jnp.zeros(products.PROBE_SHAPE)
    expected = jax.jit(program("emulated", "D F"))(*given)
    with constrain.on_mesh(mesh.make(sharding_config.MeshConfig(**MESHES["widths"]))):
        found = jax.jit(program("fp8_interpreted", "D F"))(*given)
    assert_products_agree((found[0], expected[1], *found[2:]), expected, given)
    error = np.abs(found[1] - expected[1])
    assert error.max() > 0
    assert np.all(error <= 2 * 2.0**-4 * np.einsum("bsf,df->bsd", np.abs(dy), np.abs(given[1])) + 1e-3)


def lowered(units, case, *, platform, **axes):
    """The program's text for a mesh of devices that are not here."""
    (x, w, dy, probe), letters = arrays(case)
    structs = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in (x, w, dy)]
    extra = {"platform": "cuda"} if "platform" in inspect.signature(jax.sharding.AbstractDevice).parameters else {}
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, **extra)
    one = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with contextlib.ExitStack() as entered:
        if axes:
            entered.enter_context(constrain.on_mesh(mesh.abstract(sharding_config.MeshConfig(**axes))))
        elif platform == "cuda":
            entered.enter_context(jax.sharding.use_abstract_mesh(one))
        return jax.jit(program(units, letters)).trace(*structs, probe).lower(lowering_platforms=(platform,)).as_text()


KERNELS = ["fp8_rows_by_matrices", "fp8_rows_by_matrices", "fp8_rows_by_rows"]


@pytest.mark.parametrize("case", ["whole", "groups"])
def test_a_program_for_one_gpu_has_three_kernels_and_no_other_product(case):
    text = lowered(select.implementation("fp8_linear", platform="gpu"), case, platform="cuda")
    assert re.findall(r'name = "(fp8_\w+)"', text) == KERNELS
    calls = [line for line in text.splitlines() if "triton_kernel_call" in line or "xla.gpu.triton" in line]
    assert len(calls) == 3
    assert all(call.split(" : (")[-1].count("f8E4M3FN") == 2 for call in calls), "both factors are codes"
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(("case", "sums"), [("whole", 1), ("split_output", 2), ("split_input", 2)])
def test_on_a_mesh_of_gpus_each_multiplies_its_shard_and_sums_what_was_split(case, sums):
    of_x, (d, f), letters = CASES[case]
    text = lowered("fp8_triton", case, platform="cuda", fsdp=2, context=2, tensor=2)
    assert re.findall(r'name = "(fp8_\w+)"', text) == KERNELS
    assert text.count("stablehlo.all_reduce") == sums
    assert "stablehlo.dot_general" not in text
    into, out = d // (1 + letters.startswith("F")), f // (1 + letters.endswith("F"))
    assert f"tensor<{of_x[0] // 2 * of_x[1] // 2}x{into}xf8E4M3FN>, " in text
    assert f"tensor<1x{into}x{out}xf8E4M3FN>" in text


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_projections_are_left_to_the_partitioner(platform):
    text = lowered(select.implementation("fp8_linear", platform=platform), "split_input", platform=platform, fsdp=4, tensor=2)
    assert text.count("stablehlo.dot_general") == 3
    assert not re.search(r"manual_computation|all_reduce|custom_call|f8E4M3", text)
