"""Text, patches and frames land in their slots, with the values that plain definitions give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import embedding, transformer
from v4train.train import loss

CONFIG = small.config()


@pytest.fixture(scope="module")
def rows():
    return small.batch([[(9, 0, "ttiia"), (7, 3, "aiit")], [(12, 0, "tia")]], length=20)


@pytest.fixture(scope="module")
def case():
    layer = embedding.Embedding(CONFIG)
    params = small.draw(param.declarations(layer))
    return params, small.jit(lambda params, rows: param.bind(layer, params)(loss.model_inputs(rows, config=CONFIG)))


@pytest.fixture(scope="module")
def embedded(case, rows):
    params, run = case
    return np.asarray(run(params, rows))


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def patch(params: dict, pixels: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """A patch's embedding, fp64."""
    p = exact(params["image"])
    x = pixels.astype(np.float64) / 255
    x = x - x.mean()
    x = x / np.sqrt((x**2).mean() + 1e-6)
    x = x @ p["up"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return rms(x @ p["down"] + p["columns"][xy[0]] + p["rows"][xy[1]], p["norm"])


def frame(params: dict, levels: np.ndarray) -> np.ndarray:
    """dMel: the sum of one table row for each of the 80 bins, fp64."""
    p = exact(params["audio"])
    return rms(sum(p["table"][bin * 16 + int(level)] for bin, level in enumerate(levels)), p["norm"])


def test_every_slot_holds_its_own_text_patch_or_frame(case, rows, embedded):
    params, _ = case
    counts = [0, 0, 0]
    for row, place in np.ndindex(rows.tokens.shape):
        kind = rows.modality[row, place]
        counts[kind] += rows.segment_ids[row, place] > 0
        if kind == 0:
            expected = np.asarray(params["table"])[rows.tokens[row, place]]
        elif kind == 1:
            at = rows.patch_slot[row, place]
            expected = patch(params, rows.patches[row, at], rows.patch_xy[row, at])
        else:
            expected = frame(params, rows.audio[row, rows.audio_slot[row, place]])
        np.testing.assert_allclose(embedded[row, place], expected, rtol=2e-4, atol=2e-5)
    assert min(counts) >= 7


def test_columns_and_rows_are_two_tables(case, rows, embedded):
    params, run = case
    swapped = run(params, dataclasses.replace(rows, patch_xy=rows.patch_xy[..., ::-1].copy()))
    differs = np.abs(swapped - embedded).max(-1) > 1e-3
    square = np.zeros(rows.tokens.shape, bool)
    for row, place in np.argwhere(rows.modality == 1):
        x, y = rows.patch_xy[row, rows.patch_slot[row, place]]
        square[row, place] = x == y
    np.testing.assert_array_equal(differs, (rows.modality == 1) & ~square)


def test_unused_budget_has_no_effect_and_no_gradient(case, rows, embedded):
    """Patches and frames that no slot points at may hold anything."""
    params, run = case
    changed = jax.tree.map(np.copy, rows)
    for media, slots in ((changed.patches, rows.patch_slot), (changed.patch_xy, rows.patch_slot), (changed.audio, rows.audio_slot)):
        for row in range(2):
            unused = np.setdiff1d(np.arange(media.shape[1]), slots[row])
            assert len(unused) > 10
            media[row, unused] = 7
    np.testing.assert_array_equal(run(params, changed), embedded)


def test_a_budget_larger_than_the_row_changes_nothing(case, rows, embedded):
    params, run = case
    wide = {name: np.pad(getattr(rows, name), ((0, 0), (0, 5), (0, 0))) for name in ("patches", "patch_xy", "audio")}
    np.testing.assert_allclose(run(params, dataclasses.replace(rows, **wide)), embedded, rtol=1e-5, atol=1e-6)


def test_modalities_are_equally_loud_at_first(rows):
    """With the declared initialisers: the scale of a text embedding, for every modality."""
    layer = embedding.Embedding(CONFIG)
    params = param.initialise(param.declarations(layer), 0)
    out = np.asarray(param.bind(layer, params)(loss.model_inputs(jax.tree.map(jnp.asarray, rows), config=CONFIG)))
    scales = [np.sqrt((out[rows.modality == kind] ** 2).mean()) for kind in range(3)]
    np.testing.assert_allclose(scales, 0.02, rtol=0.15)


def test_a_model_without_stems_reads_tokens_only(rows):
    config = small.config(image=None, audio=None)
    layer = embedding.Embedding(config)
    params = small.draw(param.declarations(layer))
    assert set(params) == {"table"}
    out = param.bind(layer, params)(loss.model_inputs(rows, config=config))
    np.testing.assert_array_equal(out, np.asarray(params["table"])[rows.tokens])


def test_media_placeholders_are_never_predicted():
    config = small.config("window", mtp=None)
    model, params = transformer.Transformer(config), small.parameters(config)
    hidden = np.random.default_rng(0).standard_normal((1, 4, 32)).astype(np.float32)
    logits = np.asarray(param.bind(model, params).logits(hidden))
    assert (logits[..., [small.IMAGE_TOKEN, small.AUDIO_TOKEN]] == np.finfo(np.float32).min).all()
    np.testing.assert_allclose(
        logits[..., : small.IMAGE_TOKEN], (hidden @ np.asarray(params["head"]))[..., : small.IMAGE_TOKEN], rtol=1e-4, atol=1e-5
    )
