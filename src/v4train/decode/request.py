"""What is asked of the engine, and what it answers: requests, and streams of events."""

import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from v4train.decode import prompt as prompt_lib

_log = logging.getLogger(__name__)

MOST_LOGPROBS = 20
"""Alternatives of a token that a request may ask for."""

Finish = Literal["stop", "length", "cancelled"]


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What to continue, and how.

    Attributes:
        prompt: tokens and media, at least one token.
        max_tokens: most tokens of the answer; None: as many as the sequence may have.
        temperature: 0 is greedy.
        top_p: mass of the tokens that may be drawn.
        top_k: number of them; 0: all.
        seed: of the noise; None: another one each time.
        stop: texts that end the answer and are no part of it.
        top_logprobs: alternatives to be reported with each token.
        ignore_end: goes on after the end-of-sequence token, for measurements.
        score_prompt: report the likelihoods of the prompt's own tokens, see `Stream.prompt_scores`.
    """

    prompt: prompt_lib.Prompt
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    ignore_end: bool = False
    score_prompt: bool = False


class Scored(NamedTuple):
    """A token of a prompt.

    Attributes:
        logprob: nats, given all before it; None for the prompt's first.
        top: the most likely tokens at its place and their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """One token of an answer.

    Attributes:
        token: None if the answer ends without one (cancelled).
        text: whole characters that the token makes certain; they may belong to tokens before it.
        logprob: of the token in the model's distribution, nats.
        top: the most likely tokens and their log-probabilities, as many as were asked for.
        finish_reason: of the last event: ``stop`` (end of sequence, or a stop text), ``length`` or ``cancelled``; else None.
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: Finish | None = None


Listener = Callable[[Event | Exception], object]
"""Takes the events of a request, or the error that ended it."""


class Stream:
    """The events of one request, in order; iterating waits for them, and raises the error if the request failed."""

    def __init__(self, request: Request, *, seed: int, max_tokens: int, listener: Listener | None = None):
        """A stream without events. A listener is called on the engine's thread instead of filling the iterator."""
        self.request, self.seed, self.max_tokens = request, seed, max_tokens
        self.submitted, self.first_token = time.monotonic(), None  # seconds of the monotonic clock
        self.cancelled = False
        self.cached_tokens = 0  # of the prompt, that were not computed
        self.prompt_scores: list[Scored] = []  # complete before the first event, if they were asked for
        self.drafted, self.accepted = 0, 0  # guesses of tokens, and those that were right
        self._items: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._give, self._over = listener or self._items.put, False

    def cancel(self) -> None:
        """Ends the request at the next turn; from any thread, at any time."""
        self.cancelled = True

    def give(self, item: Event | Exception) -> None:
        """Called by the scheduler."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        try:
            self._give(item)
        except Exception:
            _log.exception("the listener of a request failed; the request is cancelled")
            self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        item = self._items.get()
        self._over = isinstance(item, Exception) or item.finish_reason is not None
        if isinstance(item, Exception):
            raise item
        return item
