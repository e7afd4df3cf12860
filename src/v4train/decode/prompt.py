"""A prompt: tokens, and the patches and frames that stand behind media placeholders, cut into chunks of fixed shape."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, Int16, UInt8

from v4train.data import document as document_lib
from v4train.model import context as context_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What a sequence begins with.

    Attributes:
        tokens: ids, placeholders where there are media.
        modality: of each token, an index into `model.config.MODALITIES`.
        patches: of all images, in order of their placeholders; None without images.
        patch_xy: column and row of each patch.
        audio: dMel frames, in order of their placeholders; None without audio.
    """

    tokens: Int[np.ndarray, "n"]
    modality: Int[np.ndarray, "n"]
    patches: UInt8[np.ndarray, "p x"] | None = None
    patch_xy: Int16[np.ndarray, "p 2"] | None = None
    audio: UInt8[np.ndarray, "a bins"] | None = None

    @classmethod
    def of_tokens(cls, tokens: Int[np.ndarray, "n"]) -> "Prompt":
        """Text only."""
        tokens = np.asarray(tokens, np.int32)
        return cls(tokens, np.zeros_like(tokens))

    @classmethod
    def of_document(cls, document: document_lib.Document) -> "Prompt":
        """A document as training reads it; drop its last token if the model is to continue it."""
        images, frames = len(document.patches) > 0, len(document.audio) > 0
        return cls(
            document.tokens.astype(np.int32),
            document.modality.astype(np.int32),
            document.patches if images else None,
            document.patch_xy if images else None,
            document.audio if frames else None,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def followed_by(self, tokens: list[int]) -> "Prompt":
        """With text after it, such as its answer."""
        more = np.array(tokens, self.tokens.dtype)
        return dataclasses.replace(
            self, tokens=np.concatenate([self.tokens, more]), modality=np.concatenate([self.modality, np.zeros(len(more), np.int32)])
        )

    def chunk(self, start: int, *, size: int) -> context_lib.Inputs:
        """One row with the tokens from ``start`` on, at most ``size``, padded to ``size``.

        If there are media among them, all kinds that the prompt has come along, padded to ``size``: each set of kinds is compiled once.
        """
        span = slice(start, min(start + size, len(self)))
        modality = _padded(self.modality[span], size)
        positions: Any = start + np.arange(size, dtype=np.int32)
        real = positions < len(self)
        media: dict[str, Any] = {}
        for kind, values in ((1, self.patches), (2, self.audio)):
            if values is None or not modality.any():
                continue
            here = modality == kind
            first = int(np.count_nonzero(self.modality[:start] == kind))
            own = slice(first, first + int(here.sum()))
            slots = np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)[None]
            if kind == 1:
                assert self.patch_xy is not None
                media |= {
                    "patches": _padded(values[own], size)[None],
                    "patch_slot": slots,
                    "patch_xy": _padded(self.patch_xy[own], size)[None],
                }
            else:
                media |= {"audio": _padded(values[own], size)[None], "audio_slot": slots}
        return context_lib.Inputs(
            _padded(self.tokens[span], size)[None], real.astype(np.int32)[None], positions[None], modality[None], **media
        )


def _padded(x: np.ndarray, size: int) -> Any:
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])
