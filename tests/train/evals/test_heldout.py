"""Bits per byte against plain sums in fp64 over the model's own logits."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.train import tiny
from v4train.core import param, tree
from v4train.sharding import constrain
from v4train.train import build
from v4train.train import loss as loss_lib
from v4train.train.evals import heldout


@pytest.fixture(scope="module")
def case(data):
    """Parts, a first state, and held-out batches of text and of media."""
    parts = build.parts(tiny.recipe(data, model={"mtp": None}, data={"holdout": 0.5}))
    batches = [b for name in parts.data.sources for b in parts.data.holdout_batches(name, batches=1, batch_rows=8)]
    return parts, build.first_state(parts), batches


@pytest.fixture(scope="module")
def evaluate(case):
    parts, state, _ = case
    counts = parts.data.tokenizer.byte_counts()
    compiled = jax.jit(heldout.Evaluate(parts.model, parts.declarations, parts.recipe.numerics, parts.sources, counts))

    def run(batch):
        with constrain.on_mesh(parts.mesh):
            return jax.device_get(compiled(state, parts.place(batch)))

    return run


def kinds_of_segments(batch, row):
    """For each token 0 text, 1 image, 2 audio, 3 both, by what its segment holds."""
    found = np.zeros(batch.tokens.shape[1], int)
    for number in set(batch.segment_ids[row].tolist()):
        here = batch.segment_ids[row] == number
        media = set(batch.modality[row][here].tolist())
        found[here] = (1 in media) + 2 * (2 in media)
    return found


@pytest.fixture(scope="module")
def expected(case):
    """By hand, of both batches: ``(nats, targets, bytes)`` by source and by modality."""
    parts, state, batches = case

    @jax.jit
    def logits(batch):
        bound = param.bind(parts.model, tree.merge(state.params, state.buffers))
        return bound.logits(bound(loss_lib.model_inputs(batch, config=parts.model.config)).hidden)

    by_source, by_modality = np.zeros((3, parts.sources)), np.zeros((3, 4))
    for batch in batches:
        scores = np.asarray(logits(parts.place(batch)), np.float64)
        scores[..., list(parts.recipe.model.media_tokens)] = -np.inf
        for row in range(len(batch.tokens)):
            kinds = kinds_of_segments(batch, row)
            for at in range(batch.tokens.shape[1] - 1):
                target = int(batch.tokens[row, at + 1])
                same = batch.segment_ids[row, at] == batch.segment_ids[row, at + 1] > 0
                if not same or not batch.loss_weight[row, at + 1]:
                    continue
                line = scores[row, at]
                nats = math.log(np.exp(line - line.max()).sum()) + line.max() - line[target]
                told = (nats, 1, int(target < 256))
                by_source[:, batch.source[row]] += told
                by_modality[:, kinds[at + 1]] += told
    return by_source, by_modality


def test_sums_are_those_of_the_logits(case, evaluate, expected):
    sums = [evaluate(batch) for batch in case[2]]
    total = [np.sum([getattr(s, name) for s in sums], axis=0) for name in heldout.Sums._fields]
    for found, wanted in zip(total, [*expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_fields_are_bits_over_bytes(case, evaluate, expected):
    found = heldout.fields([evaluate(batch) for batch in case[2]], sources=case[0].data.sources)
    (nats, targets, spelt), (m_nats, _, m_bytes) = expected
    for i, name in enumerate(case[0].data.sources):
        assert found[f"loss/{name}"] == pytest.approx(nats[i] / targets[i], rel=1e-5)
        assert found[f"bpb/{name}"] == pytest.approx(nats[i] / math.log(2) / spelt[i], rel=1e-5)
    assert spelt[0] < targets[0], "an end of document is a target without text"
    present = [name for i, name in enumerate(heldout.MODALITIES) if m_bytes[i]]
    assert {"text", "image", "audio"} <= set(present)
    for name in present:
        i = heldout.MODALITIES.index(name)
        assert found[f"modality_bpb/{name}"] == pytest.approx(m_nats[i] / math.log(2) / m_bytes[i], rel=1e-5)
    assert set(found) == {f"{kind}/{name}" for kind in ("loss", "bpb") for name in case[0].data.sources} | {
        f"modality_bpb/{name}" for name in present
    }


def test_modalities_of_segments(case):
    for batch in case[2]:
        found = np.asarray(heldout.modality_of_segments(batch))
        real = batch.segment_ids > 0
        wanted = np.stack([kinds_of_segments(batch, row) for row in range(len(batch.tokens))])
        np.testing.assert_array_equal(found[real], wanted[real])


def test_what_has_no_text_is_left_out(case, evaluate):
    """Targets that are all ends of documents: nats, but no bytes; and none at all."""
    text = case[2][0]
    ends = dataclasses.replace(text, loss_weight=(text.tokens == case[0].data.tokenizer.eos).astype(np.float32))
    found = heldout.fields([evaluate(ends)], sources=case[0].data.sources)
    assert set(found) == {"loss/text"}
    nothing = dataclasses.replace(text, loss_weight=np.zeros_like(text.loss_weight))
    assert heldout.fields([evaluate(nothing)], sources=case[0].data.sources) == {}


def test_bits():
    assert heldout.bits(math.log(2) * 24, 3) == pytest.approx(8)
