"""The application: routes, who may ask, and how answers leave.

**The event loop does nothing that takes long.** The model runs on the engine's thread, prompts are made on threads of a pool, and what is
left for the loop is a dictionary and a line of JSON for each token. So `/health` answers while everything else is busy.

**Nobody is waited for who has gone.** While an answer is made, a task listens for the client to disconnect; then its requests are
cancelled and their slots are free at the engine's next turn.

**A web page is not its visitor.** It can make a browser post to a server on the visitor's own machine, but only in the forms that need no
permission; JSON does, which this server never gives, so a body must be declared as JSON. And it can have its own name resolve to the
visitor's machine, to be of the same origin; so a server without a key, for this machine only, answers only to this machine's names.
"""

import asyncio
import hashlib
import hmac
import logging
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any

import pydantic_core
from starlette import applications, exceptions, requests, responses, routing, types

from v4train.decode import engine as engine_lib
from v4train.decode import loading
from v4train.decode import request as request_lib
from v4train.serve import answers, failure, jobs, metrics, protocol
from v4train.serve import config as config_lib

_log = logging.getLogger(__name__)
_LINGER = 8  # times the largest body: what is read of a larger one, so that its sender hears why it is refused
_GONE = 499
_SILENCE = 15.0  # seconds


class Application:
    """A server's state, and its ASGI application as `asgi`."""

    def __init__(self, loaded: loading.Loaded, engine: engine_lib.Engine, *, config: config_lib.ServeConfig):
        """An application on a running engine."""
        decoder = engine.scheduler.decoder
        limit = min(decoder.config.max_length, decoder.layout.pages * decoder.config.page_tokens)
        self.config, self.engine = config, engine
        self.planner = jobs.Planner(loaded, config=config, limit=limit)
        self.metrics = metrics.Metrics(engine)
        self._speller = answers.Speller(loaded.tokenizer)
        routes = [
            routing.Route("/health", self._health),
            routing.Route("/metrics", self._metrics),
            routing.Route("/v1/models", self._models),
            routing.Route("/v1/models/{model:path}", self._model),
            routing.Route("/v1/completions", self._completions, methods=["POST"]),
            routing.Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {failure.RequestError: _refuse, exceptions.HTTPException: _refuse_http, Exception: _refuse_ours}
        inner = applications.Starlette(routes=routes, exception_handlers=handlers)
        local = config.api_key is None and config_lib.is_loopback(config.host)
        self.asgi = Guard(inner, key=config.api_key, local=local, count=self._count, paths={route.path for route in routes})

    def _count(self, path: str, status: int) -> None:
        self.metrics.responses.labels(path, str(status)).inc()

    async def _health(self, request: requests.Request) -> responses.Response:
        alive = self.engine.alive
        return responses.JSONResponse({"status": "ok" if alive else "closed"}, status_code=200 if alive else 503)

    async def _metrics(self, request: requests.Request) -> responses.Response:
        return responses.Response(self.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _models(self, request: requests.Request) -> responses.Response:
        return responses.JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: requests.Request) -> responses.Response:
        self._check_model(request.path_params["model"])
        return responses.JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {"id": self.config.model, "object": "model", "created": 0, "owned_by": "v4train", "max_model_len": self.planner.limit}

    def _check_model(self, name: str) -> None:
        if name != self.config.model:
            message = f"the model {name!r} does not exist; this server has {self.config.model!r}"
            raise failure.RequestError(404, message, "model", "model_not_found")

    async def _completions(self, request: requests.Request) -> responses.Response:
        asked = await self._asked(request, protocol.CompletionRequest)
        job = await asyncio.to_thread(_planned, self.planner.completion, asked)
        scores = asked.logprobs is not None
        return await self._answer(request, asked, job, answers.CompletionShape(tops=asked.logprobs or 0), scores=scores)

    async def _chat(self, request: requests.Request) -> responses.Response:
        asked = await self._asked(request, protocol.ChatRequest)
        job = await asyncio.to_thread(_planned, self.planner.chat, asked)
        return await self._answer(request, asked, job, answers.ChatShape(), scores=asked.logprobs)

    async def _asked(self, request: requests.Request, cls: type[Any]) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise failure.RequestError(415, "send the request as JSON, with Content-Type: application/json", None, "unsupported_media_type")
        if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise failure.RequestError(
                415, f"send the body as it is, not with Content-Encoding: {encoding}", None, "unsupported_media_type"
            )
        asked = protocol.parse(await self._body(request), cls=cls)
        self._check_model(asked.model)
        return asked

    async def _body(self, request: requests.Request) -> bytes:
        limit, pieces, size = self.config.body_bytes, [], 0
        try:
            async with asyncio.timeout(self.config.body_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= limit:
                        pieces.append(piece)
                    elif size > _LINGER * limit:
                        break
        except TimeoutError:
            raise failure.RequestError(408, "the body did not arrive in time", None, "timeout", headers={"Connection": "close"}) from None
        except requests.ClientDisconnect:
            raise failure.RequestError(_GONE, "the client went away before the whole body was here") from None
        if size > limit:
            message = f"the body is larger than {limit} bytes, which is as much as this server takes"
            raise failure.RequestError(413, message, None, "body_too_large", headers={"Connection": "close"})
        return b"".join(pieces)

    async def _answer(
        self,
        request: requests.Request,
        asked: protocol.CompletionRequest | protocol.ChatRequest,
        job: jobs.Job,
        shape: answers.Shape,
        *,
        scores: bool,
    ) -> responses.Response:
        group = jobs.Group(self.engine, job.requests)
        envelope = answers.Envelope(shape, model=asked.model)
        answer = _Answer(group, job, envelope, scores=scores, speller=self._speller, metrics_=self.metrics)
        if asked.stream:
            return _Events(answer.stream(include_usage=asked.stream_options.include_usage), group)
        whole, gone = asyncio.create_task(answer.whole()), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return _json(whole.result()) if whole.done() else responses.Response(status_code=_GONE)
        finally:
            group.cancel()
            whole.cancel()
            gone.cancel()


class _Answer:
    """The answers of one HTTP request, gathered or streamed."""

    def __init__(
        self,
        group: jobs.Group,
        job: jobs.Job,
        envelope: answers.Envelope,
        *,
        scores: bool,
        speller: answers.Speller,
        metrics_: metrics.Metrics,
    ):
        self._group, self._job, self._envelope, self._scores, self._speller = group, job, envelope, scores, speller
        self._choices = [answers.Choice(i, text) for i, text in enumerate(job.echoes)]
        self._clocks = [metrics.Clock(metrics_, stream) for stream in group.streams]

    async def whole(self) -> dict[str, Any]:
        async for _ in self._pieces():
            pass
        shape = self._envelope.shape
        return self._envelope.whole([shape.whole(choice, scores=self._scores) for choice in self._choices], self._usage())

    async def stream(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events."""
        more = {"usage": None} if include_usage else {}
        shape, opened = self._envelope.shape, set()
        try:
            async for choice, text, scored in self._pieces():
                if choice.index not in opened:
                    opened.add(choice.index)
                    opening = shape.opening(choice)
                    if opening is not None:
                        yield _event(self._envelope.chunk([opening], **more))
                    text = self._job.echoes[choice.index] + text
                if text or scored or choice.finish:
                    yield _event(self._envelope.chunk([shape.chunk(choice, text=text, scored=scored)], **more))
            if include_usage:
                yield _event(self._envelope.chunk([], usage=self._usage()))
            yield b"data: [DONE]\n\n"
        except failure.RequestError as error:
            yield _event(error.body)
        except Exception:
            _log.exception("a stream failed")
            yield _event(failure.internal().body)

    async def _pieces(self) -> AsyncIterator[tuple[answers.Choice, str, list[answers.Scored] | None]]:
        """What each event adds to its choice."""
        async for index, event in self._group.events():
            choice = self._choices[index]
            self._clocks[index].see(event)
            scored = None
            if self._scores:
                scored = await self._scored(index, event)
                choice.scored += scored
            choice.text += event.text
            choice.tokens += event.token is not None
            choice.finish = event.finish_reason
            yield choice, event.text, scored

    async def _scored(self, index: int, event: request_lib.Event) -> list[answers.Scored]:
        """What an event has to report: with the first one comes the prompt, if that is scored too. A long one is spelled on a thread."""
        choice, stream = self._choices[index], self._group.streams[index]
        whole, prompt = stream.request.score_prompt, []
        if whole and choice.tokens == 0:
            prompt = await asyncio.to_thread(self._speller.prompt, stream.prompt_scores[self._job.added[index] :])
        one = self._speller.scored(event, offset=len(choice.text), end=whole)
        return prompt if one is None else [*prompt, one]

    def _usage(self) -> dict[str, Any]:
        streams = self._group.streams
        return answers.usage(prompts=streams[:: self._job.per_prompt], choices=self._choices, streams=streams)


class _Events(responses.StreamingResponse):
    """A stream that cancels its requests however it ends, also before it began."""

    def __init__(self, content: AsyncIterator[bytes], group: jobs.Group):
        super().__init__(_kept_alive(content), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        self._group = group

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._group.cancel()


async def _kept_alive(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """With a comment, which clients skip, after every silence: proxies cut connections that say nothing."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(content))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({pending}, timeout=_SILENCE)
            if not done:
                yield b": still working\n\n"
                continue
            try:
                piece = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield piece
    finally:
        if pending is not None:
            pending.cancel()


class Guard:
    """Asks for the key below /v1, or if ``local`` for a name of this machine, and counts responses."""

    def __init__(self, app: types.ASGIApp, *, key: Any, local: bool, count: Callable[[str, int], None], paths: set[str]):
        self._app, self._local, self._count, self._paths = app, local, count, paths
        self._key = None if key is None else _digest(key.get_secret_value())

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        known = path if path in self._paths else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"

        async def counted(message: types.Message) -> None:
            if message["type"] == "http.response.start":
                self._count(known, message["status"])
            await send(message)

        refusal = self._refusal(path, dict(scope["headers"]))
        app = self._app if refusal is None else _json(refusal.body, status=refusal.status, headers=dict(refusal.headers))
        await app(scope, receive, counted)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> failure.RequestError | None:
        if self._local:
            name = headers.get(b"host", b"").decode("latin-1")
            if not _is_local(name):
                message = (
                    f"this server answers to names of its own machine only, not to {name!r}: give it an API key, and it answers to all"
                )
                return failure.RequestError(403, message, None, "host_not_allowed")
        if self._key is not None and path.startswith("/v1") and not self._allowed(headers):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            return failure.RequestError(401, message, None, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None

    def _allowed(self, headers: dict[bytes, bytes]) -> bool:
        """Digests are compared, so that the time tells nothing of the key, its length included."""
        given = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        assert self._key is not None
        return hmac.compare_digest(_digest(key.strip()), self._key) and scheme.lower() == "bearer"


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    try:
        return config_lib.is_loopback(urllib.parse.urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def _planned(plan: Callable[[Any], jobs.Job], asked: Any) -> jobs.Job:
    """On a thread of the pool. What `decode` refuses with a ValueError is the request's fault."""
    try:
        return plan(asked)
    except ValueError as error:
        raise failure.invalid(str(error)) from None


async def _gone(request: requests.Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> responses.Response:
    content = pydantic_core.to_json(value, inf_nan_mode="null")
    return responses.Response(content, status_code=status, headers=headers, media_type="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + pydantic_core.to_json(value, inf_nan_mode="null") + b"\n\n"


async def _refuse(request: requests.Request, error: Exception) -> responses.Response:
    assert isinstance(error, failure.RequestError)
    return _json(error.body, status=error.status, headers=dict(error.headers))


async def _refuse_http(request: requests.Request, error: Exception) -> responses.Response:
    assert isinstance(error, exceptions.HTTPException)
    where = f"{request.method} {request.url.path}"
    said = {404: f"there is no {where}", 405: f"{where}: this path has other methods"}.get(error.status_code, str(error.detail))
    body = failure.RequestError(error.status_code, said, None, "not_found" if error.status_code == 404 else None).body
    return _json(body, status=error.status_code, headers=dict(error.headers or {}))


async def _refuse_ours(request: requests.Request, error: Exception) -> responses.Response:
    return _json(failure.internal().body, status=500)
