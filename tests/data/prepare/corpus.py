"""Small made-up inputs of every format, and what came out of a preparation."""

import hashlib
import io
import json
import pathlib
import wave

import numpy as np

from v4train.data import document, store
from v4train.data.prepare import config

WORDS = ("river", "stone", "lamp", "cloud", "seven", "glass", "paper", "north", "quiet", "music")


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + f" {rng.integers(10**9)}."


def png(rng: np.random.Generator, *, width: int = 40, height: int = 30, mode: str = "RGB") -> bytes:
    import PIL.Image

    pixels = rng.integers(0, 256, (height, width, len(mode)), np.uint8)
    return encoded(PIL.Image.fromarray(pixels, mode), "PNG")


def encoded(image, kind: str, **options) -> bytes:
    """A PIL image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def wav(rng: np.random.Generator, *, seconds: float = 0.3, rate: int = 8000, channels: int = 1) -> bytes:
    samples = np.rint(8000 * np.sin(np.arange(int(seconds * rate)) * rng.uniform(0.1, 0.6))).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())
    return buffer.getvalue()


def text_lines(path: pathlib.Path, *, lines: int, seed: int = 0) -> pathlib.Path:
    """JSON lines with a `text` and an `id`; every tenth is a copy of the line before."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [sentence(rng, int(rng.integers(3, 30))) for _ in range(lines)]
    for i in range(9, lines, 10):
        texts[i] = texts[i - 1].replace(" ", "  ")
    path.write_text("".join(json.dumps({"id": f"{seed}-{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def pairs(folder: pathlib.Path, *, count: int, seed: int = 0, sound: bool = True, image: bool = True) -> pathlib.Path:
    """A folder of images and sounds with captions."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        stem = folder / ("even" if i % 2 == 0 else "odd") / f"item-{i:03d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        if image:
            stem.with_suffix(".png").write_bytes(png(rng))
        if sound:
            stem.with_suffix(".wav").write_bytes(wav(rng))
        stem.with_suffix(".txt").write_text(sentence(rng, 4) + "\n")
    return folder


def spec(output: pathlib.Path, *inputs: dict, **settings) -> config.PrepareConfig:
    """A spec with small patches and everything else by default."""
    values = {"output": str(output), "licence": "CC0-1.0", "origin": "test", "inputs": list(inputs), "workers": 1}
    values |= {"image": {"patch": 8, "max_patches": 12}} | settings
    return config.PrepareConfig.model_validate_json(json.dumps(values))


def documents(output: pathlib.Path) -> list[document.Document]:
    opened = store.TokenStore.open(output)
    opened.verify()
    return [opened.read(i) for i in range(len(opened))]


def digests(output: pathlib.Path) -> dict[str, str]:
    """Of every file but the one that tells where the inputs lay."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "preparation.json")
    return {path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
