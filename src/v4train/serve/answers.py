"""Answers in the words of OpenAI's two text interfaces: whole, and in the chunks of a stream."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import request as request_lib
from v4train.decode import text as text_lib

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Likely:
    """A token, what it is spelled as, and its log-probability (nats; None for the first token of a prompt); ``spelling`` is None where its
    bytes are not known."""

    token: int
    text: str
    spelling: bytes | None
    logprob: float | None


@dataclasses.dataclass(frozen=True)
class Scored:
    """A token of an answer, the most likely ones at its place, and where its text begins in the answer."""

    chosen: Likely
    top: tuple[Likely, ...]
    offset: int


@dataclasses.dataclass
class Choice:
    """One answer as far as it is known.

    Attributes:
        index: among those of the request.
        text: so far; with ``echo``, the prompt before it.
        tokens: so far, the one that ends the sequence included.
        scored: tokens, if their likelihoods were asked for; without the one that ends the sequence.
        finish: why it ended.
    """

    index: int
    text: str = ""
    tokens: int = 0
    scored: list[Scored] = dataclasses.field(default_factory=list)
    finish: str | None = None


class Speller:
    """Single tokens as text and bytes."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
        self._tokenizer = tokenizer

    def likely(self, token: int, logprob: float | None) -> Likely:
        """A token with its spelling."""
        text = self._tokenizer.decode(np.array([token]))
        if _INCOMPLETE not in text:
            return Likely(token, text, text.encode(), logprob)
        single = isinstance(self._tokenizer, tokenizer_lib.ByteTokenizer) and token < 256
        return Likely(token, text, bytes([token]) if single else None, logprob)

    def prompt(self, scores: Sequence[request_lib.Scored]) -> list[Scored]:
        """The tokens of a prompt, with the places of their text in it."""
        found, offset, words = [], 0, text_lib.Detokenizer(self._tokenizer)
        for one in scores:
            top = tuple(self.likely(*each) for each in one.top)
            found.append(Scored(self.likely(one.token, one.logprob), top, offset))
            offset += len(words.push(one.token))
        return found

    def scored(self, event: request_lib.Event, *, offset: int, end: bool = False) -> Scored | None:
        """The token of an event; None if there is none to report. The one that ends a sequence is reported if ``end``."""
        if event.token is None or event.logprob is None or (event.token == self._tokenizer.eos and not end):
            return None
        return Scored(self.likely(event.token, event.logprob), tuple(self.likely(*each) for each in event.top), offset)


class Shape(Protocol):
    """How an interface writes answers."""

    prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, choice: Choice, *, scores: bool) -> dict[str, Any]:
        """A complete answer."""
        ...

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice, if it has one without text."""
        ...

    def chunk(self, choice: Choice, *, text: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        """What is new of a choice."""
        ...


class CompletionShape(Shape):
    """``/v1/completions``."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *, tops: int = 0):
        """``tops``: alternatives of each token that were asked for."""
        self._tops = tops

    def whole(self, choice: Choice, *, scores: bool) -> dict[str, Any]:
        """See `Shape`."""
        return self.chunk(choice, text=choice.text, scored=choice.scored if scores else None)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """See `Shape`."""
        return None

    def chunk(self, choice: Choice, *, text: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        """See `Shape`."""
        logprobs = None
        if scored is not None:
            logprobs = {
                "tokens": [_key(each.chosen) for each in scored],
                "token_logprobs": [each.chosen.logprob for each in scored],
                "top_logprobs": [_by_key(each) for each in scored] if self._tops else None,
                "text_offset": [each.offset for each in scored],
            }
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice, *, scores: bool) -> dict[str, Any]:
        """See `Shape`."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._choice(choice, {"message": message}, choice.scored if scores else None)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """See `Shape`."""
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: Choice, *, text: str, scored: Sequence[Scored] | None) -> dict[str, Any]:
        """See `Shape`."""
        return self._choice(choice, {"delta": {"content": text} if text else {}}, scored)

    def _choice(self, choice: Choice, said: dict[str, Any], scored: Sequence[Scored] | None) -> dict[str, Any]:
        logprobs = None
        if scored is not None:
            content = [self._token(each.chosen) | {"top_logprobs": [self._token(one) for one in each.top]} for each in scored]
            logprobs = {"content": content, "refusal": None}
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish}

    def _token(self, likely: Likely) -> dict[str, Any]:
        spelling = None if likely.spelling is None else list(likely.spelling)
        return {"token": likely.text, "logprob": likely.logprob, "bytes": spelling}


class Envelope:
    """What stands around the choices: the same id and time in every chunk."""

    def __init__(self, shape: Shape, *, model: str):
        self.shape = shape
        self._same = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is complete."""
        return {**self._same, "object": self.shape.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self._same, "object": self.shape.chunk_object, "choices": choices, **more}


def usage(*, prompts: Sequence[request_lib.Stream], choices: Sequence[Choice], streams: Sequence[request_lib.Stream]) -> dict[str, Any]:
    """Tokens that a request took.

    Args:
        prompts: one stream for each different prompt, whose tokens are counted.
        choices: all answers.
        streams: of all answers.
    """
    asked, made = sum(len(stream.request.prompt) for stream in prompts), sum(choice.tokens for choice in choices)
    drafted, accepted = sum(stream.drafted for stream in streams), sum(stream.accepted for stream in streams)
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens for stream in prompts)},
        "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted},
    }


def _by_key(one: Scored) -> dict[str, float | None] | None:
    """The likely tokens at a place; None at the first of a prompt, where nothing is known."""
    return None if one.chosen.logprob is None else {_key(each): each.logprob for each in one.top}


def _key(likely: Likely) -> str:
    """A token as the key of a dictionary: different tokens differ, also where they are parts of characters."""
    if _INCOMPLETE not in likely.text:
        return likely.text
    if likely.spelling is None:
        return f"token_id:{likely.token}"
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in likely.spelling)
