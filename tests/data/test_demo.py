"""The shipped stores are whole, as described, and usable by the shipped config."""

import pathlib
import re

import numpy as np
import pytest
import yaml

from v4train.data import batch, config, document, media, pipeline, store, tokenizer

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ["text", "image", "audio", "trio"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.parametrize("name", NAMES)
def test_stores_are_whole_and_described(name):
    s = store.TokenStore.open(ROOT / "data/demo" / name)
    s.verify()
    tokens = s.manifest["tokens"]
    row = f"| `{name}` | {len(s):,} | {tokens['text']:,} / {tokens['image']:,} / {tokens['audio']:,} |"
    assert row in (ROOT / "data/demo/README.md").read_text()
    assert s.manifest["tokenizer"]["fingerprint"] == tokenizer.ByteTokenizer().fingerprint


def test_it_is_small():
    assert sum(path.stat().st_size for path in (ROOT / "data/demo").rglob("*") if path.is_file()) < 6e6


def stated_digit(d: document.Document) -> int:
    """The first digit that the words name."""
    words = re.sub(r"<\w+>", " ", tokenizer.ByteTokenizer().decode(d.tokens))
    found = re.search(rf"\b({'|'.join(DIGITS)}|\d)\b", words)
    assert found, words
    return int(found[1]) if found[1].isdigit() else DIGITS.index(found[1])


def test_captions_say_what_the_picture_shows():
    """Images of the same named digit are nearer to their mean than to that of the others: captions and pixels belong together."""
    s = store.TokenStore.open(ROOT / "data/demo/image")
    documents = [s.read(i) for i in range(len(s))]
    x = np.stack([media.patches_to_image(media.Patches(d.patches, d.patch_xy))[:, :, 0].ravel() for d in documents]).astype(float)
    y = np.array([stated_digit(d) for d in documents])
    centres = np.stack([x[y == n].mean(axis=0) for n in range(10)])
    nearest = ((x[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == y).mean() > 0.88


def test_transcripts_say_what_is_heard():
    """The nearest other clip says the same digit far more often than one time in ten."""
    s = store.TokenStore.open(ROOT / "data/demo/audio")
    documents = [d for d in map(s.read, range(len(s))) if len(d.spans) == 1]
    x = np.stack([d.audio[np.linspace(0, len(d.audio) - 1, 8).round().astype(int)].ravel() for d in documents]).astype(float)
    y = np.array([stated_digit(d) for d in documents])
    squares = (x**2).sum(axis=1)
    distance = squares[:, None] - 2 * x @ x.T + squares[None, :]
    np.fill_diagonal(distance, np.inf)
    assert (y[distance.argmin(axis=1)] == y).mean() > 0.9


def test_the_shipped_config_makes_batches(monkeypatch):
    monkeypatch.chdir(ROOT)
    c = config.DataConfig.model_validate(yaml.safe_load((ROOT / "configs/data/demo.yaml").read_text())["data"])
    p = pipeline.Pipeline(c, batch_rows=20)
    b = p.batch(3)
    batch.validate(b, vocab_size=272)
    assert np.bincount(b.source).tolist() == [12, 3, 3, 2]
    assert (b.modality == document.IMAGE).any()
    assert (b.modality == document.AUDIO).any()
    assert min(p.fill().values()) > 0.8
    for name in NAMES:
        for held in p.holdout_batches(name, batches=1, batch_rows=2):
            batch.validate(held, vocab_size=272)
    assert not p.quarantine.records
