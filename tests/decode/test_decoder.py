"""Decoding gives the logits of the training forward pass at every position, however the tokens come and whatever else runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small
from v4train.decode import prompt as prompt_lib

EXACT = {"rtol": 0, "atol": 1e-4}
MODEL = small.config(layers=[{"pattern": ["window"], "repeat": 2}, {"pattern": ["csa", "hca"], "repeat": 2}], moe={"hash_layers": 2})
LENGTH = 75


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def decoder(params):
    return sequences.decoder(MODEL, params)


@pytest.fixture(scope="module")
def prompts():
    return [sequences.text(LENGTH, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def expected(params, prompts):
    return [sequences.teacher(MODEL, params, prompt)[0] for prompt in prompts]


def test_the_model_has_every_kind_of_layer_and_they_are_scanned(decoder):
    layers = decoder.empty().layers
    repeats = [{place: (x.window.shape[0], x.index is not None) for place, x in run.items()} for run in layers.values()]
    assert repeats == [{"layer_0": (2, False)}, {"layer_0": (2, True), "layer_1": (2, False)}]


@pytest.mark.parametrize("prefilled", [1, 40, 64])
def test_prefill_and_steps_give_the_logits_of_training(decoder, prompts, expected, prefilled):
    cache, first = sequences.prefill(decoder, decoder.empty(), prompts[0], slot=1, pieces=sequences.pieces(prefilled, size=16))
    cache, rest = sequences.walk(decoder, cache, prompts[0], slot=1, start=prefilled)
    np.testing.assert_allclose(np.concatenate([first, rest]), expected[0], **EXACT)
    assert cache.lengths.tolist() == [0, LENGTH, 0]


@pytest.mark.parametrize(
    "pieces", [[16, 16, 16, 16, 11], [1] * 9 + [16] * 4 + [2], [7, 16, 5, 8, 3, 4, 12, 1, 15, 4], [3, 13] * 4 + [11]], ids=str
)
def test_any_cut_of_the_prompt_gives_the_same(decoder, prompts, expected, pieces):
    assert sum(pieces) == LENGTH
    np.testing.assert_allclose(sequences.prefill(decoder, decoder.empty(), prompts[0], slot=0, pieces=pieces)[1], expected[0], **EXACT)


def test_the_last_token_alone_gives_the_same_as_all(decoder, prompts, expected):
    cache, logits, streams = decoder.prefill(decoder.empty(), prompt=prompts[0], start=0, slot=2, count=13)
    assert logits.shape == (small.VOCAB,)
    assert streams.shape == (4, 32)
    np.testing.assert_allclose(logits, expected[0][12], **EXACT)
    assert cache.lengths.tolist() == [0, 0, 13]


def test_several_tokens_at_once_in_every_slot(decoder, prompts, expected):
    cache = decoder.empty()
    at = np.array([0, 5, 30])
    for slot in (1, 2):
        cache, _ = sequences.prefill(decoder, cache, prompts[slot], slot=slot, pieces=sequences.pieces(at[slot], size=16))
    for counts in ([3, 3, 3], [2, 0, 3], [0, 1, 2], [3, 3, 1], [3, 2, 3], [1, 3, 3], [3, 3, 2], [3, 3, 3]):
        tokens = np.stack([prompt.tokens[i : i + 3] for prompt, i in zip(prompts, at, strict=True)])
        cache, logits, _ = decoder.extend(cache, tokens=tokens, counts=np.array(counts, np.int32))
        for slot, count in enumerate(counts):
            np.testing.assert_allclose(np.asarray(logits)[slot, :count], expected[slot][at[slot] : at[slot] + count], **EXACT)
        at += counts
    assert cache.lengths.tolist() == at.tolist()


def test_sequences_do_not_disturb_each_other(decoder, prompts, expected):
    """Three sequences of other lengths begin at other times, stand still, end, and are followed by others in their slots."""
    cache, at = decoder.empty(), [0, 0, 0]

    def run(slots: list[int], times: int) -> None:
        nonlocal cache
        for _ in range(times):
            cache, logits, _ = sequences.step(decoder, cache, {slot: int(prompts[slot].tokens[at[slot]]) for slot in slots})
            for slot in slots:
                np.testing.assert_allclose(logits[slot], expected[slot][at[slot]], **EXACT)
                at[slot] += 1

    def fill(slot: int, pieces: list[int]) -> None:
        nonlocal cache
        for size in pieces:
            cache, logits, _ = decoder.prefill(cache, prompt=prompts[slot], start=at[slot], slot=slot, count=size, every=True)
            np.testing.assert_allclose(np.asarray(logits)[:size], expected[slot][at[slot] : at[slot] + size], **EXACT)
            at[slot] += size

    fill(0, [16, 16])
    run([0], 3)
    fill(1, [11])
    run([0, 1], 9)
    fill(2, [16, 16, 16, 6])
    run([1], 2)
    run([0, 1, 2], 8)
    cache = cache._replace(lengths=cache.lengths.at[0].set(0))
    at[0] = 0
    fill(0, [1])
    run([0, 2], 6)
    run([0, 1, 2], 7)
    assert cache.lengths.tolist() == at


def test_company_changes_no_bit(decoder, prompts):
    """The same steps in the same slot, alone and beside two others."""
    alone, _ = sequences.prefill(decoder, decoder.empty(), prompts[0], slot=1, pieces=[16, 4])
    among = decoder.empty()
    for slot, size in ((0, 16), (2, 5)):
        among, _ = sequences.prefill(decoder, among, prompts[2], slot=slot, pieces=[size])
    among, _ = sequences.prefill(decoder, among, prompts[0], slot=1, pieces=[16, 4])
    for token in prompts[0].tokens[20:50].tolist():
        alone, mine, _ = sequences.step(decoder, alone, {1: token})
        among, ours, _ = sequences.step(decoder, among, {0: 3, 1: token, 2: token})
        np.testing.assert_array_equal(mine[1], ours[1])


def test_pages_may_lie_anywhere_and_come_late(decoder, prompts, expected):
    cache = decoder.empty()
    table = np.full(cache.page_table.shape, -1, np.int32)
    free = np.random.default_rng(0).permutation(decoder.layout.pages).tolist()
    at = [0, 0, 0]
    for _ in range(40):
        for slot in range(3):
            table[slot, at[slot] // 16] = table[slot, at[slot] // 16] if table[slot, at[slot] // 16] >= 0 else free.pop()
        cache, logits, _ = sequences.step(
            decoder, cache._replace(page_table=jnp.asarray(table)), {s: int(prompts[s].tokens[at[s]]) for s in range(3)}
        )
        for slot in range(3):
            np.testing.assert_allclose(logits[slot], expected[slot][at[slot]], **EXACT)
            at[slot] += 1


def test_media_in_the_prompt(decoder, params):
    """Patches and frames across chunks; hash layers route their slots by the learned gate, with their modality's bias."""
    kinds = "ttiiiiiiiiiiiiiiiiiiittaaaaaaaaaaaaaaaaaaatttitatttttttttt"
    row = jax.tree.map(lambda x: x[0], small.batch([[(len(kinds), 0, kinds)]], length=len(kinds)))
    images, frames = kinds.count("i"), kinds.count("a")
    prompt = prompt_lib.Prompt(row.tokens, row.modality.astype(np.int32), row.patches[:images], row.patch_xy[:images], row.audio[:frames])
    expected = sequences.teacher(MODEL, params, prompt)[0]
    pieces = [16, 16, 9]
    cache, first = sequences.prefill(decoder, decoder.empty(), prompt, slot=1, pieces=pieces)
    np.testing.assert_allclose(first, expected[: len(first)], **EXACT)
    cache, _ = sequences.prefill(decoder, cache, prompt, slot=0, pieces=[7, 16, 16])
    rest = []
    for start in range(41, len(kinds) - 10, 16):
        size = min(16, len(kinds) - 10 - start)
        cache, logits, _ = decoder.prefill(cache, prompt=prompt, start=start, slot=1, count=size, every=True)
        rest.append(np.asarray(logits)[:size])
    cache, steps = sequences.walk(decoder, cache, prompt, slot=1, start=len(kinds) - 10)
    np.testing.assert_allclose(np.concatenate([*rest, steps]), expected[41:], **EXACT)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (sequences.text(129), r"a prompt of 129 tokens: it must have 1 to 128 \(decode.max_length\)"),
        (sequences.text(0), "a prompt of 0 tokens"),
        (prompt_lib.Prompt.of_tokens(np.array([3, 64])), "token ids from 3 to 64: they must be from 0 to 63"),
    ],
)
def test_prompts_that_the_model_cannot_read(decoder, prompt, complaint):
    with pytest.raises(ValueError, match=complaint):
        decoder.check(prompt)
