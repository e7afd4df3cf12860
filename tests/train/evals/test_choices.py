"""Reading questions, and accuracies by hand. No model: that is `test_judge`'s."""

import json
import math
import pathlib

import numpy as np
import pytest
import tokenizers

from v4train.data import config, tokenizer
from v4train.train.evals import choices, judge

BYTES = tokenizer.ByteTokenizer()
QUESTIONS = pathlib.Path(__file__).parents[3] / "data" / "demo" / "questions.jsonl"


def write(path, *lines):
    path.write_text("".join(f"{json.dumps(line) if isinstance(line, dict) else line}\n" for line in lines), encoding="utf-8")
    return path


def one(tmp_path, **fields):
    (found,) = choices.read(write(tmp_path / "one.jsonl", fields))
    return found


def test_the_shipped_questions_can_be_read_and_have_right_answers():
    found = choices.read(QUESTIONS)
    assert len(found) == 32
    answers = {q.context.split("\n")[0]: q.texts[q.answer] for q in found}
    assert answers["Question: Which operator is floor division?"] == "//"
    assert answers["bool is a subclass of"] == "int"
    assert answers["A list comprehension is written between"] == "square brackets"
    assert answers["Question: Which module reads and writes JSON?"] == "json"
    places = np.bincount([q.answer for q in found])
    assert places.max() <= 16, "a model that always takes one place must not look good"


@pytest.mark.parametrize(
    ("fields", "context", "continuations", "answer"),
    [
        ({"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0}, "1 + 1 =", (" 2", " 3"), 0),
        ({"prompt": "so ", "choices": ["a", "b"], "answer": "b"}, "so ", ("a", "b"), 1),
        ({"prompt": "so", "choices": ["\na", " b"], "answer": 1}, "so", ("\na", " b"), 1),
        ({"prompt": "", "choices": ["x", "y"], "answer": 1}, "", ("x", "y"), 1),
        ({"question": "Who? ", "choices": ["I", "you"], "answer": "B"}, "Question: Who?\nAnswer:", (" I", " you"), 1),
        (
            {"context": "I am here.", "question": "Who?", "choices": ["I", "you"], "answer": "A"},
            "I am here.\nQuestion: Who?\nAnswer:",
            (" I", " you"),
            0,
        ),
        ({"ctx": "He", "endings": ["ran", "sat", "ate"], "label": "2"}, "He", (" ran", " sat", " ate"), 2),
        ({"question_stem": "He", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "He", (" a", " b"), 1),
        ({"query": "He", "options": {"A": "ran", "B": "sat"}, "answer_idx": "B"}, "He", (" ran", " sat"), 1),
        ({"goal": "Go", "sol1": "walk", "sol2": "sit", "label": 0}, "Go", (" walk", " sit"), 0),
        ({"prompt": "naïve 你好", "choices": ["🙂", "é"], "answer": "é"}, "naïve 你好", (" 🙂", " é"), 1),
        ({"arguments": [["Q:", " yes"], ["Q:", " no"]], "target": 1}, "Q:", (" yes", " no"), 1),
        (
            {"arguments": {"gen_args_0": {"arg_0": "Q:", "arg_1": " yes"}, "gen_args_1": {"arg_0": "Q:", "arg_1": " no"}}, "target": "0"},
            "Q:",
            (" yes", " no"),
            0,
        ),
    ],
)
def test_fields_that_are_read(tmp_path, fields, context, continuations, answer):
    found = one(tmp_path, **fields)
    assert (found.context, found.continuations, found.answer) == (context, continuations, answer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"one.jsonl:2: not JSON \(.*\); write one object a line"),
        ("[1]", r"one.jsonl:2: \[1\] is not an object"),
        ({"text": "x"}, r"one.jsonl:2: no context \(found text\); add one of prompt"),
        ({"prompt": 3, "choices": ["a", "b"], "answer": 0}, r":2: prompt is 3; it must be a text"),
        ({"prompt": "x", "answer": 0}, r":2: no choices \(found prompt, answer\); add one of choices"),
        ({"prompt": "x", "choices": [], "answer": 0}, r":2: choices is \[\]; it must be a list of two texts or more"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, r":2: choices is \[\"a\"\]; it must be"),
        ({"prompt": "x", "choices": ["a", " "], "answer": 0}, r":2: choices\[1\] is empty; a choice is a text that is not blank"),
        ({"prompt": "x", "choices": ["a", 3], "answer": 0}, r":2: choices\[1\] is 3; a choice is"),
        ({"prompt": "x", "choices": {"text": ["a", "b"], "label": "1"}, "answer": 0}, r":2: choices has 2 texts, but \"1\" for labels"),
        ({"prompt": "x", "choices": ["a", "b"]}, r":2: no answer \(found prompt, choices\); add one of answer"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, r":2: answer is 2, which is none of the 2 choices; allowed: 0 to 1, A, B,"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": -1}, r":2: answer is -1, which is none"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, r":2: answer is true, which is none"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": None}, r":2: answer is null, which is none"),
        ({"prompt": "x", "choices": ["B", "A"], "answer": "A"}, r':2: answer "A" may be choice 0 or choice 1; give the index'),
        ({"arguments": [["Q:", " yes"], ["R:", " no"]], "target": 1}, r":2: arguments is .*; it must be two pairs"),
        ({"arguments": [["Q:", " yes"], ["Q:", " "]], "target": 1}, r":2: arguments\[1\] has an empty continuation"),
    ],
)
def test_what_is_no_question_is_told_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "one.jsonl", {"prompt": "x", "choices": ["a", "b"], "answer": 0}, line)
    with pytest.raises(ValueError, match=message):
        choices.read(path)
    assert len(choices.read(path, limit=1)) == 1


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: No such file or directory \(from .*\); name a file of JSON lines"):
        choices.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"one.jsonl: has no questions; write one a line"):
        choices.read(write(tmp_path / "one.jsonl", "", "  "))
    (tmp_path / "two.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(ValueError, match=r"two.jsonl:1: not JSON"):
        choices.read(tmp_path / "two.jsonl")


def test_bytes_are_scored_from_where_the_choices_begin(tmp_path):
    question = one(tmp_path, prompt="né", choices=["ab", "你"], answer=1)
    (item,) = choices.encode([question], tokenizer=BYTES, length=32, cut=False)
    assert [d.tokens.tolist() for d in item.documents] == [[BYTES.bos, *"né ab".encode()], [BYTES.bos, *"né 你".encode()]]
    # The space between is scored too: it is where the encoding of the context ends.
    assert [d.start for d in item.documents] == [4, 4]
    assert item.sizes == (2, 3)
    assert not item.cut


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer that joins ``b`` and ``c``, and a space with what follows it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"bc": 256, "Ġa": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("b", "c"), ("Ġ", "a")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    path = tmp_path_factory.mktemp("merging") / "tokenizer.json"
    made.save(str(path))
    return tokenizer.build(config.HuggingFaceTokenizerConfig(path=str(path)))


def test_a_token_across_the_border_moves_it_for_all_choices(merging):
    """``ab`` + ``c`` is ``a bc``: what is shared ends before ``b``, also for the choice that joins nothing."""
    question = choices.Question("x:1", "ab", ("c", "d"), ("c", "d"), 0)
    (item,) = choices.encode([question], tokenizer=merging, length=32, cut=False)
    a, b, d = merging.encode("abd").tolist()
    assert [document.tokens.tolist() for document in item.documents] == [[merging.bos, a, 256], [merging.bos, a, b, d]]
    assert [document.start for document in item.documents] == [2, 2]


def test_a_space_at_the_end_of_a_context_joins_the_choice(merging):
    """As lm-eval moves it: the model is never asked for a token that does not occur in text."""
    question = choices.Question("x:1", "d ", ("a", "d"), ("a", "d"), 0)
    (item,) = choices.encode([question], tokenizer=merging, length=32, cut=False)
    assert [document.tokens.tolist()[1:] for document in item.documents] == [merging.encode(text).tolist() for text in ("d a", "d d")]
    assert [document.start for document in item.documents] == [2, 2]


def test_a_long_context_loses_its_beginning_or_is_refused(tmp_path):
    question = one(tmp_path, prompt="0123456789", choices=["ab", "c"], answer=1)  # 1 + 10 + 1 + 2 = 14 tokens
    assert not choices.encode([question], tokenizer=BYTES, length=14, cut=False)[0].cut
    with pytest.raises(ValueError, match=r"one.jsonl:1: 14 tokens, but a row has 12: drop the beginning of its context \(long: cut\)"):
        choices.encode([question], tokenizer=BYTES, length=12, cut=False)
    (item,) = choices.encode([question], tokenizer=BYTES, length=12, cut=True)
    assert [BYTES.decode(d.tokens[1:]) for d in item.documents] == ["23456789 ab", "23456789 c"]
    assert [BYTES.decode(d.tokens[d.start :]) for d in item.documents] == [" ab", " c"]
    assert item.cut
    with pytest.raises(ValueError, match="the choices alone do not fit"):
        choices.encode([question], tokenizer=BYTES, length=3, cut=True)


def encoded(*sizes, answer=0):
    question = choices.Question("x:1", "", ("",) * len(sizes), ("",) * len(sizes), answer)
    return choices.Encoded(question, (judge.Asked(np.zeros(2, np.int32), 1),) * len(sizes), sizes, False)


def verdicts(*nats):
    return [judge.Verdict(value, False) for value in nats]


def test_accuracies_by_hand():
    """Four questions: right both ways; right only by byte; a tie of two; wrong."""
    items = [encoded(1, 1), encoded(8, 2), encoded(1, 1, 1), encoded(2, 2)]
    found = choices.result(items, verdicts(1.0, 2.0, 4.0, 3.0, 5.0, 5.0, 6.0, 3.0, 2.0))
    plain, per_byte = [1, 0, 0.5, 0], [1, 1, 0.5, 0]
    assert found.accuracy == pytest.approx(np.mean(plain))
    assert found.accuracy_per_byte == pytest.approx(np.mean(per_byte))
    assert found.accuracy_error == pytest.approx(np.std(plain, ddof=1) / 2)
    assert found.accuracy_per_byte_error == pytest.approx(np.std(per_byte, ddof=1) / 2)
    assert found.nats_per_byte == pytest.approx((1 + 4 + 5 + 3) / (1 + 8 + 1 + 2))
    assert (found.questions, found.cut) == (4, 0)
    assert found.scores[1] == (-4.0, -3.0)


def test_one_question_has_no_error_and_nan_is_never_right():
    assert math.isnan(choices.result([encoded(1, 1)], verdicts(1.0, 2.0)).accuracy_error)
    assert choices.result([encoded(1, 1)], verdicts(math.nan, 2.0)).accuracy == 0
    assert choices.result([encoded(1, 1)], verdicts(math.nan, math.nan)).accuracy == 0
    assert choices.result([encoded(1, 1)], verdicts(1.0, math.nan)).accuracy == 1
