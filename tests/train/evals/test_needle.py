"""Needles are where they should be, and haystacks as long as they should be."""

import re

import numpy as np
import pytest

from v4train.data import config, tokenizer
from v4train.train.evals import judge, needle

BYTES = tokenizer.ByteTokenizer()
HAY = needle.haystack(needle.text(), tokenizer=BYTES, source="")
FACT = re.compile(r"\nThe secret number of (\w+) is (\d{5})\.\n")


@pytest.mark.parametrize("length", [100, 128, 1000, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_length_depth_question_and_answer(length, depth):
    for seed in range(5):
        asked = needle.document(HAY, tokenizer=BYTES, length=length, depth=depth, seed=(seed,))
        assert len(asked.tokens) == length
        assert asked.tokens[0] == BYTES.bos
        text = BYTES.decode(asked.tokens[1:])
        place, number = FACT.search(text).groups()
        assert text.endswith(f"\nThe secret number of {place} is {number}")
        assert BYTES.decode(asked.tokens[asked.start :]) == f" {number}"
        room = length - 1 - len(FACT.search(text)[0]) - len(text) + text.rindex("\nThe secret")
        before = FACT.search(text).start()
        assert round(depth * room) - 16 <= before <= round(depth * room)
        assert len(re.findall("secret", text)) == 2


def test_no_word_is_torn():
    for seed in range(20):
        text = BYTES.decode(needle.document(HAY, tokenizer=BYTES, length=600, depth=0.5, seed=(seed,)).tokens[1:])
        fact = FACT.search(text)
        assert text[fact.start() - 1].isspace() or text[fact.end()].isspace()


def test_samples_differ_and_are_the_same_every_time():
    made = [needle.document(HAY, tokenizer=BYTES, length=300, depth=0.5, seed=(seed,)).tokens.tolist() for seed in (0, 1, 2, 0)]
    assert made[0] == made[3]
    assert made[0] != made[1] != made[2]


def test_what_has_no_room_is_refused():
    with pytest.raises(ValueError, match=r"needle: a length of 40 tokens has no room for fact and question, which take \d+; raise it"):
        needle.document(HAY, tokenizer=BYTES, length=40, depth=0.5, seed=(0,))
    with pytest.raises(ValueError, match=r"book.txt: has no text for a haystack"):
        needle.haystack("", tokenizer=BYTES, source="book.txt")


def test_a_short_text_is_repeated_and_another_tokenizer_is_served(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [needle.text()], tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    made.save(str(tmp_path / "tokenizer.json"))
    bpe = tokenizer.build(config.HuggingFaceTokenizerConfig(path=str(tmp_path / "tokenizer.json")))
    hay = needle.haystack("Few words only. ", tokenizer=bpe, source="")
    asked = needle.document(hay, tokenizer=bpe, length=400, depth=0.5, seed=(0,))
    assert len(asked.tokens) == 400
    text = bpe.decode(asked.tokens[1:])
    place, number = FACT.search(text).groups()
    assert bpe.decode(asked.tokens[asked.start :]) == f" {number}"
    assert text.endswith(f"{place} is {number}")


def test_fields():
    cells = [needle.Cell(128, 0.25, 2, 0.5, 3.0), needle.Cell(128, 1.0, 2, 1.0, 1.0)]
    found = needle.fields(cells)
    assert found == {
        "right": 0.75,
        "nats": 2.0,
        **{"128/0.25/right": 0.5, "128/0.25/nats": 3.0, "128/1/right": 1.0, "128/1/nats": 1.0},
    }


def test_shared_beginnings():
    cases = [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([5], [6], 0)]
    for first, second, wanted in cases:
        assert judge.shared(np.array(first), np.array(second)) == wanted
