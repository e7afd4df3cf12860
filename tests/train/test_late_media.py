"""Images and sound far from the start of a document train as well as those at its start, and spread over the experts.

Each document is an even filler with one image or sound somewhere in it, and behind that a letter that only the image or the sound tells.
The loss at that letter is measured for media in the first half of the row and in the second, on documents that were held out. (A known
failure of encoder-free models is sound that is no longer understood beyond some hundred positions.)
"""

import dataclasses

import jax
import numpy as np
import pytest

from tests.data import synthetic
from tests.train import compiled, tiny
from v4train.data import document, media, store
from v4train.train.evals import heldout

LETTERS, STEPS = "abcd", 60


def write_store(path, *, kind, seed):
    """400 documents that fill a row of 64 tokens each."""
    rng = np.random.default_rng(seed)
    options = {"licence": "CC0-1.0", "origin": "random", "compression": "uncompressed"}
    with store.TokenStoreWriter(path, tokenizer=synthetic.TOKENIZER, image_patch=tiny.PATCH, **options) as writer:
        for i in range(400):
            answer, before = int(rng.integers(len(LETTERS))), int(rng.integers(0, 54))
            if kind == "image":
                pixels = np.full((2 * tiny.PATCH, tiny.PATCH, 3), 20, np.uint8)
                pixels[:, :, :] += np.array([[0, 0, 0], [220, 0, 0], [0, 220, 0], [0, 0, 220]], np.uint8)[answer]
                part = media.image_to_patches(pixels, patch=tiny.PATCH)
            else:
                part = np.full((2, media.MEL_CHANNELS), 2, np.uint8)
                part[:, 20 * answer : 20 * answer + 20] = 13
            parts = [part, LETTERS[answer] + "." * (57 - before)]
            writer.add(document.compose(["." * before, *parts] if before else parts, key=f"{kind}{i}", tokenizer=synthetic.TOKENIZER))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model before and after training, as a function from held-out batches to nats per answer by source, early and late."""
    root = tmp_path_factory.mktemp("late")
    sources = [
        {"name": kind, "path": str(write_store(root / kind, kind=kind, seed=i)), "weight": 1.0, "packing": "one_document"}
        for i, kind in enumerate(("image", "audio"))
    ]
    case = compiled.case(
        root,
        data={"sources": sources, "holdout": 0.2},
        train={"steps": STEPS, "batch_rows": 16},
        optimizer={"schedule": {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 5, "decay_steps": 20}},
    )
    parts = case.parts
    evaluate = jax.jit(heldout.Evaluate(parts.model, parts.declarations, parts.recipe.numerics, 2, parts.data.tokenizer.byte_counts()))
    held_out = [b for name in ("image", "audio") for b in parts.data.holdout_batches(name, batches=4, batch_rows=16)]

    def losses(state):
        found = np.zeros((2, 2, 2))  # early and late; nats and targets; source
        for b in held_out:
            answers = np.isin(b.tokens, [ord(letter) for letter in LETTERS])
            places = np.arange(b.tokens.shape[1]) >= b.tokens.shape[1] // 2
            for late in (0, 1):
                only = dataclasses.replace(b, loss_weight=np.where(answers & (places == late), b.loss_weight, 0).astype(np.float32))
                found[late] += np.stack(evaluate(state, parts.place(only))[:2])
        assert (found[:, 1] > 15).all()
        return found[:, 0] / found[:, 1]

    state, reports = case.state, []
    before = losses(state)
    for step in range(STEPS):
        state, report = case.run(state, case.batch(step))
        reports.append(jax.device_get(report))
    return before, losses(state), reports


@pytest.mark.slow  # trains 60 steps
def test_late_media_are_learned_like_early_ones(trained):
    before, after, _ = trained
    print("nats per answer, [early, late] x [image, audio]: before", before.round(3).tolist(), "after", after.round(3).tolist())
    assert (after < 0.5 * np.log(len(LETTERS))).all(), "the letter is read off the image and the sound, wherever they are"
    fallen = before - after
    np.testing.assert_allclose(fallen[1], fallen[0], rtol=0.25)


@pytest.mark.slow  # as above
def test_media_spread_over_the_experts_of_hash_layers(trained):
    """All patches have one id: routed by a table of ids they would all go to the same two of eight experts, 4 x uniform."""
    _, _, reports = trained
    load = sum(report.load for report in reports[-20:])[0]
    for modality in (1, 2):
        assert load[modality].max() < 3 * load[modality].mean()
