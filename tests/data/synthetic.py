"""Small synthetic token stores for tests of this and other layers."""

import pathlib

import numpy as np

from v4train.data import document, media, store, tokenizer

TOKENIZER = tokenizer.ByteTokenizer()


def text_document(rng: np.random.Generator, *, key: str, length: int) -> document.Document:
    """A text document of exactly ``length`` tokens, `bos` and `eos` included; no two are alike."""
    return document.compose([bytes(rng.integers(97, 123, length - 2).tolist()).decode()], key=key, tokenizer=TOKENIZER)


def image_part(rng: np.random.Generator, *, height: int, width: int, patch: int) -> media.Patches:
    """An image of ``height`` x ``width`` patches."""
    return media.image_to_patches(rng.integers(0, 256, (height * patch, width * patch, 3), np.uint8), patch=patch)


def media_document(rng: np.random.Generator, *, key: str, patch: int) -> document.Document:
    """One to three images or sounds with captions between them."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.5:
            parts.append(image_part(rng, height=int(rng.integers(1, 4)), width=int(rng.integers(1, 4)), patch=patch))
        else:
            parts.append(rng.integers(0, media.MEL_LEVELS, (int(rng.integers(1, 12)), media.MEL_CHANNELS), np.uint8))
        parts.append(bytes(rng.integers(97, 123, int(rng.integers(1, 40))).tolist()).decode())
    return document.compose(parts if rng.random() < 0.5 else parts[::-1], key=key, tokenizer=TOKENIZER)


def make_test_store(
    path: pathlib.Path,
    *,
    documents: int = 40,
    kind: str = "text",
    lengths: tuple[int, ...] | None = None,
    patch: int = 2,
    seed: int = 0,
    shard_tokens: int = 2**28,
) -> pathlib.Path:
    """Writes a store of ``documents`` random documents.

    Args:
        path: the new directory.
        documents: how many, unless ``lengths`` says so.
        kind: ``text`` or ``media`` (images of up to 9 patches, sounds of up to 11 frames, text around them).
        lengths: exact lengths of text documents.
        patch: side of an image patch.
        seed: of everything random.
        shard_tokens: a new shard is begun after this many tokens.
    """
    rng = np.random.default_rng(seed)
    sizes = lengths or tuple(rng.integers(5, 200, documents).tolist())
    options = {"licence": "CC0-1.0", "origin": "random", "compression": "zstd:1", "shard_tokens": shard_tokens}
    with store.TokenStoreWriter(path, tokenizer=TOKENIZER, image_patch=patch, **options) as writer:
        for i, length in enumerate(sizes):
            key = f"{seed}/{i}"
            writer.add(text_document(rng, key=key, length=length) if kind == "text" else media_document(rng, key=key, patch=patch))
    return path
