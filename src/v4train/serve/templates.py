"""Chat templates: a conversation becomes control tokens, text and media, in the form that the model was taught.

**Text is never control.** A template writes control tokens by their names (``<｜User｜>``), into the same string as the words of whoever
sends the request. A server that joins everything and lets the tokenizer find the names lets any message, and any web page that an
application quotes in one, open a turn of its own. Here

1. a *mark*, a character that occurs nowhere in the conversation, is put into every client's text: inside each name of a control token
   that it spells, and at the ends of the text, so that no name can begin or end in it either;
2. the template is rendered: ``trim`` and the like work, because the marks stand next to letters;
3. the result is cut at the names of control tokens. Names with a mark in them are none;
4. the marks are removed, and what lies between control tokens is encoded as text, as one piece: a message and the words of the
   template around it are tokenised together, as the model was trained.

For texts that spell no control token the ids are those that `transformers` makes of the same template; a test compares them. (Its own way,
to give the tokenizer the joined string, is the rejected alternative.)

Three templates, in this order: the one that lies beside the tokenizer (Jinja, in the sandbox and with the functions that `transformers`
gives it); DeepSeek-V4's, which the released model ships as Python and not as Jinja, where the vocabulary is its; else the plain one,
for models that were not taught to chat: names of the speakers and blank lines, in text, because there is nothing else. **There, text can
look like a turn.**
"""

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import record

_MARKS = (0xF0000, 0xFFFFE)  # a plane of private use

Piece = record.Part | np.ndarray
"""Text, media, or ids of control tokens."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: who speaks, and texts and media in reading order."""

    role: str
    parts: tuple[record.Part, ...]
    name: str | None = None


class Template(Protocol):
    """Turns of a conversation to the pieces of a prompt that ends where the answer begins."""

    stop: tuple[str, ...] = ()
    """Texts that end an answer besides those of the request."""

    def render(self, turns: Sequence[Turn], *, options: Mapping[str, Any]) -> list[Piece]:
        """Raises ValueError if the template refuses the conversation, or does not know an option."""
        ...


def choose(*, source: str | None, tokenizer: tokenizer_lib.Tokenizer) -> Template:
    """The template of a model; ``source`` is the Jinja text beside its tokenizer."""
    if source is not None:
        return JinjaTemplate(source, tokenizer=tokenizer)
    names = tokenizer.control_tokens()
    if all(name in names for name in (DeepSeekTemplate.user, DeepSeekTemplate.assistant, *DeepSeekTemplate.thinking)):
        return DeepSeekTemplate(tokenizer)
    return PlainTemplate(tokenizer)


class DeepSeekTemplate(Template):
    """DeepSeek-V4's: ``bos system <｜User｜> text <｜Assistant｜> </think> text eos ...``; with ``thinking: true`` the answer begins with
    ``<think>``."""

    user, assistant, thinking = "<｜User｜>", "<｜Assistant｜>", ("<think>", "</think>")

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
        names = tokenizer.control_tokens()
        self._bos, self._eos = np.array([tokenizer.bos]), np.array([tokenizer.eos])
        self._user = np.array([names[self.user]])
        self._answer, self._think = (np.array([names[self.assistant], names[end]]) for end in reversed(self.thinking))

    def render(self, turns: Sequence[Turn], *, options: Mapping[str, Any]) -> list[Piece]:
        """See `Template.render`."""
        unknown = sorted(options.keys() - {"thinking"})
        if unknown or type(options.get("thinking", False)) is not bool:
            raise ValueError(f"{', '.join(unknown) or 'thinking'}: the template of this model has the option thinking, true or false")
        pieces: list[Piece] = [self._bos]
        for before, turn in zip((None, *turns), turns, strict=False):
            if turn.role == "assistant":
                if before is None or before.role != "user":
                    raise ValueError("a message of the assistant must follow one of the user")
                pieces += [self._answer, *turn.parts, self._eos]
            else:
                pieces += [self._user, *turn.parts] if turn.role == "user" else turn.parts
        if turns[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return [*pieces, self._think if options.get("thinking") else self._answer]


class PlainTemplate(Template):
    """For models that were not taught to chat: ``User: ...``, ``Assistant: ...``, with blank lines between; a message of the system
    stands without a name."""

    stop = ("\n\nUser:",)

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
        self._bos = np.array([tokenizer.bos])

    def render(self, turns: Sequence[Turn], *, options: Mapping[str, Any]) -> list[Piece]:
        """See `Template.render`."""
        if options:
            raise ValueError(f"{', '.join(sorted(options))}: this model has no chat template, and so no options of one")
        pieces: list[Piece] = []
        for turn in turns:
            # An answer goes on behind "Assistant:", mostly with a space of its own: a conversation must read as it was written.
            first = next(iter(turn.parts), None)
            spaced = turn.role == "assistant" and isinstance(first, str) and first[:1].isspace()
            name = "" if turn.role == "system" else f"{turn.role.capitalize()}:" + " " * (not spaced)
            pieces += [name, *turn.parts, "\n\n"]
        return [self._bos, *_joined([*pieces, "Assistant:"])]


class JinjaTemplate(Template):
    """The template that lies beside a tokenizer."""

    def __init__(self, source: str, *, tokenizer: tokenizer_lib.Tokenizer):
        """Compiles it.

        Raises:
            ValueError: it is no template, or jinja2 is not installed.
        """
        self._control = tokenizer.control_tokens()
        by_id = {number: name for name, number in self._control.items()}
        self._fixed = {"bos_token": by_id.get(tokenizer.bos, ""), "eos_token": by_id.get(tokenizer.eos, "")}
        self._template = _compiled(source)
        # A name of one character could not be kept out of a text, so it is one.
        names = sorted((name for name in self._control if len(name) > 1), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._starts = re.compile(f"(?={self._names.pattern})")

    def render(self, turns: Sequence[Turn], *, options: Mapping[str, Any]) -> list[Piece]:
        """See `Template.render`."""
        import jinja2

        taken = sorted(options.keys() & {"messages", "add_generation_prompt", "tools", *self._fixed})
        if taken:
            raise ValueError(f"{', '.join(taken)}: the server sets these itself")
        texts = [*_texts([turn.parts for turn in turns]), *_texts([turn.name for turn in turns]), *_texts(options)]
        used = set().union(*texts)
        mark, frame, *_ = [*itertools.islice((chr(code) for code in range(*_MARKS) if chr(code) not in used), 2), "", ""]
        if not frame:
            raise ValueError("the conversation has every character of a plane of private use: none is left to keep texts apart")
        media: list[record.Media] = []
        messages = []
        for turn in turns:
            content = ""
            for part in turn.parts:
                if isinstance(part, str):
                    content += self._marked(part, mark)
                else:
                    content += f"{frame}{len(media)}{frame}"
                    media.append(part)
            messages.append({"role": turn.role, "content": content} | ({"name": self._marked(turn.name, mark)} if turn.name else {}))
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._fixed, **self._marked_all(options, mark)
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        except Exception as error:  # an expression of the template that this conversation does not fit
            raise ValueError(f"the chat template fails with this conversation: {type(error).__name__}: {error}") from None
        return self._cut(text, mark, frame, media)

    def _marked(self, text: str, mark: str) -> str:
        """Whitespace at the ends stays at the ends, for templates that strip it."""
        starts = [found.start() + 1 for found in self._starts.finditer(text)]  # names may overlap
        text = mark.join(text[begin:end] for begin, end in zip([0, *starts], [*starts, len(text)], strict=True))
        inner = text.strip()
        if not inner:
            return text
        start = text.index(inner)
        return f"{text[:start]}{mark}{inner}{mark}{text[start + len(inner) :]}"

    def _marked_all(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._marked(value, mark)
        if isinstance(value, Mapping):
            return {key: self._marked_all(each, mark) for key, each in value.items()}
        return [self._marked_all(each, mark) for each in value] if isinstance(value, list) else value

    def _cut(self, text: str, mark: str, frame: str, media: list[record.Media]) -> list[Piece]:
        """Control tokens, media and the text between."""
        pieces: list[Piece] = []
        end = 0
        for found in re.finditer(f"{frame}([0-9]+){frame}|{self._names.pattern}", text):
            pieces.append(text[end : found.start()].replace(mark, ""))
            pieces.append(np.array([self._control[found[0]]]) if found[1] is None else media[int(found[1])])
            end = found.end()
        pieces.append(text[end:].replace(mark, ""))
        return _joined(pieces)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Texts that follow each other as one: they are tokenised together."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif not isinstance(piece, str) or piece:
            joined.append(piece)
    return joined


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for each in value:
            yield from _texts(each)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError("the model has a chat template, which needs jinja2: run `pip install 'v4train[serve]'`") from None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template beside the tokenizer cannot be used: {error}") from None
