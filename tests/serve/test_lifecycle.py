"""How a server begins and ends: refusals before weights are read, a graceful end, a hurried one, and kill -9.

Slow: every test starts processes of its own, at five to ten seconds each.
"""

import concurrent.futures
import contextlib
import pathlib
import re
import signal
import socket
import subprocess

import pytest

from tests.serve import process
from v4train.cli import main

openai = pytest.importorskip("openai")
LONG = ("--slots", "2", "--chunk", "32", "--max-length", "32768", "--cache", "fp32", "--compute", "float32")
MODEL = "tiny"


def stream(client, tokens: int, *, content: str = "Hello"):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=tokens, seed=1, stream=True, extra_body={"ignore_eos": True}
    )


def text(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def ended(server: process.Server, *, seconds: float = 60) -> int:
    return server.process.wait(timeout=seconds)


@pytest.mark.slow
def test_a_signal_lets_answers_finish(checkpoint):
    with process.Server(checkpoint, *LONG) as server:
        client = server.client()
        whole = text(stream(client, 400))
        streams = [stream(client, 400) for _ in range(3)]  # the third waits for a slot
        firsts = [next(iter(one)) for one in streams[:2]]
        server.signal()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(text, streams))
        for first, rest in zip([*firsts, None], texts, strict=True):
            assert ((first.choices[0].delta.content or "") if first else "") + rest == whole
        assert ended(server) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert server.said[-1].endswith("closed")


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_told_so(checkpoint):
    with process.Server(checkpoint, *LONG, "--drain-seconds", "0.3") as server:
        one = iter(stream(server.client(), 30_000))
        next(one)
        server.signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in one:
                pass
        assert ended(server, seconds=20) == 1
        assert "cut off" in server.said[-1]


@pytest.mark.slow
def test_a_second_signal_does_not_wait(checkpoint):
    with process.Server(checkpoint, *LONG, "--drain-seconds", "600") as server:
        one = iter(stream(server.client(), 30_000))
        next(one)
        server.signal()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(timeout=1)
        assert server.process.poll() is None
        server.signal()
        assert ended(server, seconds=20) == 1


@pytest.mark.slow
def test_kill_9_and_restart_with_the_cache_on_disk(checkpoint, tmp_path):
    """Answers are those of a server that knows nothing, and prompts are taken up where the killed one left them."""
    flags = ("--slots", "2", "--chunk", "32", "--max-length", "2048", "--cache", "fp32", "--compute", "float32")
    disk = ("--disk-cache", str(tmp_path / "blocks"), "--host-cache", "64MiB", "--hot-entries", "64")

    def ask(client, number: int):
        return client.completions.create(
            model=MODEL, prompt=f"{number}" + "once upon a time " * 40, max_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )

    def cached(found) -> list[int]:
        return [one.usage.prompt_tokens_details.cached_tokens for one in found]

    with process.Server(checkpoint, *flags) as server:
        expected = [ask(server.client(), number).choices[0] for number in range(3)]
    with process.Server(checkpoint, *flags, *disk) as server:
        client = server.client()
        first = [ask(client, number) for number in range(3)]
        again = [ask(client, number) for number in range(3)]
        one = iter(stream(client, 1500))
        next(one)
        server.signal(signal.SIGKILL)
        with pytest.raises((openai.APIError, Exception)):
            for _ in one:
                pass
        assert ended(server) == -signal.SIGKILL
    with process.Server(checkpoint, *flags, *disk) as server:
        later = [ask(server.client(), number) for number in range(3)]
        assert server.metric("v4train_prefix_hits_total") == 3
        assert server.metric("v4train_crc_failures_total") == 0
        page = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
        (tiers,) = re.findall(r"^With `--host-cache` there are also(.*?)\n\n", page, re.DOTALL | re.MULTILINE)
        for name in re.findall(r"`(\w+)`", tiers):
            server.metric(f"v4train_{name}")
    for found in (first, again, later):
        assert [one.choices[0] for one in found] == expected
    assert (cached(first), cached(again), cached(later)) == ([0] * 3, [512] * 3, [512] * 3)


@pytest.mark.slow
def test_a_port_that_is_taken_and_a_checkpoint_that_is_none(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main.main(["serve", str(checkpoint), "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err
    assert main.main(["serve", str(checkpoint.parent / "absent"), "--port", "0"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines, and there is no API key"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "some.example"], "can be reached from other machines"),
        (["--api-key-file", "{empty}"], "the API key is empty"),
        (["--api-key-file", "{absent}"], "No such file"),
        (["--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["--slots", "0"], "--slots 0: give at least 1"),
        (["--chunk", "-5"], "--chunk -5"),
        (["--drain-seconds", "-1"], "drain_seconds"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_options_are_said_before_anything_is_read(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.delenv("V4TRAIN_API_KEY", raising=False)
    (tmp_path / "empty").write_text(" \n")
    names = {"empty": tmp_path / "empty", "absent": tmp_path / "absent"}
    assert main.main(["serve", "no checkpoint", *(word.format(**names) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_key_from_the_environment_opens_other_addresses(tmp_path, capsys, monkeypatch):
    """It gets as far as the checkpoint."""
    monkeypatch.setenv("V4TRAIN_API_KEY", "key")
    for words in (["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--allow-without-key"]):
        assert main.main(["serve", str(tmp_path / "absent"), "--port", "0", *words]) == 2
        assert "absent does not exist" in capsys.readouterr().err
        monkeypatch.delenv("V4TRAIN_API_KEY", raising=False)
