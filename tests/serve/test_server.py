"""A real server process, asked by OpenAI's own client and by plain HTTP: answers, their forms, and everything that may not be asked."""

import base64
import concurrent.futures
import contextlib
import gzip
import io
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.decode import sequences
from tests.serve import process
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import config as prepare_config
from v4train.data.prepare import decode as media_decode
from v4train.decode import loading
from v4train.decode import prompt as prompt_lib
from v4train.interop import score

openai = pytest.importorskip("openai")
BYTES = tokenizer_lib.ByteTokenizer()
MODEL = "tiny"
EXTRA = {"extra_body": {"ignore_eos": True}}


def complete(client, prompt="Once upon", **options):
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, **EXTRA} | options)


def chat(client, content="Hello", **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 12, "seed": 1, **EXTRA} | options)


def test_greedy_answers_are_those_of_the_training_forward_pass(client, checkpoint):
    prompt = np.concatenate([[BYTES.bos], BYTES.encode("Once upon")]).astype(np.int32)
    expected = score.greedy(score.load(checkpoint), prompt=prompt, count=12)
    found = complete(client, logprobs=0)
    assert found.choices[0].text == BYTES.decode(expected[expected != BYTES.eos])
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (10, 12, 22)
    assert found.usage.prompt_tokens_details.cached_tokens >= 0
    assert found.choices[0].finish_reason == "length"
    assert complete(client, prompt=prompt.tolist()).choices[0].text == found.choices[0].text


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).model_extra["max_model_len"] == 256
    status, _, body = server.ask("GET", "/health", Authorization="")
    assert (status, json.loads(body)) == (200, {"status": "ok"})


def pieces(stream) -> tuple[str, list, object]:
    """Text, finish reasons and usage of a chat stream."""
    text, reasons, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] * (choice.finish_reason is not None)
    return text, reasons, usage


OPTIONS = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 0.7, "extra_body": {"top_k": 9}}]


def test_32_streams_together_are_answered_as_each_alone_and_health_stays_fast(server, client):
    asked = [{"content": "x" * (7 * i % 60 + 1) + str(i), "seed": i, "max_tokens": 20 + i} | OPTIONS[i % len(OPTIONS)] for i in range(32)]
    alone = [chat(client, **one) for one in asked]

    def stream(one):
        return pieces(chat(client, **one, stream=True, stream_options={"include_usage": True}))

    slowest = []
    for _ in range(3):  # the machine may be busy with something else
        with subprocess.Popen(
            [sys.executable, "-c", _PROBE, server.url], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        ) as probe:
            assert probe.stdout.readline() == "begun\n"
            with concurrent.futures.ThreadPoolExecutor(32) as pool:
                found = list(pool.map(stream, asked))
            times = sorted(map(float, probe.communicate("end\n")[0].split()))
        for (text, reasons, usage), single in zip(found, alone, strict=True):
            assert text == single.choices[0].message.content
            assert reasons == [single.choices[0].finish_reason]
            assert usage.completion_tokens == single.usage.completion_tokens
        assert len(times) > 20
        slowest.append(times[math.ceil(0.99 * len(times)) - 1])
        if slowest[-1] < 0.1:
            break
    assert min(slowest) < 0.1, slowest


_PROBE = """
import http.client, select, sys, time
connection = http.client.HTTPConnection(sys.argv[1].removeprefix("http://"))
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    began = time.perf_counter()
    connection.request("GET", "/health")
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    print(time.perf_counter() - began)
"""


def test_events_are_written_as_clients_read_them(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "é"}], "max_tokens": 6, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    status, headers, raw = server.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "text/event-stream; charset=utf-8", "no-cache")
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 6)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    tokens = [one for chunk in chunks[1:-1] for one in chunk["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == 6
    for one in tokens:
        assert one.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert one["top_logprobs"][0]["logprob"] == one["logprob"] >= one["top_logprobs"][1]["logprob"]
    assert bytes(byte for one in tokens for byte in one["bytes"]).decode(errors="replace") == "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]
    )


def test_likelihoods_in_both_forms(client):
    found = complete(client, logprobs=3, max_tokens=8).choices[0]
    assert len(found.logprobs.tokens) == len(found.logprobs.token_logprobs) == len(found.logprobs.text_offset) == 8
    for token, logprob, top in zip(found.logprobs.tokens, found.logprobs.token_logprobs, found.logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
    streamed = list(complete(client, logprobs=3, max_tokens=8, stream=True))
    assert [logprob for chunk in streamed for logprob in chunk.choices[0].logprobs.token_logprobs] == found.logprobs.token_logprobs
    said = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [len(one.top_logprobs) for one in said] == [2] * 12
    assert chat(client).choices[0].logprobs is None


def test_several_answers_and_several_prompts(client):
    found = chat(client, n=3, seed=5, temperature=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in found.choices]
    assert texts == [chat(client, seed=5 + i, temperature=1).choices[0].message.content for i in range(3)]
    assert len(set(texts)) == 3
    assert found.usage.completion_tokens == 36
    both = complete(client, prompt=["Once upon", "A frog"], n=2, seed=1, temperature=1)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[2].text == complete(client, prompt="A frog", seed=1, temperature=1).choices[0].text
    assert both.usage.prompt_tokens == 10 + 7
    streams: dict[int, str] = {}
    for chunk in complete(client, prompt=["Once upon", "A frog"], n=2, seed=1, temperature=1, stream=True):
        for choice in chunk.choices:
            streams[choice.index] = streams.get(choice.index, "") + choice.text
    assert [streams[i] for i in range(4)] == [choice.text for choice in both.choices]


def test_seeds_stop_texts_and_echo(client):
    whole = complete(client, temperature=1, seed=3, max_tokens=40).choices[0].text
    assert complete(client, temperature=1, seed=3, max_tokens=40).choices[0].text == whole
    assert complete(client, temperature=1, max_tokens=40).choices[0].text != complete(client, temperature=1, max_tokens=40).choices[0].text
    stop = whole[9:11]
    for given in (stop, ["never this", stop]):
        found = complete(client, temperature=1, seed=3, max_tokens=40, stop=given).choices[0]
        assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, temperature=1, seed=3, max_tokens=40, stop=stop, stream=True))
    assert streamed == whole[: whole.index(stop)]
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == "Once upon" + plain
    assert "".join(chunk.choices[0].text for chunk in complete(client, echo=True, stream=True)) == "Once upon" + plain


def test_a_prompts_own_likelihoods_are_those_of_the_training_forward_pass(client, checkpoint):
    """As evaluations ask for them: echo, logprobs, one token."""
    ids = np.concatenate([[BYTES.bos], BYTES.encode("Once upon a time, été" * 3), [BYTES.eos], BYTES.encode("x" * 200)]).astype(np.int32)[
        :250
    ]
    loaded = loading.load(checkpoint)
    logits, _ = sequences.teacher(loaded.model, loaded.params, prompt_lib.Prompt.of_tokens(ids))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    expected = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    found = complete(client, prompt=ids.tolist(), echo=True, logprobs=2, max_tokens=1, extra_body={}).choices[0]
    said = found.logprobs
    lengths = {len(each) for each in (said.tokens, said.token_logprobs, said.top_logprobs, said.text_offset)}
    assert lengths == {len(ids) + 1}, "one token after the prompt, also if it ends the sequence"
    assert (said.token_logprobs[0], said.top_logprobs[0]) == (None, None)
    np.testing.assert_allclose(said.token_logprobs[1:-1], expected, atol=2e-4)
    rows = list(zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True))[1:]
    assert {len(top) for *_, top in rows} == {2}
    assert all(top.get(token, logprob) == logprob <= max(top.values()) for token, logprob, top in rows)
    greedy = [max(top, key=top.get) == token for token, _, top in rows]
    assert greedy[-1], "the answer's token is the likeliest"
    text = BYTES.decode(ids)
    assert found.text.startswith(text)
    assert said.text_offset == sorted(said.text_offset)
    at = text.index("upon")
    assert said.tokens[said.text_offset.index(at)] == "u"
    streamed = list(complete(client, prompt=ids.tolist(), echo=True, logprobs=2, max_tokens=1, stream=True, extra_body={}))
    assert [x for chunk in streamed for x in chunk.choices[0].logprobs.token_logprobs] == said.token_logprobs
    again = complete(client, prompt=ids.tolist(), echo=True, logprobs=2, max_tokens=1, extra_body={})
    assert again.choices[0].logprobs.token_logprobs == said.token_logprobs
    assert again.usage.prompt_tokens_details.cached_tokens == 0, "what is taken up has no logits"


def test_a_texts_likelihoods_begin_with_its_first_token(client):
    """The token that the server puts in front is not the text's."""
    said = complete(client, prompt="Once upon", echo=True, logprobs=0, max_tokens=3).choices[0].logprobs
    assert "".join(said.tokens[:9]) == "Once upon"
    assert said.text_offset[:10] == list(range(10))
    assert None not in said.token_logprobs
    assert said.top_logprobs is None
    plain = complete(client, prompt="Once upon", logprobs=0, max_tokens=3).choices[0].logprobs
    np.testing.assert_allclose(said.token_logprobs[9:], plain.token_logprobs, atol=1e-5)
    both = complete(client, prompt=["Once upon", "A"], echo=True, logprobs=0, max_tokens=1).choices
    assert [len(each.logprobs.tokens) for each in both] == [10, 2]


def test_defaults_are_openais(client):
    assert complete(client, max_tokens=openai.omit).usage.completion_tokens == 16
    found = chat(client, max_tokens=openai.omit)
    assert found.usage.total_tokens == 256  # to the end of the context


def test_clients_that_leave_free_their_slots(server, client):
    before = server.metric('v4train_requests_finished_total{reason="cancelled"}')
    streams = [chat(client, max_tokens=200, stream=True) for _ in range(6)]
    for stream in streams[:4]:
        next(iter(stream))
    for stream in streams:
        stream.close()
    hanging = server.connection()  # an answer that is not streamed
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 240, "ignore_eos": True}).encode()
    hanging.request("POST", "/v1/completions", body, {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"})
    time.sleep(0.05)
    hanging.close()
    server.settle("v4train_requests_running", 0)
    server.settle("v4train_cache_pages_used", 0)
    assert server.metric('v4train_requests_finished_total{reason="cancelled"}') >= before + 2
    assert chat(client).choices[0].finish_reason == "length"


def test_a_client_that_leaves_before_its_body_is_whole_is_no_error_of_the_server(server):
    gone = 'v4train_http_responses_total{path="/v1/completions",status="499"}'
    with contextlib.closing(server.connection()) as connection:
        connection.putrequest("POST", "/v1/completions")
        for name, value in (("Content-Type", "application/json"), ("Authorization", f"Bearer {server.key}"), ("Content-Length", "1000")):
            connection.putheader(name, value)
        connection.endheaders(b'{"model": ')
        time.sleep(0.1)
    end = time.monotonic() + 20
    while gone not in server.ask("GET", "/metrics")[2].decode():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not any("Traceback" in line for line in server.said)


def test_a_full_queue_refuses_and_says_when_to_come_back(server, client):
    with contextlib.ExitStack() as stack:
        streams = [chat(client, max_tokens=200, stream=True) for _ in range(4)]
        for stream in streams:
            stack.callback(stream.close)
        many = client.with_options(timeout=60)
        stack.callback(lambda: server.settle("v4train_requests_running", 0))
        waiting = [many.completions.create(model=MODEL, prompt="x", n=20, max_tokens=200, stream=True, **EXTRA) for _ in range(2)]
        for stream in waiting:
            stack.callback(stream.close)
        with pytest.raises(openai.RateLimitError) as caught:
            _ask_for_more(client, stack)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["code"] == "queue_full"
        assert server.metric("v4train_requests_waiting") <= 40
    server.settle("v4train_requests_waiting", 0)


def _ask_for_more(client, stack: contextlib.ExitStack) -> None:
    for _ in range(3):  # a slot may have become free meanwhile
        stack.callback(chat(client, n=20, max_tokens=200, stream=True).close)


@pytest.mark.parametrize("key", ["wrong", "", process.KEY + "x", process.KEY[:-1], "ключ"])
def test_a_wrong_key_is_refused(server, key):
    for path in ("/v1/models", "/v1/completions", "/v1/nothing"):
        status, headers, body = server.ask("GET", path, Authorization=f"Bearer {key}".encode())
        assert (status, headers["www-authenticate"], process.error(body)["code"]) == (401, "Bearer", "invalid_api_key")
    assert server.ask("GET", "/v1/models", Authorization=process.KEY)[0] == 401
    if key.isascii() and key:
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=key).models.list()
    assert server.ask("GET", "/metrics", Authorization="")[0] == 200


BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def image(url: str) -> list:
    return [{"type": "image_url", "image_url": {"url": url}}]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("completions", {**BODY, "model": "other"}, 404, "model_not_found"),
        ("completions", {**BODY, "prompt": "x" * 300}, 400, "context_length_exceeded"),
        ("completions", {**BODY, "max_tokens": 255}, 400, "context_length_exceeded"),
        ("completions", {**BODY, "prompt": [1, 5000]}, 400, None),
        ("completions", {**BODY, "prompt": [BYTES.image]}, 400, None),
        ("completions", {**BODY, "n": 41}, 400, None),
        ("completions", {**BODY, "temperature": "hot"}, 400, "invalid_value"),
        ("completions", b"{", 400, "invalid_json"),
        ("completions", b"[" * 5000, 400, "invalid_json"),
        ("completions", b"", 400, "invalid_json"),
        ("completions", b"[]", 400, "invalid_type"),
        ("completions", {**BODY, "prompt": "x" * 60_000}, 413, "body_too_large"),
        ("completions", {**BODY, "prompt": "x" * 2_000_000}, 413, "body_too_large"),
        ("chat/completions", {**CHAT, "max_tokens": 256}, 400, "context_length_exceeded"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": ""}]}, 400, None),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": image("https://example.org/a.png")}]},
            400,
            "invalid_image_url",
        ),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": image("file:///etc/passwd")}]}, 400, "invalid_image_url"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": image("data:image/png;base64,????")}]},
            400,
            "invalid_base64",
        ),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": image("data:image/png;base64,AAAA")}]}, 400, None),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"thinking": True}}, 400, None),
        ("chat/completions", {**CHAT, "tools": [{}]}, 400, "unsupported_parameter"),
        ("embeddings", {}, 404, "not_found"),
    ],
    ids=itertools.count(),
)
def test_what_cannot_be_answered_is_an_error_in_their_form(small_bodies, path, body, status, code):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, _, answer = small_bodies.ask("POST", f"/v1/{path}", raw)
    assert (found, process.error(answer)["code"]) == (status, code)
    assert "Traceback" not in answer.decode()


@pytest.fixture(scope="session")
def small_bodies(server):
    """The same server: its bodies may have 50,000 bytes."""
    return server


def test_other_methods_types_and_endless_bodies(server):
    assert server.ask("GET", "/v1/completions")[0] == 405
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, body = server.ask("POST", "/v1/completions", json.dumps(BODY).encode(), Content_Type=kind)
        assert (status, process.error(body)["code"]) == (415, "unsupported_media_type")
    status, _, body = server.ask("POST", "/v1/completions", gzip.compress(json.dumps(BODY).encode()), Content_Encoding="gzip")
    assert (status, process.error(body)["message"]) == (415, "send the body as it is, not with Content-Encoding: gzip")
    assert server.ask("POST", "/v1/completions", json.dumps(BODY).encode(), Content_Encoding="identity")[0] == 200
    chunks = (b"x" * 10_000 for _ in range(1000))
    with contextlib.closing(server.connection()) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
        connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert server.ask("GET", "/health")[0] == 200


def test_images_and_sounds_of_a_conversation(client):
    pillow, sound = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    file, noise = io.BytesIO(), io.BytesIO()
    rng = np.random.default_rng(0)
    pillow.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    sound.write(noise, rng.normal(0, 0.1, 3200), 16_000, format="WAV")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}}
    voice = {"type": "input_audio", "input_audio": {"data": base64.b64encode(noise.getvalue()).decode(), "format": "wav"}}
    text = {"type": "text", "text": "What?"}
    alone, together, again = (
        chat(client, content=parts, temperature=0, max_tokens=6) for parts in ([text], [picture, voice, text], [picture, voice, text])
    )
    frames = len(media_decode.sound(noise.getvalue(), config=prepare_config.SoundConfig()))
    assert together.usage.prompt_tokens - alone.usage.prompt_tokens == 16 + frames + 4
    assert together.choices[0] == again.choices[0]
    with pytest.raises(openai.BadRequestError, match="unreadable sound"):
        chat(client, content=[{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}])


def test_the_examples_of_the_documentation(server, capsys):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    asked = re.findall(
        r"^curl http://127.0.0.1:8000(\S+) -H \"Content-Type: application/json\" -d '(.+?)'$", page, re.DOTALL | re.MULTILINE
    )
    assert [path for path, _ in asked] == ["/v1/chat/completions", "/v1/completions"]
    answers = [server.ask("POST", path, body.encode()) for path, body in asked]
    assert [status for status, *_ in answers] == [200, 200]
    assert answers[0][2].endswith(b"data: [DONE]\n\n")
    assert len(json.loads(answers[1][2])["choices"][0]["logprobs"]["top_logprobs"][0]) == 3
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program.replace("http://127.0.0.1:8000", server.url).replace('"none"', repr(server.key)), {})
    assert capsys.readouterr().out.strip()


def test_every_metric_of_the_documentation_is_there(server):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", page.partition("## Metrics")[2].partition("\n## ")[0], re.MULTILINE)
    named = {re.sub(r"\{.*\}", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row) if "*" not in name}
    text = server.ask("GET", "/metrics")[2].decode()
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE v4train_")}
    families -= {name for name in families if name.endswith("_created")}
    assert len(named) > 15
    assert {f"v4train_{name}" for name in named} == families


def test_metrics_count_what_happened(server, client):
    def read() -> list[float]:
        names = ('http_responses_total{path="/v1/completions",status="200"}', "generated_tokens_total", "prompt_tokens_total")
        return [server.metric(f"v4train_{name}") for name in (*names, "time_to_first_token_seconds_count", "inter_token_seconds_count")]

    before = read()
    complete(client, max_tokens=9)
    assert np.subtract(read(), before).tolist() == [1, 9, 10, 1, 8]
