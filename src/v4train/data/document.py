"""One document: its tokens, its media, and the bytes they are stored as.

A document is a stream of ids in which *spans* of placeholders stand for media; the payload of a span (patches, audio frames) is kept
beside the tokens, in the order of the spans, so that "number of placeholders = number of patches" can be checked when a document is
written and again whenever it is read.

The record (little endian) is a header, the key, the tokens, the spans and the payloads. Tokens are stored as *byte planes*: all low
bytes, then all second bytes, and so on, as many planes as the largest id needs. The high planes of a text are nearly constant, so
zstd brings u32 ids down to the size of the text itself (interleaved u32 costs about a third more), and planes are decoded by
strided copies. Modality is not stored: it follows from the spans.
"""

import dataclasses
import itertools
import struct

import numpy as np
from jaxtyping import Int16, UInt8, UInt32

from v4train.data import media
from v4train.data import tokenizer as tokenizer_lib

TEXT, IMAGE, AUDIO = 0, 1, 2
SPAN = np.dtype([("kind", "u1"), ("at", "<u4"), ("n", "<u4")])  # first token and length of a media span
_HEADER = struct.Struct("<HBxIIIIIH")  # version, planes, tokens, spans, patches, patch bytes, audio frames, key bytes
_VERSION = 1


class DamagedRecordError(ValueError):
    """A stored document that cannot be read or contradicts itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Tokens and media of one document.

    Attributes:
        key: names the document. Documents that share material (two captions of one image) share a key, because the key alone
            decides what is held out.
        tokens: ``u32[n]``.
        spans: ``(kind, at, n)`` of each media span, disjoint, in order of ``at``.
        patches: ``u8[patches, 3p^2]`` of all image spans, in order.
        patch_xy: ``i16[patches, 2]``, column and row of each patch in its image.
        audio: ``u8[frames, 80]`` of all audio spans, in order.
    """

    key: str
    tokens: UInt32[np.ndarray, "n"]
    spans: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, SPAN))
    patches: UInt8[np.ndarray, "patches patch"] = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    patch_xy: Int16[np.ndarray, "patches 2"] = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int16))
    audio: UInt8[np.ndarray, "frames 80"] = dataclasses.field(default_factory=lambda: np.zeros((0, media.MEL_CHANNELS), np.uint8))

    @property
    def modality(self) -> UInt8[np.ndarray, "n"]:
        """0 text, 1 image, 2 audio; delimiters of a span count as text."""
        modality = np.zeros(len(self.tokens), np.uint8)
        for kind, at, n in self.spans.tolist():
            modality[at : at + n] = kind
        return modality


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a store's documents must satisfy: sizes and ids that its manifest fixes."""

    vocab_size: int
    image: int
    audio: int
    patch_bytes: int

    @classmethod
    def of(cls, tokenizer: tokenizer_lib.Tokenizer, *, image_patch: int) -> "Rules":
        return cls(tokenizer.vocab_size, tokenizer.image, tokenizer.audio, 3 * image_patch * image_patch)

    def check(self, document: Document) -> None:
        """Raises `DamagedRecordError` with the first rule that the document breaks."""
        tokens = document.tokens
        _require(0 < len(tokens) < 2**32, "it has no tokens")
        highest = int(tokens.max())
        _require(highest < self.vocab_size, f"id {highest} is outside the vocabulary of {self.vocab_size}")
        if not len(document.spans):
            stray = bool(((tokens == self.image) | (tokens == self.audio)).any())
            return _require(not (stray or len(document.patches) or len(document.audio)), "placeholders or media outside of spans")
        placeholders, last = {IMAGE: 0, AUDIO: 0}, 0
        for kind, at, n in document.spans.tolist():
            _require(kind in placeholders and n > 0, "a span has no kind or no length")
            _require(last <= at and at + n <= len(tokens), "its spans overlap or leave the document")
            _require(bool((tokens[at : at + n] == (self.image if kind == IMAGE else self.audio)).all()), "a span is not all placeholders")
            placeholders[kind] += n
            last = at + n
        for kind, placeholder, payload in ((IMAGE, self.image, document.patches), (AUDIO, self.audio, document.audio)):
            name, n = "image patches" if kind == IMAGE else "audio frames", placeholders[kind]
            _require(n == len(payload), f"{n} placeholders for {len(payload)} {name}")
            _require(n == int(np.count_nonzero(tokens == placeholder)), f"a placeholder of {name} outside of its spans")
        self._check_payload(document)

    def _check_payload(self, document: Document) -> None:
        patches, frames = document.patches, document.audio
        _require(len(document.patch_xy) == len(patches), "patches and their coordinates differ in number")
        width = patches.shape[1]
        _require(not len(patches) or width == self.patch_bytes, f"patches have {width} bytes instead of {self.patch_bytes}")
        _require(not len(frames) or int(frames.max()) < media.MEL_LEVELS, "an audio level is not below 16")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise DamagedRecordError(what)


def compose(parts: list, *, key: str, tokenizer: tokenizer_lib.Tokenizer) -> Document:
    """A document from pieces in reading order, between `bos` and `eos`: ``str``, `media.Patches`, or dMel frames ``u8[n, 80]``."""
    tokens: list[np.ndarray] = [np.array([tokenizer.bos], np.uint32)]
    spans, patches, audio, at = [], [], [], 1
    for part in parts:
        if isinstance(part, str):
            ids = tokenizer.encode(part)
        else:
            image = isinstance(part, media.Patches)
            n = len(part.values) if image else len(part)
            start, placeholder, end = (
                (tokenizer.image_start, tokenizer.image, tokenizer.image_end)
                if image
                else (tokenizer.audio_start, tokenizer.audio, tokenizer.audio_end)
            )
            ids = np.array([start, *[placeholder] * n, end], np.uint32)
            spans.append((IMAGE if image else AUDIO, at + 1, n))
            (patches if image else audio).append(part)
        tokens.append(ids)
        at += len(ids)
    tokens.append(np.array([tokenizer.eos], np.uint32))
    payload = {}
    if patches:
        payload |= {"patches": np.concatenate([p.values for p in patches]), "patch_xy": np.concatenate([p.xy for p in patches])}
    if audio:
        payload |= {"audio": np.concatenate(audio)}
    return Document(key=key, tokens=np.concatenate(tokens), spans=np.array(spans, SPAN), **payload)


def encode(document: Document) -> bytes:
    """The record of a document (already checked)."""
    key = document.key.encode()
    planes = max(1, (int(document.tokens.max()).bit_length() + 7) // 8)
    tokens = np.ascontiguousarray(document.tokens.astype("<u4").view(np.uint8).reshape(-1, 4).T[:planes])
    patches = document.patches if len(document.patches) else np.zeros((0, 0), np.uint8)
    header = _HEADER.pack(
        _VERSION, planes, len(document.tokens), len(document.spans), len(patches), patches.shape[1], len(document.audio), len(key)
    )
    arrays = (tokens, document.spans.astype(SPAN), patches, document.patch_xy.astype("<i2"), document.audio)
    return b"".join([header, key, *(np.ascontiguousarray(array).tobytes() for array in arrays)])


def decode(record: bytes) -> Document:
    """The document of a record; the payloads are views into ``record``.

    Raises:
        DamagedRecordError: another version, or lengths that do not add up.
    """
    _require(len(record) >= _HEADER.size, "the record is too short")
    version, planes, n, spans, patches, patch_bytes, frames, key_bytes = _HEADER.unpack_from(record)
    _require(version == _VERSION, f"the record has version {version}, not {_VERSION}")
    sizes = (key_bytes, planes * n, spans * SPAN.itemsize, patches * patch_bytes, patches * 4, frames * media.MEL_CHANNELS)
    at = list(itertools.accumulate(sizes, initial=_HEADER.size))
    _require(at[-1] == len(record), "the record's lengths do not add up")
    plane = np.frombuffer(record, np.uint8, planes * n, at[1]).reshape(planes, n)
    interleaved = np.zeros((n, 4), np.uint8)
    for i in range(planes):
        interleaved[:, i] = plane[i]
    tokens = interleaved.view("<u4")[:, 0]
    key = record[at[0] : at[1]].decode(errors="replace")
    if not spans:
        _require(not patches and not frames, "media without spans")
        return Document(key=key, tokens=tokens)
    return Document(
        key=key,
        tokens=tokens,
        spans=np.frombuffer(record, SPAN, spans, at[2]),
        patches=np.frombuffer(record, np.uint8, patches * patch_bytes, at[3]).reshape(patches, patch_bytes),
        patch_xy=np.frombuffer(record, "<i2", patches * 2, at[4]).reshape(patches, 2),
        audio=np.frombuffer(record, np.uint8, frames * media.MEL_CHANNELS, at[5]).reshape(frames, media.MEL_CHANNELS),
    )
