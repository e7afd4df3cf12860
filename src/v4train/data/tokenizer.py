"""Text to ids and back.

The byte tokenizer is the default for everything that must run offline and fast: ids 0..255 are the bytes of UTF-8, the specials
follow, and the vocabulary is rounded up to 272 = 17 x 16 so that it splits evenly over tensor-parallel devices.

A media item is written into the token stream as ``start, placeholder x n, end``: one placeholder for each patch or audio frame. The
placeholders carry no content (the model replaces their embedding by the stem's output), therefore neither they nor the delimiters
are ever targets of the text loss: `media_token_ids` lists them, `never_targets` adds padding and begin-of-sequence.
"""

import hashlib
import json
from typing import Protocol

import numpy as np

from v4train.data import config as config_lib

SPECIALS = ("bos", "eos", "pad", "image", "audio", "image_start", "image_end", "audio_start", "audio_end")


class Tokenizer(Protocol):
    """What the data layer and the model need to know about a vocabulary."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    image: int
    audio: int
    image_start: int
    image_end: int
    audio_start: int
    audio_end: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def media_token_ids(self) -> tuple[int, ...]: ...

    @property
    def never_targets(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0..255, specials 256..264, spare ids to 271."""

    vocab_size = 272
    bos, eos, pad, image, audio, image_start, image_end, audio_start, audio_end = range(256, 256 + len(SPECIALS))
    names = tuple(f"<0x{i:02x}>" for i in range(256)) + tuple(f"<{name}>" for name in SPECIALS) + tuple(f"<spare_{i}>" for i in range(7))

    @property
    def fingerprint(self) -> str:
        """Changes whenever an id changes its meaning."""
        return hashlib.sha256(json.dumps(["byte", self.names]).encode()).hexdigest()

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Placeholders and delimiters of media spans."""
        return (self.image, self.audio, self.image_start, self.image_end, self.audio_start, self.audio_end)

    @property
    def never_targets(self) -> tuple[int, ...]:
        """Ids that the text loss never asks for: media, `pad`, `bos`."""
        return (self.bos, self.pad, *self.media_token_ids)

    def encode(self, text: str) -> np.ndarray:
        """``u32[n]``, without `bos` and `eos`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; specials appear as ``<eos>``, bytes that are not UTF-8 as the replacement character."""
        pieces: list[bytes] = []
        for i in np.asarray(ids).tolist():
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the byte vocabulary of {self.vocab_size}: the ids are from another tokenizer")
            pieces.append(bytes([i]) if i < 256 else self.names[i].encode())
        return b"".join(pieces).decode("utf-8", errors="replace")


def build(config: config_lib.TokenizerConfig) -> Tokenizer:
    """The tokenizer that a config describes."""
    assert config.kind == "byte", config.kind
    return ByteTokenizer()
