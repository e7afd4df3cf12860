"""What FP8 changes in a plan, by hand: time only where codes are multiplied, traffic where values are rounded, memory for one product; and
what the indexer's warm-up takes less."""

import dataclasses

import pytest

from tests.plan import small
from v4train.model import flops
from v4train.optim import flops as optim_flops
from v4train.plan import activations, comms, estimate, low_precision, machine, memory, timing, weights
from v4train.sharding import mesh as mesh_lib

KEPT = {kind: activations.Kept(10**6, 4 * 10**6) for kind in ("csa", "hca", "window")}
PERFECT = timing.Assumptions(matmul=1, experts=1, attention=1, indexer=1, fp8=1, memory=1, hidden=1)
LAYERS, D, F, TOP_K, TOKENS = 4, 128, 64, 2, 16 * 256 // 8
# wq_a, wq_b, wkv, wo_a (8 groups), wo_b, and the shared expert's w1, w3, w2: [matrices, in, out]
LINEAR = [(1, D, 64), (1, 64, 256), (1, D, 32), (8, 32, 32), (1, 256, D), (1, D, F), (1, D, F), (1, F, D)]
ROUTED = [(TOP_K, D, F), (TOP_K, D, F), (TOP_K, F, D)]


def recipe(linear="compute", experts="compute", **changes):
    return small.recipe(numerics={"compute": "bfloat16", "linear": linear, "experts": experts} | changes.pop("numerics", {}), **changes)


def planned(r, *, chips="H100x8", assumed=PERFECT):
    shape = next(iter(estimate.shapes_of(r)))
    return estimate.of_phase(r, shape=shape, steps=1, on=machine.parse(chips), assumed=assumed, per_layer=KEPT)


def placed(r):
    return weights.on_mesh(estimate.declarations_of(r), mesh=mesh_lib.abstract(r.mesh))


def units(r, platform):
    return {name: role.units for name, role in low_precision.of(r, platform=platform).items()}


def test_codes_are_multiplied_where_there_is_a_kernel():
    both = recipe("fp8", "mxfp4")
    assert units(recipe(), "gpu") == {"linear": "compute", "experts": "compute"}
    assert units(both, "gpu") == {"linear": "codes", "experts": "codes"}
    assert units(recipe("fp8"), "gpu") == {"linear": "codes", "experts": "compute"}
    assert units(both, "tpu") == units(both, "cpu") == {"linear": "emulated", "experts": "emulated"}
    assert units(recipe("fp8", "fp8", numerics={"emulate": True}), "gpu") == {"linear": "emulated", "experts": "emulated"}


def test_a_chip_without_units_for_codes_is_refused_with_what_does_without():
    with pytest.raises(ValueError, match=r"numerics.experts is fp8, whose kernels are .* --chips has A100: set numerics.emulate=true"):
        estimate.check(recipe(experts="fp8"), on=machine.parse("A100x8"))
    estimate.check(recipe(experts="fp8"), on=machine.parse("B200x8"))
    estimate.check(recipe(experts="fp8"), on=machine.parse("v5px8"))
    estimate.check(recipe(experts="fp8", numerics={"emulate": True}), on=machine.parse("A100x8"))


def test_flops_of_the_roles_by_hand():
    for name, matrices in (("linear", LINEAR), ("experts", ROUTED)):
        by_hand = LAYERS * sum(2 * n * rows * columns for n, rows, columns in matrices)
        assert low_precision.product_flops(placed(recipe()), name, top_k=TOP_K) == by_hand


def test_products_of_codes_take_the_peak_of_fp8_and_emulated_ones_what_they_take_in_bf16():
    bf16, fp8 = planned(recipe()).timing, planned(recipe(experts="fp8")).timing
    routed = 4 * TOKENS * LAYERS * sum(2 * n * rows * columns for n, rows, columns in ROUTED)
    assert bf16.products - fp8.products == pytest.approx(routed * (1 / 989e12 - 1 / 1979e12))
    linear = 4 * TOKENS * LAYERS * sum(2 * n * rows * columns for n, rows, columns in LINEAR)
    assert bf16.products - planned(recipe("fp8")).timing.products == pytest.approx(linear * (1 / 989e12 - 1 / 1979e12))
    assumed = dataclasses.replace(PERFECT, experts=0.5, fp8=0.6)
    slower = planned(recipe(), assumed=assumed).timing.products - planned(recipe(experts="fp8"), assumed=assumed).timing.products
    assert slower == pytest.approx(routed * (1 / (0.5 * 989e12) - 1 / (0.5 * 0.6 * 1979e12)))
    assert planned(recipe("fp8", "fp8", numerics={"emulate": True})).timing.products == bf16.products
    assert planned(recipe("fp8", "fp8"), chips="v5px8").timing.products == planned(recipe(), chips="v5px8").timing.products


def test_traffic_of_rounding_by_hand():
    """Forward twice, the input again by tokens, the output's gradient twice; codes of weights in three passes of two microbatches."""
    bf16 = planned(recipe()).timing.vector * 3.35e12

    def rounded(matrices, each):
        return each * TOKENS * LAYERS * sum(n * (3 * rows + 2 * columns) for n, rows, columns in matrices)

    emulated = planned(recipe("fp8", "fp8", numerics={"emulate": True})).timing.vector * 3.35e12
    assert emulated - bf16 == pytest.approx(rounded(LINEAR + ROUTED, 2 + 2))
    codes = planned(recipe(experts="fp8")).timing.vector * 3.35e12
    code = 2 + 1 + 4 / 128
    assert codes - bf16 == pytest.approx(rounded(ROUTED, code) + 2 * 3 * code * LAYERS * 8 * 3 * D * F)
    codes = planned(recipe("fp8")).timing.vector * 3.35e12
    assert codes - bf16 == pytest.approx(
        rounded(LINEAR, code) + 2 * 3 * code * LAYERS * sum(n * rows * columns for n, rows, columns in LINEAR)
    )


def test_memory_of_one_product_by_hand_and_nothing_more_is_kept():
    one, r = {"width": 2, "tokens": 1000, "rows": 3000}, recipe("fp8", "fp8")
    assert low_precision.product_bytes(placed(r), low_precision.Role("linear", "fp8", "emulated"), **one) == 2 * 1000 * 8 * (32 + 32)
    experts = low_precision.product_bytes(placed(r), low_precision.Role("experts", "fp8", "codes"), **one)
    assert experts == (1 + 4 / 128) * max(3000 * (D + F), 3000 * D + 8 * D * F)
    assert planned(recipe()).memory.parts["rounded"] == 0
    assert planned(r).memory.parts["rounded"] > 0
    place = memory.place_of(recipe(), next(iter(estimate.shapes_of(r))))
    for kind in ("csa", "window"):
        kept = [activations.of_layer(r.model, kind, place=dataclasses.replace(place, compute=x.numerics)) for x in (recipe(), r)]
        assert kept[0].saved == kept[1].saved
        assert kept[1].inside == pytest.approx(kept[0].inside, rel=0.02)


def test_the_plan_says_what_it_assumed():
    on = machine.parse("H100x8")
    assert low_precision.words(recipe(), on=on, platform="gpu", share=0.76) == ""
    told = low_precision.words(recipe(experts="mxfp4"), on=on, platform="gpu", share=0.76)
    assert told == (
        "Low precision: routed experts in FP4 expanded to FP8 by kernels that were never run, at 76% of the shares above of 1,979 TFLOP/s."
    )
    assert low_precision.words(recipe("fp8"), on=on, platform="gpu", share=0.76).startswith(
        "Low precision: projections and shared experts in FP8 by"
    )
    emulated = low_precision.words(recipe("fp8"), on=machine.parse("v5px8"), platform="tpu", share=0.76)
    assert "projections and shared experts in FP8 emulated: multiplied in bfloat16, and rounded before" in emulated


def warm(**changes):
    kinds = small.recipe().model.model_dump()["kinds"]
    kinds[1]["phase"] = "warmup"
    return small.recipe(model={"kinds": kinds}, **changes)


def test_the_warm_up_of_the_indexer_goes_forward_and_back_through_the_indexer_alone():
    found, once = planned(warm()).timing, flops.forward(warm().model, length=256)
    collapse = 2 * 2**2 * D
    indexer = 2 * 2 * (64 * 4 * 32 + D * 4 + 4 * D * 32)  # two layers: queries, weights of heads, keys
    assert flops.indexer(warm().model) == indexer
    passes = 2 * (once.linear - collapse + once.attention) + 2 * indexer + 4 * once.indexer + once.head
    assert found.products == pytest.approx(TOKENS * passes / 989e12)


def test_the_warm_up_of_the_indexer_updates_the_indexer_alone():
    whole, part = planned(small.recipe()), planned(warm())
    moved = {w.path: w.declaration for w in placed(warm()) if "indexer" in w.declaration.tags}
    assert 0 < len(moved) < 12
    assert part.timing.update == optim_flops.update(warm().optimizer, moved)
    sent = [{one.what: 0.0 for one in phase.transfers} for phase in (whole, part)]
    for phase, total in zip((whole, part), sent, strict=True):
        for one in phase.transfers:
            total[one.what] += one.sent
    # Too small to be stored in parts, so their gradients are summed whole, in each of two microbatches.
    assert sent[1]["scatter"] == pytest.approx(2 * 2 * 4 * sum(d.size for d in moved.values()) * 7 / 8)
    assert sent[1]["optimizer"] < 0.2 * sent[0]["optimizer"]
    assert part.timing.optimizer < 0.2 * whole.timing.optimizer
    assert part.memory.parts["optimizer"] == whole.memory.parts["optimizer"], "what the others remember stays"
    assert {one.what for one in part.transfers} <= set(comms.PURPOSES)
