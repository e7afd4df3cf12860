"""The plan of a run whose attention and batches change: which parts it has, and that each is planned as a recipe of its own would be."""

import pytest

from tests.plan import small
from v4train.model import flops
from v4train.plan import estimate, machine, search

PHASES = [{"from_step": 4, "sequence_length": 512, "batch_rows": 16}]
STAGES = [
    {"from_step": 2, "mtp_weight": 0.1},
    {"from_step": 4, "attention": "warmup"},
    {"from_tokens": 4 * 4096 + 2 * 8192, "attention": "sparse"},
    {"from_step": 20, "attention": "dense"},
]
DATA = {"sequence_length": 256, "sources": [{"name": "none", "path": "none", "weight": 1}]}


def course(**changes):
    kinds = small.recipe().model.model_dump()["kinds"]
    kinds[1]["phase"] = "dense"
    model = small.recipe().model.model_dump() | {"kinds": kinds, "mtp": {"loss_weight": 0.3}}
    return small.recipe(model=model, data=DATA | {"phases": PHASES}, train={"steps": 9, "stages": STAGES} | changes)


def test_a_part_for_each_shape_and_attention_with_its_steps():
    parts = estimate.parts_of(course())
    assert [(part.shape[:2], part.attention, steps) for part, steps in parts.items()] == [
        ((16, 256), "dense", 4),
        ((16, 512), "warmup", 2),
        ((16, 512), "sparse", 3),
    ]
    assert estimate.shapes_of(course()) == {next(iter(parts)).shape: 4, list(parts)[1].shape: 5}
    assert sum(estimate.parts_of(course(steps=3)).values()) == 3
    with_end = estimate.parts_of(course(steps=30))
    assert [(part.attention, steps) for part, steps in with_end.items()] == [("dense", 4), ("warmup", 2), ("sparse", 14), ("dense", 10)]


def test_each_part_is_planned_as_the_recipe_in_its_stage():
    recipe, on = course(), machine.parse("H100x8")
    plan = estimate.estimate(recipe, on=on)
    assert plan.bill.tokens == 4 * 4096 + 5 * 8192
    for phase in plan.phases:
        kinds = [k.model_copy(update={"phase": phase.attention}) if k.kind == "csa" else k for k in recipe.model.kinds]
        alone = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kinds": tuple(kinds)})})
        expected = estimate.of_phase(alone, shape=phase.shape, steps=phase.steps, on=on, assumed=plan.assumed)
        assert (phase.timing, phase.memory) == (expected.timing, expected.memory)
        per_token = flops.training(alone.model, length=phase.shape.sequence_length).total
        assert phase.timing.flops == pytest.approx(per_token * phase.shape.places)
    warm, sparse = plan.phases[1:]
    assert warm.timing.flops < sparse.timing.flops, "only the indexer is differentiated"
    assert plan.main is sparse


def test_the_search_ranks_meshes_by_the_part_with_most_tokens():
    best = search.ranked(course(), on=machine.parse("H100x8"), top=1)[0]
    assert (best.phase.attention, best.phase.shape.sequence_length, best.phase.steps) == ("sparse", 512, 3)
    worst = estimate.estimate(best.recipe, on=machine.parse("H100x8")).worst
    assert worst.attention == "warmup"
    assert best.total == pytest.approx(worst.memory.total, rel=1e-3), "what is too large is another part"
    assert best.total > best.phase.memory.total
