"""Stages: what they resolve to, which past a run may have, and a run through all of them, killed in none, some and each."""

import pytest

from tests.train import tiny
from v4train.core import param
from v4train.model import transformer
from v4train.optim import flops
from v4train.train import build, stages

STAGES = (
    {"from_step": 2, "attention": "warmup"},
    {"from_tokens": 4 * 512, "attention": "sparse"},
    {"from_step": 6, "mtp_weight": 0.1},
)
LONGER = {"from_step": 4, "sequence_length": 128, "batch_rows": 4}


def recipe(data, *, changes=STAGES, phases=(LONGER,), phase="dense"):
    kinds = [{"kind": "window"}, {"kind": "csa", "ratio": 4, "index_heads": 2, "index_head_dim": 8, "top_k": 4, "phase": phase}]
    kinds.append({"kind": "hca", "ratio": 8})
    return tiny.recipe(data, model={"kinds": kinds}, data={"phases": phases}, train={"steps": 8, "stages": changes})


def course(data, **changes):
    r = recipe(data, **changes)
    return r.train.course(model=r.model, phases=r.data.schedule(batch_rows=r.train.batch_rows))


def test_what_a_stage_does_not_name_stays(data):
    found = course(data)
    assert found.first_steps == (0, 2, 4, 6)
    expected = [("dense", 0.3)] * 2 + [("warmup", 0.3)] * 2 + [("sparse", 0.3)] * 2 + [("sparse", 0.1)] * 2
    assert [tuple(found.at(step)) for step in range(8)] == expected
    assert found.at(10**9) == ("sparse", 0.1)


@pytest.mark.parametrize("tokens", [1, 512, 513, 2047, 2048, 2049, 2560, 2561, 9999])
def test_tokens_mean_the_step_that_they_mean_in_the_data(data, tokens):
    """By the definition, a step at a time; and as `data.phases` has it."""
    shapes = [(8, 64)] * 4 + [(4, 128)] * 40
    first = next(step for step in range(44) if sum(rows * length for rows, length in shapes[:step]) >= tokens)
    assert course(data, changes=({"from_tokens": tokens, "mtp_weight": 0.0},)).first_steps == (0, first)
    in_data = recipe(data, phases=({"from_tokens": tokens, "max_patches": 7},)).data.schedule(batch_rows=8).phases
    assert in_data[1].first_step == first


def test_a_model_in_a_stage_differs_in_what_the_stage_says_and_declares_the_same(data):
    r = recipe(data)
    declared = param.declarations(transformer.Transformer(r.model))
    for stage in course(data).stages:
        model = stage.model(r.model)
        assert stages.Stage.of(model) == stage
        assert model.kind("csa").phase == stage.attention
        assert model.mtp.loss_weight == stage.mtp_weight
        assert stages.Stage.of(r.model).model(model) == r.model
        assert param.declarations(transformer.Transformer(model)) == declared
    past = course(data).history(5)
    assert r.model.after(past) == course(data).at(4).model(r.model) != r.model
    assert r.model.after(()) is r.model
    assert stages.Stage("warmup", 0.3).evaluated == stages.Stage("dense", 0.1).evaluated != stages.Stage("sparse", 0.3).evaluated


def test_the_past_is_what_was_trained_and_another_one_is_named(data):
    found = course(data)
    assert found.history(0) == []
    assert found.history(3) == [
        {"from_step": 0, "until_step": 2, "attention": "dense", "mtp_weight": 0.3},
        {"from_step": 2, "until_step": 3, "attention": "warmup", "mtp_weight": 0.3},
    ]
    assert course(data, changes=STAGES[:2]).history(6) == found.history(6)
    assert course(data, changes=STAGES[:2]).history(7) != found.history(7)
    nothing_new = (*STAGES[:1], {"from_step": 3, "mtp_weight": 0.3}, *STAGES[1:])
    assert course(data, changes=nothing_new).history(8) == found.history(8)
    later = course(data, changes=({"from_step": 3, "attention": "warmup"}, *STAGES[1:])).history(8)
    assert stages.differences(found.history(8), later) == ["steps 2 to 3: attention warmup in the checkpoint, dense now"]
    assert stages.differences(found.history(8), course(data, changes=STAGES[:2]).history(8)) == [
        "steps 6 to 8: mtp_weight 0.1 in the checkpoint, 0.3 now"
    ]
    assert stages.unchanging(recipe(data).model, step=2) == found.history(2)


def test_the_variant_of_a_step_is_its_shape_and_its_stage(data):
    parts = build.parts(recipe(data))
    found = [parts.variant_at(step) for step in range(8)]
    assert [(v.shape[:2], *v.stage) for v in found] == [
        *[((8, 64), "dense", 0.3)] * 2,
        *[((8, 64), "warmup", 0.3)] * 2,
        *[((4, 128), "sparse", 0.3)] * 2,
        *[((4, 128), "sparse", 0.1)] * 2,
    ]
    assert len(set(found)) == 4
    assert {v.shape for v in found} == set(parts.batches)


def test_nothing_but_the_indexer_moves_in_the_warm_up(data):
    parts = build.parts(recipe(data))
    live = [parts.staged(stage).optimizer.update.__self__.live for stage in course(data).stages]
    declared = param.flatten(parts.declarations)
    trained = [path for path, d in declared.items() if d.trained]
    assert len(live[0]) == len(live[2]) == len(trained)
    assert {trained[i] for i in live[1]} == {path for path in trained if "indexer" in declared[path].tags}


def test_the_warm_up_goes_back_through_nothing_but_the_indexer(data):
    """A scan over layers that are computed again would compute gradients that are zero. Counted are products of the traced step."""
    r = recipe(data)
    layers = tuple(run.model_copy(update={"repeat": 2}) for run in r.model.layers)
    parts = build.parts(r.model_copy(update={"model": r.model.model_copy(update={"layers": layers, "remat": "full"})}))
    dense, warm = (flops.traced(build.trace_step(parts, parts.variant_at(step)).jaxpr.jaxpr).newton_schulz for step in (0, 2))
    assert warm < 0.65 * dense
