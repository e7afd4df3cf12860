"""`validate` notices each broken promise."""

import dataclasses

import jax
import numpy as np
import pytest

from v4train.data import batch


def good() -> batch.Batch:
    b = batch.empty(2, sequence_length=8, max_patches=3, max_audio_frames=0, image_patch=2, pad=258)
    b.tokens[0, :7] = [256, 97, 261, 259, 259, 262, 98]
    b.segment_ids[0, :7] = [1, 1, 1, 1, 1, 1, 2]
    b.positions[0, :7] = [40, 41, 42, 43, 44, 45, 0]
    b.modality[0, 3:5] = 1
    b.patch_slot[0, 3:5] = [0, 1]
    b.loss_weight[0, [1, 6]] = 1
    return b


def test_a_good_batch_passes_and_is_a_pytree():
    b = good()
    batch.validate(b, vocab_size=272)
    assert len(jax.tree.leaves(b)) == len(dataclasses.fields(b)) == 13
    on_device = jax.jit(lambda x: x)(b)
    batch.validate(on_device, vocab_size=272)
    both = batch.concatenate([batch.rows(b, 1, 2), batch.rows(b, 0, 1)])
    np.testing.assert_array_equal(both.tokens, b.tokens[::-1])


def test_no_array_is_empty():
    b = good()
    assert b.audio.shape == (2, 1, 80)
    assert all(leaf.size for leaf in jax.tree.leaves(b))


BREAKS = {
    "tokens: an id outside": lambda b: b.tokens.__setitem__((0, 1), 272),
    "segment_ids: a negative": lambda b: b.segment_ids.__setitem__((0, 1), -1),
    "segment_ids: a segment that comes back": lambda b: b.segment_ids.__setitem__((0, 3), 3),
    "segment_ids: a row whose first": lambda b: b.segment_ids.__setitem__((0, slice(0, 7)), [3] * 6 + [4]),
    "positions: a negative": lambda b: b.positions.__setitem__((0, slice(0, 6)), np.arange(-1, 5)),
    "positions: a step other than 1": lambda b: b.positions.__setitem__((0, 2), 50),
    "positions: padding with": lambda b: b.positions.__setitem__((1, 2), 5),
    "modality: a value": lambda b: b.modality.__setitem__((0, 1), 3),
    "modality: padding with": lambda b: b.modality.__setitem__((1, 1), 1),
    "loss_weight: a negative or": lambda b: b.loss_weight.__setitem__((0, 1), np.nan),
    "loss_weight: a weight on": lambda b: b.loss_weight.__setitem__((0, 3), 1),
    "patch_slot: a slot on a token": lambda b: b.patch_slot.__setitem__((0, 1), 2),
    "patch_slot: a slot outside": lambda b: b.patch_slot.__setitem__((0, 4), 3),
    "patch_slot: a slot used twice": lambda b: b.patch_slot.__setitem__((0, 4), 0),
    "audio_slot: a slot on": lambda b: b.modality.__setitem__((0, 0), 2),
    "audio: a level": lambda b: b.audio.__setitem__((0, 0, 0), 16),
    "source: a negative": lambda b: b.source.__setitem__(0, -1),
}


@pytest.mark.parametrize("message", BREAKS)
def test_each_broken_promise_is_named(message):
    b = good()
    BREAKS[message](b)
    with pytest.raises(ValueError, match=rf"batch\.{message}"):
        batch.validate(b, vocab_size=272)


def test_a_wrong_shape_or_dtype_is_named():
    b = dataclasses.replace(good(), patch_xy=np.zeros((2, 2, 2), np.int16))
    with pytest.raises(ValueError, match=r"patch_xy: int16\[2, 2, 2\] instead of int16\[2, 3, 2\]"):
        batch.validate(b, vocab_size=272)
    b = dataclasses.replace(good(), tokens=np.zeros((2, 8), np.int64))
    with pytest.raises(ValueError, match="tokens: int64"):
        batch.validate(b, vocab_size=272)
