"""A request on its way through the scheduler, and how far it is."""

import dataclasses
from typing import Any

from v4train.decode import prefix as prefix_lib
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib
from v4train.decode import text


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request and how far it is.

    Attributes:
        slot: -1: none.
        read: tokens of the prompt that the cache holds.
        produced: tokens of the answer.
        last: the token that the next step processes.
        draft: and what may follow it.
        past: all tokens of the answer.
        again: while they are processed again: how many are.
        reuse: while its beginning is taken up.
        state: that later prompts may take up, and the tokens that the cache held then; with `decode.keep_answers`.
    """

    stream: request_lib.Stream
    answer: text.Answer
    slot: int = -1
    read: int = 0
    produced: int = 0
    last: int = 0
    draft: int | None = None
    past: list[int] = dataclasses.field(default_factory=list)
    again: int | None = None
    reuse: prefix_lib.Reuse | None = None
    state: tuple[int, Any] | None = None

    @property
    def prompt(self) -> prompt_lib.Prompt:
        """What it began with."""
        return self.stream.request.prompt

    @property
    def held(self) -> int:
        """Tokens of the sequence that the cache holds: the newest has yet to be processed."""
        return self.read + (max(self.produced - 1, 0) if self.again is None else self.again)

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.stream.max_tokens

    @property
    def answering(self) -> bool:
        """Whether the whole prompt is read."""
        return self.read == len(self.prompt)
