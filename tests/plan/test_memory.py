"""Bytes on a device: closed forms of the parts, and the compiler's figures for whole steps."""

import math

import pytest

from tests.plan import small
from v4train import recipe as recipe_lib
from v4train.core import hardware
from v4train.plan import activations, compile, estimate, exchange, machine, memory, timing

KEPT = {kind: activations.Kept(10**6, 4 * 10**6) for kind in ("csa", "hca", "window")}


def shape_of(recipe):
    return next(iter(estimate.shapes_of(recipe)))


def phase(recipe, *, per_layer=None, platform="cpu") -> estimate.Phase:
    on = machine.Machine("H100", hardware.CHIPS["H100"], recipe.mesh.devices)
    assumed = timing.Assumptions()
    return estimate.of_phase(recipe, shape=shape_of(recipe), steps=1, on=on, assumed=assumed, platform=platform, per_layer=per_layer)


def test_a_trillion_parameters_and_their_state_are_spread_over_512_devices():
    recipe = recipe_lib.resolve("configs/v4_1t.yaml").config
    parts = phase(recipe, per_layer=KEPT, platform="gpu").memory.parts
    everything = 997_431_773_463 + 16_926_070_427
    assert parts["parameters"] == pytest.approx(4 * everything / 512, rel=0.002)
    assert parts["gradients"] == parts["parameters"]
    assert parts["optimizer"] == pytest.approx(parts["parameters"], rel=0.005), "Adam's second moment is for 0.15% of them"
    assert parts["copies"] == pytest.approx(parts["parameters"], rel=0.005), "2 + 2 bytes"


def test_streams_are_kept_once_a_layer():
    recipe = recipe_lib.resolve("configs/v4_1t.yaml").config
    parts = phase(recipe, per_layer=KEPT, platform="gpu").memory.parts
    tokens, layers = 65_536 // 16, 59
    assert parts["streams"] == tokens * 4 * 5632 * 2 * (layers + 2), "the MTP block is a layer, and its input is another array"


@pytest.mark.parametrize(
    ("changes", "part", "factor"),
    [
        (("train.microbatches=24",), "streams", 2),
        (("mesh.fsdp=4", "mesh.context=8", "train.microbatches=24"), "streams", 2),
        (("mesh.fsdp=1", "mesh.replica=2"), "parameters", 2),
        (("mesh.context=8", "mesh.tensor=2"), "logits", 0.55),
        (("mesh.context=8", "mesh.tensor=2"), "parameters", 1),
    ],
    ids=str,
)
def test_parts_follow_the_mesh_and_the_microbatches(changes, part, factor):
    base, other = (recipe_lib.resolve("configs/v4_1t.yaml", overrides=overrides).config for overrides in ((), changes))
    one, two = (phase(r, per_layer=KEPT, platform="gpu").memory.parts[part] for r in (base, other))
    assert two / one == pytest.approx(factor, rel=0.05)


def test_the_moment_is_the_worst_and_the_total_is_of_it():
    found = phase(small.recipe(), per_layer=KEPT).memory
    sums = {name: sum(found.parts[cause] for cause in causes) for name, causes in memory.MOMENTS.items()}
    assert sums[found.moment] == max(sums.values())
    state = sum(found.parts[cause] for cause in ("parameters", "optimizer", "tables", "gradients"))
    assert found.total == pytest.approx(state + sums[found.moment])
    assert set(found.parts) == set(memory.CAUSES)


def test_room_for_routed_rows():
    def rows(**setting):
        recipe = small.recipe(mesh={"fsdp": 1, "expert": 8}, model=_model(setting))
        return exchange.of(recipe, platform="tpu", tokens=512)

    assert rows(transport="ragged", capacity=None).rows == 8 * 512 * 2, "every slot may go to one device"
    assert rows(transport="padded", capacity=1.25).rows == 8 * math.ceil(1.25 * 512 * 2 / 8)
    assert rows(transport="padded", capacity=1.25, waves=2).rows == 8 * math.ceil(1.25 * 256 * 2 / 8)
    assert rows(transport="ragged", capacity=2).sent == 2 * 512 * 2 * 7 / 8 * 128 * 4, "only what is routed, there and back"
    assert rows(transport="padded", capacity=2).sent == 2 * rows(transport="ragged", capacity=2).sent
    assert rows(transport="gathered", capacity=2).sent == 7 * 512 * 128 * (4 + 4)
    assert exchange.of(small.recipe(), platform="tpu", tokens=512).sent == 0


def test_buffers_of_the_exchange_by_hand():
    """Rows as they come and as they go, gate, up and their product, each with its gradient; and a slot's row on the way there and back."""
    recipe = small.recipe(mesh={"fsdp": 1, "expert": 8}, model=_model({"transport": "padded", "capacity": 1.25}))
    rows, slots, d, f = 8 * math.ceil(1.25 * 512 * 2 / 8), 512 * 2, 128, 64
    assert exchange.of(recipe, platform="gpu", tokens=512).bytes == 4 * (2 * rows * (2 * d + 3 * f) + 2 * slots * d)


def test_the_loss_by_hand():
    """Scores, their exponentials and their gradient of one chunk in fp32; the head and its gradient; the hidden states and theirs."""
    recipe = small.recipe(mesh={"fsdp": 8}, model={"loss_chunk": 64})
    parts = phase(recipe, per_layer=KEPT).memory.parts
    assert parts["logits"] == 3 * 4 * 64 * 512 + 2 * 4 * 512 * 128 + 2 * 4 * 256 * 128


def _model(setting) -> dict:
    values = small.recipe().model.model_dump(mode="json")
    values["moe"]["exchange"] = setting
    return values


def test_evaluation_would_cache_the_entries_of_all_layers():
    recipe = small.recipe()
    per_layer = {"csa": 16 * 32 + 64 * (32 + 32), "hca": 16 * 32 + 16 * 32}  # window, entries, and index keys of 32
    assert phase(recipe, per_layer=KEPT).memory.evaluation == 1 * 2 * sum(per_layer.values()) * 4


@pytest.mark.slow  # compiles training steps, minutes each on a busy machine
@pytest.mark.parametrize("name", ["tiny", "v4_1b"])
def test_within_15_percent_of_the_compiler(name):
    from v4train.cli import plan_compile

    overrides = {"tiny": (), "v4_1b": ("numerics.compute=float32", "model.moe.exchange.transport=padded")}[name]
    recipe = recipe_lib.resolve(f"configs/{name}.yaml", overrides=overrides).config
    told: compile.Report = plan_compile.run(recipe, target="cpu:8")
    ours = phase(recipe).memory
    assert ours.state == pytest.approx(told.arguments, rel=0.01)
    assert ours.total == pytest.approx(told.arguments + told.temporaries, rel=0.15)


@pytest.mark.parametrize("name, each", [("scale_by_lion", 4), ("scale_by_adam", 8), ("identity", 0)])
def test_the_state_of_named_transforms_is_what_optax_keeps(name, each):
    schedule = {"peak_lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 0, "decay_steps": 0}
    recipe = small.recipe(optimizer={"kind": "optax", "transforms": [{"name": name}], "schedule": schedule})
    parts = phase(recipe, per_layer=KEPT).memory.parts
    assert parts["optimizer"] == pytest.approx(each / 4 * parts["parameters"], rel=1e-3, abs=100)
    assert parts["newton_schulz"] == 0
