"""From what is asked over HTTP to requests of the engine: prompts, limits, and the streams of all answers of one HTTP request together.

Rendering, tokenising and decoding of media take time and no locks: they run on threads (`Planner.completion`, `Planner.chat`). Only
`Group` lives on the event loop; it takes events from the engine's thread by `call_soon_threadsafe`, so that neither ever waits for the
other.
"""

import asyncio
import base64
import binascii
import dataclasses
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from v4train.data.prepare import record
from v4train.decode import engine as engine_lib
from v4train.decode import loading
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib
from v4train.serve import config as config_lib
from v4train.serve import failure, protocol, templates

_DATA_URL = re.compile(r"data:(?P<type>[^,;]*)(?:;[^,;]*)*;base64,", re.IGNORECASE)
_LEGACY_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it


@dataclasses.dataclass(frozen=True)
class Job:
    """The answers that one HTTP request asks for.

    Attributes:
        requests: of every answer, all answers of a prompt together.
        echoes: text in front of each.
        per_prompt: answers of a prompt.
        added: tokens that were put in front of each prompt, and are not reported as its own.
    """

    requests: list[request_lib.Request]
    echoes: list[str]
    per_prompt: int
    added: list[int] = dataclasses.field(default_factory=list)


class Planner:
    """Makes jobs. Its methods may run on any thread."""

    def __init__(self, loaded: loading.Loaded, *, config: config_lib.ServeConfig, limit: int):
        """``limit``: tokens that a sequence may have, prompt and answer."""
        self._loaded, self._config, self.limit = loaded, config, limit
        self._template = templates.choose(source=loaded.chat_template, tokenizer=loaded.tokenizer)

    def completion(self, asked: protocol.CompletionRequest) -> Job:
        """Of ``/v1/completions``.

        Raises:
            RequestError: it cannot be answered.
        """
        prompts = asked.prompts
        self._check_count(len(prompts) * asked.n)
        requests, echoes, added = [], [], []
        for each in prompts:
            prompt = self._loaded.prompt([each]) if isinstance(each, str) else self._of_ids(each)
            requests += self._requests(
                asked,
                prompt,
                param="prompt",
                max_tokens=asked.max_tokens or _LEGACY_MAX_TOKENS,
                tops=asked.logprobs or 0,
                score_prompt=asked.echo and asked.logprobs is not None,
            )
            text = each if isinstance(each, str) else self._loaded.tokenizer.decode(np.array(each))
            echoes += [text if asked.echo else ""] * asked.n
            added += [int(isinstance(each, str))] * asked.n
        return Job(requests, echoes, asked.n, added)

    def chat(self, asked: protocol.ChatRequest) -> Job:
        """Of ``/v1/chat/completions``; raises as `completion` does."""
        self._check_count(asked.n)
        turns = [_turn(message, at=at) for at, message in enumerate(asked.messages)]
        try:
            pieces = self._template.render(turns, options=asked.chat_template_kwargs)
            prompt = self._loaded.compose(pieces, image_patches=self._config.image_patches)
        except ValueError as error:
            raise failure.invalid(str(error), param="messages") from None
        requests = self._requests(
            asked, prompt, param="messages", max_tokens=asked.most_tokens, tops=asked.top_logprobs, stop=self._template.stop
        )
        return Job(requests, [""] * asked.n, asked.n)

    def _check_count(self, count: int) -> None:
        most = min(protocol.MOST_CHOICES, self._config.waiting)
        if count > most:
            raise failure.invalid(f"n: the request asks for {count} answers; this server makes at most {most} for a request", param="n")

    def _of_ids(self, ids: list[int]) -> prompt_lib.Prompt:
        if max(ids) >= self._loaded.model.vocab_size:
            most = self._loaded.model.vocab_size - 1
            raise failure.invalid(f"prompt: token id {max(ids)}; the model's are from 0 to {most}", param="prompt")
        tokenizer, model = self._loaded.tokenizer, self._loaded.model
        if {tokenizer.image, tokenizer.audio} & set(ids) and (model.image is not None or model.audio is not None):
            message = "prompt: ids of image or audio placeholders, which stand for nothing here: send media in /v1/chat/completions"
            raise failure.invalid(message, param="prompt")
        return prompt_lib.Prompt.of_tokens(np.array(ids))

    def _requests(
        self,
        asked: protocol.CompletionRequest | protocol.ChatRequest,
        prompt: prompt_lib.Prompt,
        *,
        param: str,
        max_tokens: int | None,
        tops: int,
        stop: tuple[str, ...] = (),
        score_prompt: bool = False,
    ) -> list[request_lib.Request]:
        """One for each of ``n``; the seed of the i-th is the seed given plus i."""
        have, room = len(prompt), self.limit - len(prompt)
        if room < 1:
            message = f"this model's maximum context length is {self.limit} tokens, and the {param} has {have}: shorten it"
            raise failure.too_long(message, param=param)
        if max_tokens is not None and max_tokens > room:
            message = f"this model's maximum context length is {self.limit} tokens; you asked for {have + max_tokens} "
            raise failure.too_long(f"{message}({have} in the {param}, {max_tokens} in the answer)", param=param)
        return [
            request_lib.Request(
                prompt,
                max_tokens=room if max_tokens is None else max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=None if asked.seed is None else asked.seed + i,
                stop=(*asked.stops, *stop),
                top_logprobs=tops,
                ignore_end=asked.ignore_eos,
                score_prompt=score_prompt,
            )
            for i in range(asked.n)
        ]


def _turn(message: protocol.Message, *, at: int) -> templates.Turn:
    role = "system" if message.role == "developer" else message.role
    parts = [message.content] if isinstance(message.content, str) else [_part(part, f"messages.{at}.content") for part in message.content]
    if role == "user" and not any(part for part in parts):
        raise failure.invalid(f"messages.{at}.content: a message of the user needs content", param=f"messages.{at}.content")
    return templates.Turn(role, tuple(parts), message.name)


def _part(part: Any, where: str) -> record.Part:
    if isinstance(part, protocol.TextPart):
        return part.text
    if isinstance(part, protocol.AudioPart):
        return record.Media("audio", _bytes(part.input_audio.data, f"{where}.input_audio.data"))
    url, where = part.image_url.url, f"{where}.image_url.url"
    found = _DATA_URL.match(url)
    if found is None:
        shown = url[:40] + "..." * (len(url) > 40)
        message = f"{where}: {shown!r} is no data URL; this server fetches nothing: send data:image/png;base64,... with the image itself"
        raise failure.invalid(message, param=where, code="invalid_image_url")
    return record.Media("image", _bytes(url[found.end() :], where))


def _bytes(text: str, where: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise failure.invalid(f"{where}: not base64: {error}", param=where, code="invalid_base64") from None
    if not content:
        raise failure.invalid(f"{where}: it is empty", param=where, code="invalid_base64")
    return content


class Group:
    """The streams of one HTTP request, all submitted or none."""

    def __init__(self, engine: engine_lib.Engine, requests: Sequence[request_lib.Request]):
        """Submits them; to be called on the event loop.

        Raises:
            RequestError: the queue is full, the engine is closing, or a request cannot be answered.
        """
        loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[int, request_lib.Event | Exception]] = asyncio.Queue()
        self.streams: list[request_lib.Stream] = []
        try:
            for i, one in enumerate(requests):
                self.streams.append(engine.submit(one, listener=self._listener(loop, i)))
        except request_lib.QueueFullError:
            self.cancel()
            raise failure.full() from None
        except engine_lib.ClosedError:
            self.cancel()
            raise failure.closing() from None
        except ValueError as error:
            self.cancel()
            raise failure.invalid(str(error)) from None

    def _listener(self, loop: asyncio.AbstractEventLoop, index: int) -> request_lib.Listener:
        return lambda item: loop.call_soon_threadsafe(self._items.put_nowait, (index, item))

    async def events(self) -> AsyncIterator[tuple[int, request_lib.Event]]:
        """Events of all answers as they come, with the answer's number.

        Raises:
            RequestError: the engine failed, or cancelled because it closes.
        """
        open_ = len(self.streams)
        while open_:
            index, item = await self._items.get()
            if isinstance(item, Exception):
                raise failure.internal() from item
            if item.finish_reason == "cancelled":
                raise failure.closing()
            open_ -= item.finish_reason is not None
            yield index, item

    def cancel(self) -> None:
        """Ends what still runs; nothing happens to answers that have ended."""
        for stream in self.streams:
            stream.cancel()
