"""Questions with several given answers, from JSON lines: which answer does the model find likeliest?

**The file** has one object a line. Which fields are read, the first that is there:

* the context: ``prompt``, ``ctx``, ``query``, ``goal``, ``question_stem`` as it is; or ``question`` as ``Question: ...\\nAnswer:``,
  behind a ``passage``, ``context``, ``support`` or ``article`` if there is one;
* the choices: ``choices``, ``endings``, ``options`` (a list of texts; ``{"text": [...], "label": [...]}``; or ``{"A": ..., "B":
  ...}``), or ``sol1`` and ``sol2``;
* the right one: ``answer``, ``answerKey``, ``gold``, ``label``, ``target``, ``answer_idx``: an index from 0, a label, a letter, or the
  text of a choice.

These are the shapes of MMLU, ARC, HellaSwag, PIQA, OpenBookQA and their like. A line of lm-eval's ``--log_samples`` is read too: its
``arguments`` are pairs of context and continuation, taken to the letter, and its ``target`` is the index.

**The score** of a choice is the log-likelihood of its text after the context. Between them stands one space, unless either brings white
space of its own. Context and choice are encoded together, because that is how text is encoded in training: a tokenizer may join the end
of one and the beginning of the other. Scored are the tokens behind the longest beginning that the encodings of the context and of all
its choices share, so all choices of a question are measured from one place. (lm-eval counts the context's tokens instead, per choice;
where no token crosses the border the two are the same.)

**Accuracy** is told twice: of the sums, and of the sums over the choices' bytes, which does not prefer short choices. A question whose
best score is shared counts by the share of the right choice, so that a model that knows nothing gets what guessing would give, whatever
the order of the choices. The standard error is the sample's: ``std / sqrt(n)``, n - 1 in the deviation.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from v4train.data import tokenizer as tokenizer_lib
from v4train.train.evals import judge

_CONTEXTS = ("prompt", "ctx", "query", "goal", "question_stem", "question")
_PASSAGES = ("passage", "context", "support", "article")
_CHOICES = ("choices", "endings", "options")
_ANSWERS = ("answer", "answerKey", "gold", "label", "target", "answer_idx")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a file.

    Attributes:
        where: file and line, for messages.
        context: what comes before every choice.
        continuations: what follows it, by choice, with the white space between.
        texts: of the choices, without it.
        answer: index of the right one.
    """

    where: str
    context: str
    continuations: tuple[str, ...]
    texts: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A question as documents, one a choice, and the bytes of each choice's text. ``cut`` says that its context lost its beginning."""

    question: Question
    documents: tuple[judge.Asked, ...]
    sizes: tuple[int, ...]
    cut: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """Of all questions of a file.

    Attributes:
        accuracy: share of right answers by the sum of log-likelihoods.
        accuracy_error: its standard error; NaN for a single question.
        accuracy_per_byte: by log-likelihood per byte.
        accuracy_per_byte_error: its standard error.
        nats_per_byte: of the right choices, all nats over all bytes.
        questions: how many.
        cut: how many of them lost the beginning of their context.
        scores: log-likelihoods by question and choice.
    """

    accuracy: float
    accuracy_error: float
    accuracy_per_byte: float
    accuracy_per_byte_error: float
    nats_per_byte: float
    questions: int
    cut: int
    scores: tuple[tuple[float, ...], ...]

    @property
    def fields(self) -> dict[str, float]:
        """The numbers by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "scores"}


def read(path: str | pathlib.Path, *, limit: int | None = None) -> list[Question]:
    """The questions of a file, or the first ``limit`` of them.

    Raises:
        ValueError: no such file, or a line that is no question; the message names file, line, what was found and what to do.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror} (from {pathlib.Path.cwd()}); name a file of JSON lines, one question a line") from None
    found: list[Question] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(found) < limit):
            found.append(_question(line, where=f"{path}:{number}"))
    if not found:
        raise ValueError(f'{path}: has no questions; write one a line: {{"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}}')
    return found


def encode(questions: Sequence[Question], *, tokenizer: tokenizer_lib.Tokenizer, length: int, cut: bool) -> list[Encoded]:
    """Documents of at most ``length`` tokens.

    Args:
        questions: see `read`.
        tokenizer: of the model.
        length: tokens of a row.
        cut: drop the beginning of a context that is too long; otherwise it is refused.

    Raises:
        ValueError: a question does not fit into a row.
    """
    return [_encode(question, tokenizer=tokenizer, length=length, cut=cut) for question in questions]


def result(encoded: Sequence[Encoded], verdicts: Sequence[judge.Verdict]) -> Result:
    """Accuracies from the verdicts on all documents, question after question."""
    remaining = iter(verdicts)
    scores = [np.array([-next(remaining).nats for _ in item.documents]) for item in encoded]
    plain = np.array([_credit(s, item.question.answer) for s, item in zip(scores, encoded, strict=True)])
    per_byte = np.array([_credit(s / np.array(item.sizes), item.question.answer) for s, item in zip(scores, encoded, strict=True)])
    right = [(-s[item.question.answer], item.sizes[item.question.answer]) for s, item in zip(scores, encoded, strict=True)]
    nats, size = np.sum(right, axis=0)
    return Result(
        accuracy=float(plain.mean()),
        accuracy_error=_error(plain),
        accuracy_per_byte=float(per_byte.mean()),
        accuracy_per_byte_error=_error(per_byte),
        nats_per_byte=float(nats / size),
        questions=len(encoded),
        cut=sum(item.cut for item in encoded),
        scores=tuple(tuple(s.tolist()) for s in scores),
    )


def ask(encoded: Sequence[Encoded], *, judged: judge.Judge, params: dict) -> Result:
    """All questions, at once."""
    return result(encoded, judged(params, [document for item in encoded for document in item.documents]))


def _credit(scores: np.ndarray, answer: int) -> float:
    """1 for the right choice alone on top, 0 if it is not; of n on top, 1 / n. NaN is never on top."""
    best = scores == np.max(np.where(np.isnan(scores), -np.inf, scores))
    return float(best[answer] / best.sum()) if best.any() else 0.0


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _question(line: bytes, *, where: str) -> Question:
    try:
        said = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
    if not isinstance(said, dict):
        raise ValueError(f'{where}: {_shown(said)} is not an object; write {{"prompt": ..., "choices": [...], "answer": ...}}')
    if "arguments" in said and not any(name in said for name in _CHOICES):
        return _logged(said, where=where)
    context, (texts, labels) = _context(said, where=where), _choices(said, where=where)
    answer = _answer(said, texts=texts, labels=labels, where=where)
    return Question(where, context, tuple(_joint(context, text) + text for text in texts), texts, answer)


def _context(said: dict[str, Any], *, where: str) -> str:
    name = next((name for name in _CONTEXTS if name in said), None)
    if name is None:
        raise ValueError(f"{where}: no context (found {_keys(said)}); add one of {', '.join(_CONTEXTS)}")
    if not isinstance(said[name], str):
        raise ValueError(f"{where}: {name} is {_shown(said[name])}; it must be a text")
    if name != "question":
        return said[name]
    passage = next((f"{said[name].strip()}\n" for name in _PASSAGES if isinstance(said.get(name), str)), "")
    return f"{passage}Question: {said[name].strip()}\nAnswer:"


def _choices(said: dict[str, Any], *, where: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Texts, and labels if the file has them."""
    name = next((name for name in _CHOICES if name in said), None)
    if name is None and {"sol1", "sol2"} <= said.keys():
        name, given = "sol1, sol2", [said["sol1"], said["sol2"]]
    elif name is None:
        raise ValueError(f"{where}: no choices (found {_keys(said)}); add one of {', '.join(_CHOICES)}: a list of texts")
    else:
        given = said[name]
    labels = None
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        given, labels = given["text"], given.get("label")
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(given)):
            raise ValueError(f"{where}: {name} has {len(given)} texts, but {_shown(labels)} for labels; give as many, or none")
    elif isinstance(given, dict):
        given, labels = list(given.values()), list(given)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{where}: {name} is {_shown(given)}; it must be a list of two texts or more")
    for i, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            what = "empty" if isinstance(text, str) else _shown(text)
            raise ValueError(f"{where}: {name}[{i}] is {what}; a choice is a text that is not blank: it is scored by its tokens and bytes")
    return tuple(given), None if labels is None else tuple(str(label) for label in labels)


def _answer(said: dict[str, Any], *, texts: tuple[str, ...], labels: tuple[str, ...] | None, where: str) -> int:
    name = next((name for name in _ANSWERS if name in said), None)
    if name is None:
        raise ValueError(f"{where}: no answer (found {_keys(said)}); add one of {', '.join(_ANSWERS)}: an index from 0, a letter or a text")
    given, count = said[name], len(texts)
    if isinstance(given, int) and not isinstance(given, bool):
        meanings = [given] if 0 <= given < count else []
    elif isinstance(given, str):
        meanings = list(dict.fromkeys(_meanings(given.strip(), texts=texts, labels=labels)))
    else:
        meanings = []
    if len(meanings) > 1:
        raise ValueError(f"{where}: {name} {_shown(given)} may be {' or '.join(f'choice {i}' for i in meanings)}; give the index, from 0")
    if not meanings:
        allowed = f"0 to {count - 1}, {', '.join(labels or _LETTERS[:count])}, or the text of a choice"
        raise ValueError(f"{where}: {name} is {_shown(given)}, which is none of the {count} choices; allowed: {allowed}")
    return meanings[0]


def _meanings(given: str, *, texts: tuple[str, ...], labels: tuple[str, ...] | None) -> Iterator[int]:
    """All choices that a text may name."""
    if labels is not None:
        yield from (i for i, label in enumerate(labels) if label == given)
    elif given.isdecimal() and int(given) < len(texts):
        yield int(given)
    elif len(given) == 1 and given.upper() in _LETTERS[: len(texts)]:
        yield _LETTERS.index(given.upper())
    yield from [i for i, text in enumerate(texts) if text == given][:1]


def _logged(said: dict[str, Any], *, where: str) -> Question:
    """A line of lm-eval's ``--log_samples``; newer versions write ``{"gen_args_0": {"arg_0": ..., "arg_1": ...}, ...}`` for the list."""
    given = said["arguments"]
    if isinstance(given, dict):
        given = [[each.get("arg_0"), each.get("arg_1")] if isinstance(each, dict) else each for each in given.values()]
    pairs = [(str(pair[0]), str(pair[1])) for pair in given if _is_pair(pair)]
    if len(pairs) < 2 or len(pairs) != len(given) or len({context for context, _ in pairs}) != 1:
        what = _shown(said["arguments"])
        raise ValueError(f"{where}: arguments is {what}; it must be two pairs or more of one context and a continuation")
    texts = tuple(continuation.strip() for _, continuation in pairs)
    if not all(texts):
        raise ValueError(f"{where}: arguments[{texts.index('')}] has an empty continuation; leave the line out")
    return Question(where, pairs[0][0], tuple(c for _, c in pairs), texts, _answer(said, texts=texts, labels=None, where=where))


def _is_pair(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 2 and all(isinstance(part, str) for part in given)


def _joint(context: str, text: str) -> str:
    return "" if not context or context[-1].isspace() or text[0].isspace() else " "


def _encode(question: Question, *, tokenizer: tokenizer_lib.Tokenizer, length: int, cut: bool) -> Encoded:
    wholes = [tokenizer.encode(question.context + text).astype(np.int32) for text in question.continuations]
    shared = tokenizer.encode(question.context).astype(np.int32)
    for whole in wholes:
        shared = shared[: judge.shared(shared, whole)]
    start = len(shared)
    extra = max(len(whole) for whole in wholes) + 1 - length
    if extra > 0 and (not cut or extra > start):
        how = "the choices alone do not fit" if extra > start else "drop the beginning of its context (long: cut), or use longer rows"
        raise ValueError(f"{question.where}: {extra + length} tokens, but a row has {length}: {how}")
    dropped = max(extra, 0)
    documents = (np.concatenate([[tokenizer.bos], whole[dropped:]]).astype(np.int32) for whole in wholes)
    asked = tuple(judge.Asked(document, start - dropped + 1) for document in documents)
    return Encoded(question, asked, tuple(len(text.strip().encode()) for text in question.texts), extra > 0)


def _keys(said: dict[str, Any]) -> str:
    return ", ".join(said) or "nothing"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
