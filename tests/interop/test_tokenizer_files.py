"""The exported byte tokenizer gives the ids that the model was trained on, for any text, in other people's library."""

import json
import random

import pytest
import tokenizers

from v4train.data import tokenizer as tokenizer_lib
from v4train.interop import tokenizer_files

OURS = tokenizer_lib.ByteTokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    where = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files.write_bytes(where, names=OURS.names, special={"bos": OURS.bos, "eos": OURS.eos, "pad": OURS.pad}, longest=4096)
    return where


@pytest.fixture(scope="module")
def theirs(directory):
    return tokenizers.Tokenizer.from_file(str(directory / tokenizer_files.TOKENIZER))


def random_texts() -> list[str]:
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(200))) for _ in range(300)]


@pytest.mark.parametrize(
    "text", ["", " ", " lead", "two  spaces\r\n\ttab", "e\u0301 is not \u00e9", "<eos> and <0x41> are text", "\x00\x7f", "漢字 🎉"]
)
def test_same_ids_for_awkward_texts(theirs, text):
    assert theirs.encode(text).ids == OURS.encode(text).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text


def test_same_ids_for_random_texts(theirs):
    for text in random_texts():
        assert theirs.encode(text).ids == OURS.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text


def test_special_ids_have_their_names(theirs, directory):
    assert theirs.get_vocab_size() == OURS.vocab_size
    ids = [OURS.bos, 65, OURS.eos, OURS.image, 271]
    assert theirs.decode(ids, skip_special_tokens=False) == OURS.decode(ids)
    config = json.loads((directory / tokenizer_files.CONFIG).read_text())
    assert theirs.token_to_id(config["eos_token"]) == OURS.eos
    assert theirs.token_to_id(config["bos_token"]) == OURS.bos
    assert theirs.token_to_id(config["pad_token"]) == OURS.pad
    assert config["split_special_tokens"] is True
    assert config["model_max_length"] == 4096


def test_a_tokenizer_with_a_file_is_copied(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from/mine.json").write_text("{}")
    tokenizer_files.copy(tmp_path / "from/mine.json", tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["tokenizer.json"]
    (tmp_path / "from/tokenizer_config.json").write_text("[]")
    tokenizer_files.copy(tmp_path / "from/mine.json", tmp_path / "to")
    assert (tmp_path / "to/tokenizer_config.json").read_text() == "[]"


@pytest.mark.interop
def test_transformers_gives_the_same_ids(directory):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    for text in ["a <eos> b", *random_texts()[:50]]:
        assert loaded(text).input_ids == OURS.encode(text).tolist()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (OURS.bos, OURS.eos, OURS.pad)
    assert loaded.decode([97, OURS.eos, 98], skip_special_tokens=True) == "ab"
