"""The batch: the contract between the data layer and training.

All shapes are fixed by the recipe. Letters: B rows, S tokens of a row, P and A the patches and audio frames that a row may hold, p the
side of a patch. A budget of 0 is stored as one blank entry that no slot points at, so that no array of the step is ever empty
(gathering from an empty array is undefined where gathering from an unused one is not).

A row is a sequence of *segments*: parts of documents that know nothing of each other. A segment is contiguous, its positions count up
by one from its true place in the document (which is not 0 when the document began in an earlier row). Padding, at the end or in the
place of a damaged document, has segment 0.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float32, Int8, Int16, Int32, UInt8

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens and their media; numpy on the host, `jax.Array` in a step.

    Attributes:
        tokens: ids; padding has the tokenizer's `pad`.
        segment_ids: 1, 2, ... per row; 0 is padding.
        positions: true position within the document; 0 for padding.
        modality: 0 text, 1 image, 2 audio.
        loss_weight: weight of the token *as a target*: 1 for text and `eos`, 0 for media, their delimiters, `bos` and padding. The
            token before must also be of the same segment; that is for the loss to see to.
        patches: raw pixels.
        patch_slot: the token's entry of ``patches[row]``, -1 for tokens that are not images.
        patch_xy: column and row of a patch in its image.
        audio: dMel levels 0..15.
        audio_slot: the token's entry of ``audio[row]``, -1 for tokens that are not audio.
        source: number of the source a row is from, in the order of the config.
        n_documents: documents, or parts of one, of the row. C is 1, or the hosts that share a row: each counts what begins in its slice.
        n_bad: how many of them could not be read and are padding.
    """

    tokens: Int32[Array, "B S"]
    segment_ids: Int32[Array, "B S"]
    positions: Int32[Array, "B S"]
    modality: Int8[Array, "B S"]
    loss_weight: Float32[Array, "B S"]
    patches: UInt8[Array, "B P patch"]
    patch_slot: Int32[Array, "B S"]
    patch_xy: Int16[Array, "B P 2"]
    audio: UInt8[Array, "B A 80"]
    audio_slot: Int32[Array, "B S"]
    source: Int32[Array, "B"]
    n_documents: Int32[Array, "B C"]
    n_bad: Int32[Array, "B C"]


def empty(rows: int, *, sequence_length: int, max_patches: int, max_audio_frames: int, image_patch: int, pad: int) -> Batch:
    """A batch of padding, to be filled in place."""
    budgets = {"max_patches": max_patches, "max_audio_frames": max_audio_frames}
    batch = allocate(rows, sequence_length=sequence_length, image_patch=image_patch, **budgets)
    for name, array in vars(batch).items():
        array[...] = {"tokens": pad, "patch_slot": -1, "audio_slot": -1}.get(name, 0)
    return batch


def allocate(rows: int, *, sequence_length: int, max_patches: int, max_audio_frames: int, image_patch: int) -> Batch:
    """Arrays with anything in them: a gigabyte of patches is written once, not twice, and numpy asks for huge pages."""
    by_token = (rows, sequence_length)
    patches, frames = max(1, max_patches), max(1, max_audio_frames)
    return Batch(
        tokens=np.empty(by_token, np.int32),
        segment_ids=np.empty(by_token, np.int32),
        positions=np.empty(by_token, np.int32),
        modality=np.empty(by_token, np.int8),
        loss_weight=np.empty(by_token, np.float32),
        patches=np.empty((rows, patches, 3 * image_patch * image_patch), np.uint8),
        patch_slot=np.empty(by_token, np.int32),
        patch_xy=np.empty((rows, patches, 2), np.int16),
        audio=np.empty((rows, frames, 80), np.uint8),
        audio_slot=np.empty(by_token, np.int32),
        source=np.empty(rows, np.int32),
        n_documents=np.empty((rows, 1), np.int32),
        n_bad=np.empty((rows, 1), np.int32),
    )


def concatenate(batches: list[Batch]) -> Batch:
    """Rows of several batches (of several hosts, say), one after another."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start:stop``."""
    return jax.tree.map(lambda array: array[start:stop], batch)


def validate(batch: Batch, *, vocab_size: int) -> None:
    """Checks every promise of the contract that can be seen in a batch.

    Raises:
        ValueError: the first field and row that break one.
    """
    _validate_shapes(batch)
    b = jax.tree.map(np.asarray, batch)
    real, previous_real = b.segment_ids > 0, b.segment_ids[:, :-1] > 0
    same = b.segment_ids[:, 1:] == b.segment_ids[:, :-1]
    step = b.positions[:, 1:] - b.positions[:, :-1]
    highest = np.maximum.accumulate(b.segment_ids, axis=1)
    starts = real & np.concatenate([real[:, :1], ~same], axis=1)
    checks: list[tuple[str, str, np.ndarray]] = [
        ("tokens", f"an id outside 0..{vocab_size - 1}", (b.tokens < 0) | (b.tokens >= vocab_size)),
        ("segment_ids", "a negative id", b.segment_ids < 0),
        ("segment_ids", "a segment that comes back, or out of order", real[:, 1:] & ~same & (b.segment_ids[:, 1:] <= highest[:, :-1])),
        ("segment_ids", "a row whose first segment is not number 1", starts[:, :1] & (b.segment_ids[:, :1] != 1)),
        ("positions", "a negative position", b.positions < 0),
        ("positions", "a step other than 1 within a segment", same & previous_real & (step != 1)),
        ("positions", "padding with a position", ~real & (b.positions != 0)),
        ("modality", "a value outside 0..2", (b.modality < 0) | (b.modality > 2)),
        ("modality", "padding with a modality", ~real & (b.modality != 0)),
        ("loss_weight", "a negative or non-finite weight", ~(np.isfinite(b.loss_weight) & (b.loss_weight >= 0))),
        ("loss_weight", "a weight on padding or media", (~real | (b.modality > 0)) & (b.loss_weight != 0)),
        ("source", "a negative source", b.source[:, None] < 0),
        ("audio", "a level above 15", (b.audio > 15).any(axis=2)),
        ("n_bad", "more bad documents than there are", (b.n_bad < 0) | (b.n_bad > b.n_documents)),
    ]
    for kind, name, slots, size in ((1, "patch_slot", b.patch_slot, b.patches.shape[1]), (2, "audio_slot", b.audio_slot, b.audio.shape[1])):
        used = slots >= 0
        highest = np.maximum.accumulate(slots, axis=1)
        checks += [
            (name, "a slot on a token that is not its modality, or a media token without one", used != (b.modality == kind)),
            (name, f"a slot outside -1..{size - 1}", (slots < -1) | (slots >= size)),
            (name, "a slot used twice or out of order", used[:, 1:] & (slots[:, 1:] <= highest[:, :-1])),
        ]
    for name, what, bad in checks:
        if bad.any():
            row, place = np.argwhere(bad)[0]
            raise ValueError(
                f"batch.{name}: {what} (row {row}, place {place}, {int(bad.sum())} in all): the data pipeline broke its contract"
            )


def _validate_shapes(batch: Batch) -> None:
    rows, length = batch.tokens.shape
    patches, frames, patch = batch.patches.shape[1], batch.audio.shape[1], batch.patches.shape[2]
    expected = {
        "patches": ((rows, patches, patch), np.uint8),
        "patch_xy": ((rows, patches, 2), np.int16),
        "audio": ((rows, frames, 80), np.uint8),
        "source": ((rows,), np.int32),
        "n_documents": ((rows, batch.n_documents.shape[1]), np.int32),
        "n_bad": ((rows, batch.n_documents.shape[1]), np.int32),
        "modality": ((rows, length), np.int8),
        "loss_weight": ((rows, length), np.float32),
    }
    expected |= {name: ((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions", "patch_slot", "audio_slot")}
    for name, (shape, dtype) in expected.items():
        array = getattr(batch, name)
        if tuple(array.shape) != shape or array.dtype != dtype:
            raise ValueError(f"batch.{name}: {array.dtype}{list(array.shape)} instead of {np.dtype(dtype)}{list(shape)}")
