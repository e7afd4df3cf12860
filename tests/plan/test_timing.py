"""Time of a step: its parts by hand, and what it must and must not depend on."""

import dataclasses

import pytest

from tests.plan import small
from v4train import recipe as recipe_lib
from v4train.model import flops
from v4train.plan import activations, estimate, machine, timing, weights
from v4train.sharding import mesh as mesh_lib

KEPT = {kind: activations.Kept(10**6, 4 * 10**6) for kind in ("csa", "hca", "window")}
PERFECT = timing.Assumptions(matmul=1, experts=1, attention=1, indexer=1, memory=1, hidden=1)


def times(recipe, *, chips="H100x8", assumed=PERFECT) -> timing.Timing:
    shape = next(iter(estimate.shapes_of(recipe)))
    return estimate.of_phase(recipe, shape=shape, steps=1, on=machine.parse(chips), assumed=assumed, per_layer=KEPT).timing


def test_products_of_a_perfect_chip_are_the_credited_flops_and_recomputation():
    """Four passes instead of three through every layer; the selection of a sparse layer is kept, so the indexer scores twice."""
    recipe = small.recipe(mesh={"fsdp": 8})
    found, once = times(recipe), flops.forward(recipe.model, length=256)
    collapse = 2 * recipe.model.hyper.streams**2 * recipe.model.hidden
    passes = 4 * (once.linear - collapse + once.attention + once.head) + 2 * once.indexer
    assert found.products == pytest.approx(16 * 256 / 8 * passes / 989e12)


def test_vector_work_of_a_window_layer_by_hand():
    """Of a model of one: streams read and written four times a pass, logits of attention, heads' outputs, rows of experts; weights once."""
    recipe = small.recipe(mesh={"fsdp": 8}, model={"layers": [{"pattern": ["window"]}]})
    width, passes, tokens = 4, 4, 16 * 256 / 8
    streams = 2 * 4 * 2 * 128 * width
    attention = 4 * 4 * 8 * 16 + 4 * 8 * 32 * width
    experts = 2 * (4 * 128 + 6 * 64) * width
    placed = weights.on_mesh(estimate.declarations_of(recipe), mesh=mesh_lib.abstract(recipe.mesh))
    used = sum(w.used for w in placed if w.declaration.trained)
    moved = passes * (streams + attention + experts) * tokens + 2 * passes * width * used
    assert times(recipe).vector == pytest.approx(moved / 3.35e12)


def test_mfu_is_credit_over_time_and_peak():
    recipe = small.recipe(mesh={"fsdp": 8})
    found = times(recipe)
    credit = 16 * 256 * flops.training(recipe.model, length=256).total
    assert found.flops == pytest.approx(credit)
    assert found.mfu == pytest.approx(credit / (8 * 989e12 * found.step))
    assert found.step == pytest.approx(found.products + found.vector + found.exposed + found.optimizer)


def test_no_mfu_is_above_the_share_that_is_assumed_of_products():
    for name, chips in (("v4_1t", "H100x512"), ("v4_flash", "H200x128")):
        recipe = recipe_lib.resolve(f"configs/{name}.yaml").config
        shape = next(iter(estimate.shapes_of(recipe)))
        found = estimate.of_phase(
            recipe, shape=shape, steps=1, on=machine.parse(chips), assumed=timing.Assumptions(), per_layer=KEPT
        ).timing
        assert 0.02 < found.mfu < 0.7 * 3 / 4


def test_parameters_travel_behind_products_and_tokens_do_not():
    recipe = small.recipe(mesh={"fsdp": 2, "expert": 4})
    found = times(recipe)
    weights = found.network["gather"] + found.network["scatter"]
    assert found.exposed == pytest.approx(max(0.0, weights - found.products) + found.network["experts"])
    nothing = times(recipe, assumed=dataclasses.replace(PERFECT, hidden=0))
    assert nothing.exposed == pytest.approx(weights + found.network["experts"])


def test_newton_schulz_in_fp32_is_slower_and_is_done_once_a_matrix():
    fast, slow = small.recipe(optimizer=_muon("bfloat16")), small.recipe()
    assert times(slow).optimizer > times(fast).optimizer
    recipe = recipe_lib.resolve("configs/v4_1t.yaml").config
    shape = next(iter(estimate.shapes_of(recipe)))
    found = estimate.of_phase(recipe, shape=shape, steps=1, on=machine.parse("H100x512"), assumed=PERFECT, per_layer=KEPT).timing
    n, m, matrices, steps = 2560, 5632, 3 * 384 * 60, 10  # the experts are nearly all of it
    by_hand = matrices / 512 * steps * (4 * n * n * m + 2 * n**3) * 15 / 989e12
    assert by_hand < found.optimizer < 1.5 * by_hand


def _muon(dtype: str) -> dict:
    return {"schedule": small.recipe().optimizer.schedule.model_dump(), "muon": {"ns_dtype": dtype}}


def test_more_tokens_a_device_take_longer_in_proportion():
    short, long = (times(small.recipe(train={"batch_rows": rows})) for rows in (16, 32))
    assert long.products == pytest.approx(2 * short.products)
    assert long.optimizer == pytest.approx(short.optimizer)
