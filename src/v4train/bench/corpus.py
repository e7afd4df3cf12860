"""Synthetic documents for measuring readers: the same on every machine, of the lengths and ids of a web corpus.

Lengths are lognormal (median 600 tokens, mean about 1,000), ids follow Zipf's law over 129,280, as many as DeepSeek-V4 has, so that they
need four bytes like real ones. Images are noise: nothing that reads bytes is faster for pictures. The tokenizer is a file of as many words,
because the pipeline wants one.
"""

import dataclasses
import json
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from v4train.data import config as config_lib
from v4train.data import document as document_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

VOCABULARY = 129_280
IMAGE_PATCH = 32
PATCH_SHARE = 0.25
_BUILT = "finished"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Directories of the same text documents in several formats, and one of documents with images."""

    root: pathlib.Path

    @property
    def tokenizer(self) -> config_lib.HuggingFaceTokenizerConfig:
        return config_lib.HuggingFaceTokenizerConfig(path=str(self.root / "tokenizer.json"))

    def path(self, name: str) -> str:
        """``flat``, ``records``, ``megatron`` or ``images``."""
        return str(self.root / name)


def make(root: pathlib.Path, *, text_tokens: int, image_patches: int) -> Corpus:
    """Writes the corpus, or finds that it is there.

    Args:
        root: a directory of its own.
        text_tokens: about how many.
        image_patches: about how many.
    """
    corpus, wanted = Corpus(root), json.dumps([text_tokens, image_patches])
    if (root / _BUILT).is_file() and (root / _BUILT).read_text() == wanted:
        return corpus
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root}: holds something else than the corpus of this measurement; remove it or name another directory")
    root.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(VOCABULARY - len(tokenizer_lib.SPECIALS))}
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (root / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = tokenizer_lib.build(corpus.tokenizer)
    assert tokenizer.vocab_size == VOCABULARY, tokenizer.vocab_size
    options = {"tokenizer": tokenizer, "image_patch": IMAGE_PATCH, "licence": "CC0-1.0", "origin": "random numbers"}
    for layout in ("flat", "records"):
        with store_lib.TokenStoreWriter(root / layout, layout=layout, compression="zstd:3", **options) as writer:
            for i, ids in enumerate(text_documents(text_tokens)):
                writer.add(document_lib.Document(key=str(i), tokens=ids))
    _write_megatron(root / "megatron", text_documents(text_tokens))
    with store_lib.TokenStoreWriter(root / "images", layout="flat", **options) as writer:
        for document in _image_documents(image_patches, tokenizer):
            writer.add(document)
    (root / _BUILT).write_text(wanted)
    return corpus


def text_documents(tokens: int) -> Iterator[np.ndarray]:
    """``u32[n]`` each, together at least ``tokens``."""
    rng, done = np.random.default_rng(0), 0
    while done < tokens:
        n = int(np.clip(rng.lognormal(np.log(600), 1.0), 20, 200_000))
        done += n
        yield np.minimum(rng.zipf(1.2, n) - 1, 127_999).astype(np.uint32)


def _image_documents(patches: int, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[document_lib.Document]:
    """One image of 8 x 8 to 16 x 16 patches each, and text before and after it; a quarter of the tokens are patches."""
    rng, done = np.random.default_rng(1), 0
    while done < patches:
        height, width = rng.integers(8, 17, 2).tolist()
        n = height * width
        done += n
        text = rng.integers(0, 128_000, int(n * (1 / PATCH_SHARE - 1)) - 2)
        before = len(text) // 2
        image = [tokenizer.image_start, *[tokenizer.image] * n, tokenizer.image_end]
        ids = np.concatenate([text[:before], image, text[before:]]).astype(np.uint32)
        y, x = np.divmod(np.arange(n, dtype=np.int16), np.int16(width))
        values = np.frombuffer(rng.bytes(n * 3 * IMAGE_PATCH**2), np.uint8).reshape(n, -1)
        spans = np.array([(document_lib.IMAGE, before + 1, n)], document_lib.SPAN)
        yield document_lib.Document(key=str(done), tokens=ids, spans=spans, patches=values, patch_xy=np.stack([x, y], axis=-1))


def _write_megatron(stem: pathlib.Path, documents: Iterator[np.ndarray]) -> None:
    sizes = []
    with stem.with_suffix(".bin").open("wb") as file:
        for ids in documents:
            file.write(ids.astype("<i4").tobytes())
            sizes.append(len(ids))
    n = len(sizes)
    pointers = (np.cumsum(sizes) - sizes) * 4
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, n, n + 1)
    parts = [np.array(sizes, "<i4"), pointers.astype("<i8"), np.arange(n + 1, dtype="<i8")]
    stem.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
