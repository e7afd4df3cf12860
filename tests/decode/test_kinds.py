"""Formats, phases of the indexer, dense attention, and the MTP block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small

EXACT = {"rtol": 0, "atol": 1e-4}
MODEL = small.config("csa", "hca", moe={"hash_layers": 0}, mtp=None)
PARAMS = small.parameters(MODEL)
PROMPT = sequences.text(60)


def decoded(model=MODEL, **config) -> np.ndarray:
    decoder = sequences.decoder(model, PARAMS, slots=2, **config)
    cache, first = sequences.prefill(decoder, decoder.empty(), PROMPT, slot=1, pieces=[16, 16, 9])
    return np.concatenate([first, sequences.walk(decoder, cache, PROMPT, slot=1, start=41)[1]])


@pytest.mark.parametrize(("phase", "attention"), [("dense", "selected"), ("warmup", "selected"), ("sparse", "dense")])
def test_every_visible_entry_is_attended_where_nothing_selects(phase, attention):
    trained = small.config("csa", "hca", moe={"hash_layers": 0}, mtp=None, phase="dense" if phase == "sparse" else phase)
    model = small.config("csa", "hca", moe={"hash_layers": 0}, mtp=None, phase=phase)
    expected = sequences.teacher(trained, PARAMS, PROMPT)[0]
    selected = sequences.teacher(MODEL, PARAMS, PROMPT)[0]
    assert np.abs(expected - selected)[24:].max() > 1e-2, "a selection would be seen"
    np.testing.assert_allclose(decoded(model, attention=attention), expected, **EXACT)


def test_coarser_formats_stay_near_the_exact_one():
    """Not equal: then nothing would be rounded. The bounds are a few times what is measured for these weights."""
    text = slice(0, small.IMAGE_TOKEN)  # the others have the lowest logit there is
    exact = sequences.teacher(MODEL, PARAMS, PROMPT)[0][:, text]
    found = {kind: np.abs(decoded(cache=kind)[:, text] - exact) / np.abs(exact).max() for kind in ("bf16", "fp8")}
    assert 1e-5 < np.median(found["bf16"]) < 3e-3
    assert np.median(found["bf16"]) < np.median(found["fp8"]) < 3e-2


def test_plain_residuals_and_full_causal_attention_decode_as_they_train():
    """The window is longer than the prompt, so every token is seen."""
    moe = {"hash_layers": 0, "affinity": "sigmoid"}
    model = small.config("window", "csa", moe=moe, mtp=None, hyper={"kind": "residual"}, attention={"window": 128})
    params = small.parameters(model)
    decoder = sequences.decoder(model, params, slots=2)
    cache, first = sequences.prefill(decoder, decoder.empty(), PROMPT, slot=1, pieces=[16, 16, 9])
    found = np.concatenate([first, sequences.walk(decoder, cache, PROMPT, slot=1, start=41)[1]])
    np.testing.assert_allclose(found, sequences.teacher(model, params, PROMPT)[0], **EXACT)


MTP = small.config("csa", "hca", moe={"hash_layers": 0})


@pytest.fixture(scope="module")
def drafting():
    with jax.default_matmul_precision("highest"):
        params = small.parameters(MTP)
        decoder = sequences.decoder(MTP, params, slots=2, speculate=True)
        return decoder, *sequences.teacher(MTP, params, PROMPT)


def draft(decoder, cache, streams, at: int, *, count: int = 1):
    """Of slot 1, for the ``count`` tokens that end before ``at``; ``streams`` are those of all slots."""
    following = np.zeros((2, count), np.int32)
    following[1] = PROMPT.tokens[at - count + 1 : at + 1]
    cache, logits = decoder.draft(cache, streams=streams, following=following, counts=np.array([0, count], np.int32))
    return cache, np.asarray(logits)[1]


def test_drafts_are_those_of_training(drafting):
    decoder, _, ahead = drafting
    cache, _ = sequences.prefill(decoder, decoder.empty(), PROMPT, slot=1, pieces=[16, 9])
    cache, logits = draft(decoder, cache, jnp.asarray(cache.pending.streams)[:, None], 25)
    np.testing.assert_allclose(logits, ahead[24], **EXACT)
    for at in range(25, 45):
        cache, _, streams = sequences.step(decoder, cache, {1: int(PROMPT.tokens[at])})
        cache, logits = draft(decoder, cache, streams[:, None], at + 1)
        np.testing.assert_allclose(logits, ahead[at], **EXACT)


def test_a_rejected_token_leaves_nothing_behind(drafting):
    """Two tokens a step, of which the second is wrong every other time: across windows, blocks and pages."""
    decoder, expected, ahead = drafting
    cache, _ = sequences.prefill(decoder, decoder.empty(), PROMPT, slot=1, pieces=[11])
    cache, _ = draft(decoder, cache, jnp.asarray(cache.pending.streams)[:, None], 11)
    at, turn = 11, 0
    while at < 56:
        turn += 1
        right = turn % 3 != 0
        tokens = np.zeros((2, 2), np.int32)
        tokens[1] = PROMPT.tokens[at], PROMPT.tokens[at + 1] if right else (PROMPT.tokens[at + 1] + 1) % 60
        cache, logits, streams = decoder.extend(cache, tokens=tokens, counts=np.array([0, 2], np.int32))
        np.testing.assert_allclose(np.asarray(logits)[1, : 1 + right], expected[at : at + 1 + right], **EXACT)
        at += 1 + right
        cache = cache._replace(lengths=jnp.asarray(np.array([0, at], np.int32)))
        cache, logits = draft(decoder, cache, streams[:, : 1 + right], at, count=1 + right)
        np.testing.assert_allclose(logits, ahead[at - 1], **EXACT)
