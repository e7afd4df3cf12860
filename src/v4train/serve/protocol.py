"""What may be asked: the requests of OpenAI's two text interfaces as types that refuse what they do not know.

**Nothing is ignored silently.** A field that would change an answer and is not implemented is refused unless it has its neutral value
(``frequency_penalty: 0``, ``tools: []``); a field that changes no answer is accepted (``user``, ``metadata``); an unknown one is refused.
A client that misspells ``temperature`` hears of it. Types are strict: ``"5"`` is no number. ``null`` is the same as leaving a field out, as
in OpenAI's interface. Fields beyond OpenAI's are ``top_k``, ``ignore_eos`` (goes on after the end-of-sequence token) and
``chat_template_kwargs``, under the names that other servers use.
"""

from typing import Annotated, Any, Literal

import pydantic
import pydantic_core

from v4train.serve import failure

MOST_CHOICES = 128
"""Answers that one request may ask for."""
_MOST_STOPS, _LONGEST_STOP = 16, 1024
_MOST_NAMED = 3  # problems in one message
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")

_Count = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
_Seed = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**64)]
_Stop = Annotated[str, pydantic.Field(min_length=1, max_length=_LONGEST_STOP)]


class _Model(pydantic.BaseModel):
    """``null`` is the same as nothing."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class StreamOptions(_Model):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampled(_Model):
    """Fields of both interfaces."""

    model: str
    max_tokens: _Count | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] = 0
    n: Annotated[int, pydantic.Field(ge=1, le=MOST_CHOICES)] = 1
    seed: _Seed | None = None
    stop: _Stop | Annotated[list[_Stop], pydantic.Field(max_length=_MOST_STOPS)] = ()  # type: ignore[assignment]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _settle_what_is_not_implemented(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, neutral in _NEUTRAL.items():
            given = value.get(name)
            if given is not None and given != neutral:
                raise failure.invalid(f"{name} is not supported by this server: leave it out", param=name, code="unsupported_parameter")
        return {key: each for key, each in value.items() if key not in _NEUTRAL and key not in _WITHOUT_EFFECT}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Sampled):
    """``POST /v1/completions``."""

    prompt: Any = ""
    echo: bool = False
    logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    best_of: _Count | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or ids, one for each prompt of the request."""
        prompt = self.prompt
        if isinstance(prompt, str) or _ids(prompt):
            return [prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(each, str) or _ids(each) for each in prompt):
            return prompt
        raise failure.invalid(
            "prompt: it must be a text, a list of token ids that is not empty, or a list of these", param="prompt", code="invalid_type"
        )

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.best_of is not None and self.best_of != self.n:
            raise failure.invalid("best_of is not supported by this server: leave it out", param="best_of", code="unsupported_parameter")
        return self


class TextPart(_Model):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    """Where an image is: a data URL. ``detail`` has no effect."""

    url: str
    detail: str | None = None


class ImagePart(_Model):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Model):
    """A sound file in base64. The format is read from the file itself."""

    data: str
    format: str | None = None


class AudioPart(_Model):
    """A sound."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | AudioPart, pydantic.Field(discriminator="type")]


class Message(_Model):
    """One message of a conversation. What an answer's message may hold besides is accepted while it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""
    name: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        empty = ("tool_calls", "annotations", "audio", "function_call", "refusal")
        return {key: each for key, each in value.items() if each or key not in empty} if isinstance(value, dict) else value

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.role != "user" and not isinstance(self.content, str) and any(part.type != "text" for part in self.content):
            raise failure.invalid(f"messages: images and sounds belong to messages of the user, not of {self.role}", param="messages")
        return self


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], pydantic.Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, bool | int | float | str] = {}

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.top_logprobs and not self.logprobs:
            raise failure.invalid("top_logprobs needs logprobs: true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise failure.invalid("max_tokens and max_completion_tokens say the same thing: give one of them", param="max_tokens")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(body: bytes, *, cls: type[Any]) -> Any:
    """A request from its body.

    Raises:
        RequestError: 400; not JSON, or not such a request, with the first problems.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise failure.invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise failure.invalid("the body must be a JSON object", code="invalid_type")
    try:
        return cls.model_validate(value)
    except pydantic.ValidationError as error:
        problems = [(_path(each["loc"], value, each["type"]), each["msg"]) for each in error.errors(include_url=False, include_input=False)]
    # Of the alternatives of a union, those that looked into the value say more than those that refused it as a whole.
    paths = {path for path, _ in problems}
    problems = [(path, text) for path, text in problems if not any(other.startswith(f"{path}.") for other in paths)] or problems
    texts = list(dict.fromkeys(f"{path}: {message}" if path else message for path, message in problems))
    more = f"; and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    raise failure.invalid("; ".join(texts[:_MOST_NAMED]) + more, param=problems[0][0] or None, code="invalid_value")


def _path(loc: tuple[str | int, ...], value: Any, kind: str) -> str:
    """A place in the body: names of types, which the library puts between, are left out."""
    found = []
    for at, key in enumerate(loc):
        if isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        elif isinstance(value, dict) and (key in value or (kind == "missing" and at == len(loc) - 1)):
            value = value.get(key)
        else:
            continue
        found.append(str(key))
    return ".".join(found)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and 0 <= each < 2**31 for each in value)
