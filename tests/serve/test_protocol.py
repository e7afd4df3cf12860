"""What may be asked, and how everything else is refused: with the field and the reason, and never with a stack trace."""

import json

import pytest

from v4train.serve import failure, protocol

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**changes) -> protocol.ChatRequest:
    return protocol.parse(json.dumps(CHAT | changes).encode(), cls=protocol.ChatRequest)


def completion(**changes) -> protocol.CompletionRequest:
    return protocol.parse(json.dumps(TEXT | changes).encode(), cls=protocol.CompletionRequest)


def refused(call) -> failure.RequestError:
    with pytest.raises(failure.RequestError) as caught:
        call()
    error = caught.value
    assert error.status == 400
    assert error.body["error"].keys() == {"message", "type", "param", "code"}
    return error


def test_what_clients_send_is_understood():
    asked = chat(
        max_completion_tokens=5, temperature=0, top_p=0.5, stop="x", n=2, seed=-1, logprobs=True, top_logprobs=3, stream=True,
        stream_options={"include_usage": True}, user="me", metadata={"a": "b"}, frequency_penalty=0.0, tools=[], tool_choice="none",
        response_format={"type": "text"}, max_tokens=None,
    )  # fmt: skip
    assert (asked.most_tokens, asked.stops, asked.n, asked.stream_options.include_usage) == (5, ("x",), 2, True)
    assert chat(stop=["a", "b"]).stops == ("a", "b")
    assert chat(stop=None).stops == ()
    assert chat(max_tokens=7).most_tokens == 7


def test_an_answer_can_be_sent_back():
    """Clients put the message that they got into the next request, with all its empty fields."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    asked = chat(
        messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | empty, {"role": "user", "content": "c"}]
    )
    assert [message.content for message in asked.messages] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])]
)
def test_prompts_are_texts_or_ids(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [5, {}, [], [[]], [1, "a"], [1.5], [True], [-1], [[1], "a", None]], ids=str)
def test_other_prompts_are_refused(prompt):
    assert refused(lambda: completion(prompt=prompt).prompts).param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("n", 0),
        ("n", 129),
        ("seed", "a"),
        ("seed", 2**64),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stream", "yes"),
        ("stream_options", []),
        ("stream_options", {"x": 1}),
        ("tempature", 1),
        ("model", 5),
        ("tools", [{"type": "function"}]),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("messages", "hi"),
        ("messages", []),
        ("messages", [5]),
        ("messages", [{"role": "user"}] * 0 + [{"content": "x"}]),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "video", "video": 1}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
        ("top_logprobs", 3),
        ("chat_template_kwargs", {"a": [1]}),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_wrong_field_is_named(field, value):
    error = refused(lambda: chat(**{field: value}))
    assert error.param.split(".")[0] == field
    assert field in error.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "\\ud800"}', b"{}"],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_request_is_refused(body):
    for cls in (protocol.ChatRequest, protocol.CompletionRequest):
        refused(lambda cls=cls: protocol.parse(body, cls=cls))


def test_problems_are_named_together_and_where_they_are():
    error = refused(lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": 5}]}], n="x", seed="y", top_p=2))
    assert error.message.split("; ") == [
        "top_p: Input should be less than or equal to 1",
        "n: Input should be a valid integer",
        "seed: Input should be a valid integer",
        "and 1 more",
    ]
    error = refused(lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": 5}]}]))
    assert (error.message, error.param) == ("messages.0.content.0.text: Input should be a valid string", "messages.0.content.0.text")


def test_two_limits_must_agree():
    assert chat(max_tokens=5, max_completion_tokens=5).most_tokens == 5
    assert refused(lambda: chat(max_tokens=5, max_completion_tokens=6)).param == "max_tokens"


@pytest.mark.parametrize(("changes", "param"), [({"logprobs": 21}, "logprobs"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix")])
def test_what_completions_do_not_have(changes, param):
    assert refused(lambda: completion(**changes)).param == param
    assert completion(best_of=1, echo=True, logprobs=0).echo
