"""What a compiled step sends, for each mesh axis alone on 8 emulated devices: a golden list, and not much more than the formula says.

To write the golden lists anew, after a change that is meant to change them:

    V4TRAIN_WRITE_GOLDEN=1 python -m pytest tests/plan/test_collectives.py -m slow
"""

import collections
import json
import os
import pathlib

import jax
import pytest

from tests.plan import small
from v4train.core import compiler, hardware
from v4train.plan import collectives, estimate, machine, timing
from v4train.sharding import mesh as mesh_lib
from v4train.train import build

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = {
    "replica": {"mesh": {"fsdp": 1, "replica": 8}},
    "fsdp": {"mesh": {"fsdp": 8}},
    "expert": {"mesh": {"fsdp": 1, "expert": 8}},
    "context": {"mesh": {"fsdp": 1, "context": 8}, "train": {"batch_rows": 2}},
    "tensor": {"mesh": {"fsdp": 1, "tensor": 8}, "train": {"batch_rows": 2}},
}
LIMIT = 1.3

pytestmark = pytest.mark.slow  # compiles five training steps: half a minute each on a quiet machine


@pytest.fixture(scope="module", params=CASES)
def compiled(request):
    """Name, recipe, and the collectives of its compiled step."""
    recipe = small.recipe(**CASES[request.param])
    mesh = mesh_lib.arrange(recipe.mesh, jax.devices()[:8])
    abstract = build.abstract(recipe, mesh=mesh)
    text = build.lower_step(abstract, abstract.variant_at(0)).compile(compiler.options()).as_text()
    assert text is not None
    return request.param, recipe, collectives.read(text, mesh=dict(mesh.shape))


def listed(listing: collectives.Listing) -> list[dict]:
    """By kind and axes: in how many places of the program, how often in a step, how many bytes a device sends."""
    return [
        {"kind": kind, "axes": list(axes), "places": total.places, "times": total.times, "sent_bytes": total.sent_bytes}
        for (kind, axes), total in listing.totals().items()
    ]


def test_collectives_are_the_golden_ones(compiled):
    name, _, listing = compiled
    file = GOLDEN / f"collectives_{name}.json"
    if os.environ.get("V4TRAIN_WRITE_GOLDEN"):
        file.write_text(json.dumps(listed(listing), indent=1) + "\n", encoding="utf-8")
    golden = json.loads(file.read_text(encoding="utf-8"))
    assert [(one["kind"], one["axes"]) for one in listed(listing)] == [(one["kind"], one["axes"]) for one in golden]
    for ours, theirs in zip(listed(listing), golden, strict=True):
        # Compilers of different versions join and split collectives in other ways; what they send in all is what counts.
        assert ours["sent_bytes"] == pytest.approx(theirs["sent_bytes"], rel=0.02), ours


def test_no_axis_sends_much_more_than_the_formula_says(compiled):
    name, recipe, listing = compiled
    on = machine.Machine("H100", hardware.CHIPS["H100"], 8)
    shape = next(iter(estimate.shapes_of(recipe)))
    plan = estimate.of_phase(recipe, shape=shape, steps=1, on=on, assumed=timing.Assumptions(), platform="cpu")
    formula: collections.Counter[tuple[str, ...]] = collections.Counter()
    for one in plan.transfers:
        formula[one.axes] += one.sent
    sent = listing.bytes_by_axes()
    assert set(sent) == {(name,)}
    assert sent[(name,)] <= LIMIT * formula[(name,)]
    assert sent[(name,)] >= formula[(name,)] / LIMIT, "a formula that says too much would hold for anything"


def test_nothing_of_the_size_of_all_logits_or_of_all_pairs_of_tokens_is_moved(compiled):
    _, recipe, listing = compiled
    length = recipe.data.sequence_length
    in_the_model = [one for one in listing.collectives if one.times >= recipe.train.microbatches]  # the optimizer's run once
    assert in_the_model
    for one in in_the_model:
        assert one.largest_array < length * recipe.model.vocab_size, one
        dimensions = [int(n) for n in one.shape[one.shape.index("[") + 1 : one.shape.index("]")].split(",") if n]
        assert dimensions.count(length) < 2, one
