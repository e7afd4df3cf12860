"""The compiler's account of a step as text, and what is refused before anything is compiled."""

import pytest

from v4train import recipe as recipe_lib
from v4train.cli import main, plan_compile
from v4train.plan import buffers, collectives, compile, targets

TARGET = targets.Target("v5p:8x8x8:2", "TPU v5p", "tpu", (8, 8, 8), 2, hbm_bytes=90_000_000_000)


def collective(**changes) -> collectives.Collective:
    one = dict(kind="all-gather", axes=("fsdp", "context"), group=32, times=61, operand_bytes=10, sent_bytes=3_000_000_000)
    return collectives.Collective(**{**one, "largest_array": 10, "shape": "bf16[10]", "op_name": "jit(f)/gather", **changes})


@pytest.fixture
def report() -> compile.Report:
    return compile.Report(
        target=TARGET,
        devices=1024,
        mesh={"replica": 2, "fsdp": 4, "expert": 16, "context": 8, "tensor": 1},
        arguments=20_000_000_000,
        results=1000,
        temporaries=40_000_000_000,
        code=0,
        listing=collectives.Listing((collective(), collective(kind="all-to-all", axes=("expert",), sent_bytes=7, loop="jit(f)/rounds"))),
        replicated={("f32[60,5632,6144]", "jit(f)/concatenate"): 2},
        largest=(buffers.Buffer(8_000_000_000, "f32[512,1024]", "jit(f)/dot_general"),),
        seconds=(10.0, 100.0),
    )


def test_the_table_sets_the_estimate_beside_the_compiler(report):
    lines = plan_compile.table(report, estimate={"total": 66e9, "arguments": 20e9}).splitlines()
    assert "1024 TPU v5p, mesh replica 2 x fsdp 4 x expert 16 x context 8; fits in 90 GB a device" in lines[0]
    rows = {line.split("  ")[1]: line for line in lines if line.startswith("  ")}
    assert rows["total"].split()[1:] == ["60", "GB", "66", "GB", "+10%"]
    assert rows["arguments"].split()[1:] == ["20", "GB", "20", "GB", "+0%"]
    assert rows["temporaries"].split()[1:] == ["40", "GB"]
    assert rows["all-gather"].split()[1:] == ["fsdp", "context", "1", "61", "3", "GB"]
    assert "all-to-all" not in rows
    assert any("each round of jit(f)/rounds" in line for line in lines)
    assert any("f32[60,5632,6144]" in line for line in lines)
    assert any("8 GB" in line and "jit(f)/dot_general" in line for line in lines)


def test_a_mesh_of_another_size_is_refused():
    recipe = recipe_lib.resolve("configs/tiny.yaml", overrides=("mesh.expert=2",)).config
    with pytest.raises(ValueError, match=r"mesh: fsdp 2 x expert 2 needs 4 devices, but there are 8"):
        plan_compile.run(recipe, target="cpu:8")


SMALL = (
    "model.layers=[{pattern: [window]}]",
    "model.mtp=null",
    "model.moe.hash_layers=0",
    "model.image=null",
    "model.audio=null",
    "data.max_patches=0",
)


def test_a_compiler_that_ends_when_values_have_their_places_knows_the_same_bytes():
    recipe = recipe_lib.resolve("configs/tiny.yaml", overrides=(*SMALL, "data.max_audio_frames=0")).config
    early, late = (plan_compile.run(recipe, target="cpu:8", until=until) for until in ("buffers", "code"))
    assert (early.devices, early.mesh) == (8, late.mesh)
    assert (early.arguments, early.code) == (late.arguments, 0)
    assert early.temporaries == pytest.approx(late.temporaries, rel=0.02)
    assert early.listing.totals() == late.listing.totals()
    assert early.largest == late.largest


def test_a_mesh_of_another_size_is_refused_by_the_other_process_too():
    recipe = recipe_lib.resolve("configs/tiny.yaml", overrides=("mesh.expert=2",)).config
    with pytest.raises(ValueError, match=r"mesh: fsdp 2 x expert 2 needs 4 devices, but there are 8"):
        plan_compile.run(recipe, target="cpu:8", until="buffers")


def test_a_target_that_is_none_is_a_message(capsys):
    assert main.main(["plan", "configs/tiny.yaml", "--compile", "--target", "cpu:2x4"]) == 2
    assert "emulated devices are only counted, such as cpu:8" in capsys.readouterr().err
