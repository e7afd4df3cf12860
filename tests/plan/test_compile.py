"""What is said of a program that was compiled for a machine that is not here: against sizes known by hand, on emulated devices."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4train import recipe as recipe_lib
from v4train.ops import select
from v4train.plan import buffers, compile, targets
from v4train.sharding import mesh as mesh_lib
from v4train.train import build


@pytest.mark.parametrize(
    ("text", "chip", "platform", "shape", "slices"),
    [
        ("v5p:8x8x8", "TPU v5p", "tpu", (8, 8, 8), 1),
        ("V5P:8x8x8:2", "TPU v5p", "tpu", (8, 8, 8), 2),
        ("tpu7x:4x4x8", "TPU7x", "tpu", (4, 4, 8), 1),
        ("h100:64x8", "H100", "gpu", (64, 8), 1),
        ("H200:8x8x8", "H200", "gpu", (8, 8, 8), 1),
        ("cpu:8", "CPU", "cpu", (8,), 1),
    ],
)
def test_targets(text, chip, platform, shape, slices):
    target = targets.parse(text)
    assert (target.chip, target.platform, target.shape, target.slices) == (chip, platform, shape, slices)
    assert target.hbm_bytes > 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", "expected KIND:SHAPE"),
        ("v5p:8x8x8*2", "expected KIND:SHAPE"),
        ("H101:8x8", "there is no chip 'H101'.*nearest: H100"),
        ("A100:8x8", "nothing can be compiled for A100 without one; there are descriptions of v4, v5p"),
        ("H100:512", "GPUs are HOSTSxGPUS"),
        ("H100:8x8:2", "GPUs are HOSTSxGPUS"),
        ("v5p:8x0x8", "every number must be at least 1"),
        ("cpu:2x4", "emulated devices are only counted, such as cpu:8"),
    ],
)
def test_targets_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        targets.parse(text)


def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for text, extra in (("v5p:8x8x8", "aot-tpu"), ("H100:64x8", "aot-gpu")):
        with pytest.raises(ValueError, match=rf"pip install 'v4train\[{extra}\]'"):
            targets.devices(targets.parse(text))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def report(mesh):
    """``x @ x.T`` of 1024 x 512 in 8 parts, contracted over `tensor`: the partial product [512, 1024] is the largest in between."""
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))
    y = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))

    def lower():
        assert select.implementation("grouped_matmul") == select.TABLE["grouped_matmul"]["cpu"]
        return jax.jit(lambda x, y: (jnp.sort(x @ x.T, axis=1).sum(), y + 1), donate_argnums=1).lower(x, y)

    return compile.ahead_of_time(targets.parse("cpu:8"), mesh=mesh, lower=lower)


def test_bytes_are_those_of_the_shards(report):
    assert report.arguments == 1024 * 512 * 4 // 8 + 512 * 1024 * 4
    assert report.results < 1024  # y + 1 lies where y was
    assert 512 * 1024 * 4 <= report.temporaries < 5 * 512 * 1024 * 4
    assert report.total == report.arguments + report.results + report.temporaries + report.code


def test_collectives_are_listed_by_axis(report):
    sent = {axes: n for (_, axes), n in ((key, total.sent_bytes) for key, total in report.listing.totals().items()) if n > 1000}
    assert sent[("fsdp",)] >= 1024 * 512 * 4 // 8
    assert sent[("tensor",)] >= 512 * 1024 * 4
    assert report.mesh == {"fsdp": 2, "tensor": 4}


def test_the_largest_buffers_are_named_and_do_not_overlap(report):
    assert report.largest[0].size == 512 * 1024 * 4
    assert "dot_general" in report.largest[0].op_name or "sort" in report.largest[0].op_name
    assert sum(buffer.size for buffer in report.largest) <= report.temporaries


def test_what_does_not_fit_is_an_error_with_its_causes(report):
    report.check()
    small = targets.Target("toy:8", "toy", "cpu", (8,), 1, hbm_bytes=report.total - 1)
    tight = compile.Report(**{**vars(report), "target": small})
    assert (report.fits, tight.fits) == (True, False)
    with pytest.raises(ValueError, match=r"(?s)does not fit: toy:8 has 0.00\d+ GB.*f32\[512,1024\]"):
        tight.check()


def test_json_holds_the_same(report):
    values = report.as_json()
    assert values["bytes"]["total"] == report.total
    assert sum(row["sent_bytes"] for row in values["collectives"]) == sum(report.listing.bytes_by_axes().values())
    assert values["fits"] is True


def test_arrays_that_the_partitioner_replicates_are_collected():
    line = (
        "W1122 05:13:18 6754 spmd_partitioner.cc:666] [SPMD] Involuntary full rematerialization. The compiler cannot go from sharding "
        "{x} to {y} efficiently for HLO operation %concatenate.4 = f32[60,5632,6144]{2,1,0} concatenate(%a, %b), sharding={x}, "
        'metadata={op_name="jit(f)/cat:z"}'
    )
    assert compile._replicated([line, "something else", line]) == {("f32[60,5632,6144]", "jit(f)/cat"): 2}


def test_what_the_compiler_says_on_stderr_is_passed_on(capfd):
    told = []
    with compile._listening(told):
        os.write(2, b"a warning\n")
    assert told == ["a warning"]
    assert capfd.readouterr().err == "a warning\n"


def test_buffers_cover_the_block_with_the_largest_that_do_not_overlap():
    assignment = """BufferAssignment:
allocation 0: size 400, page 0, parameter 0, shape |f32[100]| at ShapeIndex {}:
 value: <1 x @0> (size=400,offset=0): f32[100]{0}
allocation 1: size 40, page 0, maybe-live-out:
 value: <2 out @0> (size=40,offset=0): f32[10]{0}
allocation 2: size 9999, color 1, page 0, preallocated-temp:
 value: <3 elsewhere @1> (size=9999,offset=0): f32[10]{0:S(1)}
allocation 3: size 1000, page 0, preallocated-temp:
 value: <4 early @0> (size=600,offset=0): f32[150]{0}
 value: <5 later{0} @0> (size=500,offset=100): bf16[250]{0:T(8,128)}
 value: <6 beside @0> (size=400,offset=600): f32[100]{0}
"""
    program = '  %early = f32[150]{0} add(%a, %b), metadata={op_name="jit(f)/add:jit(f)/x"}\n  %beside = f32[100]{0} copy(%early)\n'
    account = buffers.read(assignment, program=program)
    assert (account.arguments, account.results, account.temporaries) == (400, 40, 1000)
    assert account.largest == (buffers.Buffer(600, "f32[150]", "jit(f)/add"), buffers.Buffer(400, "f32[100]", "beside"))


@pytest.mark.parametrize(
    ("platform", "lowered_for", "overrides"),
    [
        ("tpu", "tpu", ()),
        pytest.param("gpu", "cuda", ("model.layers=[{pattern: [csa], repeat: 59}]", "model.mtp=null"), marks=pytest.mark.slow),  # 15 s more
    ],
)
def test_the_trillion_parameter_step_lowers_for_a_machine_that_is_not_here(platform, lowered_for, overrides):
    """On a mesh without devices, with that platform's experts; nothing is compiled."""
    recipe = recipe_lib.resolve("configs/v4_1t.yaml", overrides=overrides).config
    abstract = build.abstract(recipe, mesh=mesh_lib.abstract(recipe.mesh))
    with select.compiling_for(platform):
        lowered = build.trace_step(abstract, abstract.variant_at(0)).lower(lowering_platforms=(lowered_for,))
    text = lowered.as_text()
    assert f"mhlo.num_partitions = {recipe.mesh.devices}" in text
    assert ("ragged_all_to_all" in text, "triton" in text) == {"tpu": (True, False), "gpu": (False, True)}[platform]
