"""Tokens to text while they come: whole characters only, and nothing that may yet turn out to be a stop text.

A token is not a piece of text. A character of several bytes may be spread over several tokens, and some tokenizers write a token
differently after another one. So the text of the last tokens is decoded anew with each one, and what is new of it is given out; its end is
held back while it reads as an incomplete character. The pieces together are exactly what `decode` makes of all tokens at once.

A stop text is not part of an answer, and it may begin in one piece and end in another: the longest end of the text that could begin one is
held back too.
"""

from collections.abc import Sequence

import numpy as np

from v4train.data import tokenizer as tokenizer_lib

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 3
"""Replacement characters that an incomplete character may show as: one, or one for each of its bytes."""


class Detokenizer:
    """Ids of one sequence in, whole characters out."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the latest tokens
        self._given = 0  # characters of their text that are out
        self._settled = 0  # tokens of the context whose text is all out

    def push(self, token: int) -> str:
        """The text that a token completes; "" if it ends within a character."""
        self._context.append(token)
        text = self._decode()
        whole = len(text) - min(_LONGEST, len(text) - len(text.rstrip(_INCOMPLETE)))
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if whole == len(text):
            # The tokens before the last whole ones can no longer change what follows.
            self._context = self._context[self._settled :]
            self._settled, self._given = len(self._context), len(self._decode())
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        piece = self._decode()[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(np.array(self._context, np.int64))


class Answer:
    """The text of one answer, which ends before the first of its stop texts."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer, *, stop: Sequence[str] = ()):
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is now certain. Sets ``stopped`` when a stop text is complete; what comes before it is in the piece."""
        return self._release(self._detokenizer.push(token), hold=True)

    def flush(self) -> str:
        """The rest, when the answer ends for another reason."""
        return self._release(self._detokenizer.flush(), hold=False)

    def _release(self, new: str, *, hold: bool) -> str:
        text = self._held + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((_overlap(text, stop) for stop in self._stop), default=0) if hold else 0
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
