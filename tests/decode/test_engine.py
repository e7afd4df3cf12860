"""Answers are those of the model run alone, whatever else runs; and the engine outlives what happens to its requests."""

import threading

import jax
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small
from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import engine as engine_lib
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib
from v4train.decode import sampling, scheduler

BYTES = tokenizer_lib.ByteTokenizer()
MODEL = small.config("csa", "hca", vocab_size=BYTES.vocab_size, media_tokens=(BYTES.image, BYTES.audio), mtp=None)
LENGTH = 64
SAMPLE = jax.jit(sampling.sample)


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def decoder(params):
    """Three slots, but pages for two and a half full sequences: some requests have to wait for them."""
    return sequences.decoder(MODEL, params, max_length=LENGTH, prefill_chunk=8, pages=10)


def request(number: int = 0, *, length: int = 20, tokens: int = 12, **options) -> request_lib.Request:
    values = {"max_tokens": tokens, "temperature": 0.0, "ignore_end": True} | options
    return request_lib.Request(sequences.text(length, vocab=256, seed=number), **values)


def finish(scheduler_: scheduler.Scheduler) -> None:
    while scheduler_.turn():
        pass


def answer(stream: request_lib.Stream) -> list[int]:
    return [event.token for event in stream if event.token is not None]


def run(decoder, *requests: request_lib.Request) -> list[list[request_lib.Event]]:
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    streams = [made.submit(one) for one in requests]
    finish(made)
    return [list(stream) for stream in streams]


def by_teacher(params, one: request_lib.Request, tokens: list[int]) -> tuple[list[int], np.ndarray]:
    """The tokens that the training forward pass over prompt and answer would choose, and the log-probabilities of the answer's."""
    whole = np.concatenate([one.prompt.tokens, tokens])
    logits = sequences.teacher(MODEL, params, prompt_lib.Prompt.of_tokens(np.pad(whole, (0, LENGTH - len(whole)))))[0]
    seed = 0 if one.seed is None else one.seed
    knobs = sampling.Knobs(
        np.full(LENGTH, one.temperature, np.float32),
        np.full(LENGTH, one.top_k, np.int32),
        np.full(LENGTH, one.top_p, np.float32),
        np.full((LENGTH, 2), [seed, 0], np.uint32),
    )
    chosen = SAMPLE(logits, knobs=knobs, positions=np.arange(1, LENGTH + 1, dtype=np.int32))
    answer = slice(len(one.prompt) - 1, len(whole) - 1)
    return np.asarray(chosen.tokens)[answer].tolist(), np.asarray(chosen.logprobs)[answer]


OPTIONS = [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}]


def test_random_arrivals_change_no_answer(decoder, params):
    rng = np.random.default_rng(0)
    requests = [
        request(i, length=int(rng.integers(1, 40)), tokens=int(rng.integers(1, 24)), seed=i, **OPTIONS[i % len(OPTIONS)]) for i in range(24)
    ]
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    streams, together = [], 0
    while len(streams) < len(requests) or made.busy:
        streams += [made.submit(one) for one in requests[len(streams) : len(streams) + int(rng.integers(0, 3))]]
        made.turn()
        together += made.statistics().running == 3
    assert together > 10
    for one, stream in zip(requests, streams, strict=True):
        events = list(stream)
        tokens = [event.token for event in events]
        expected, logprobs = by_teacher(params, one, tokens)
        assert tokens == expected
        np.testing.assert_allclose([event.logprob for event in events], logprobs, atol=1e-3)
        assert len(tokens) == one.max_tokens
        assert [event.finish_reason for event in events[-2:]][-1] == "length"
        assert [event.token for event in run(decoder, one)[0]] == tokens
    counts = made.statistics()
    assert (counts.finished["length"], counts.running, counts.waiting, counts.pages) == (24, 0, 0, 0)
    assert counts.tokens == sum(one.max_tokens for one in requests)
    assert counts.prompt_tokens == sum(len(one.prompt) for one in requests)


def test_text_is_that_of_the_tokens_together(decoder):
    (events,) = run(decoder, request(3, tokens=40, temperature=1.0, seed=5))
    tokens = np.array([event.token for event in events])
    assert "".join(event.text for event in events) == BYTES.decode(tokens)


def test_the_end_of_the_sequence_and_stop_texts_end_an_answer(decoder):
    one = request(4, tokens=30, temperature=1.0, seed=1)
    (whole,) = run(decoder, one)
    text = "".join(event.text for event in whole)
    stop = text[10:13]
    (events,) = run(decoder, request(4, tokens=30, temperature=1.0, seed=1, stop=("never", stop)))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"
    tokens = [event.token for event in whole]
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    made.tokenizer = _Ends(tokens[6])
    stream = made.submit(request(4, tokens=30, temperature=1.0, seed=1, ignore_end=False))
    finish(made)
    first = tokens.index(tokens[6])
    events = list(stream)
    assert [event.token for event in events] == tokens[: first + 1]
    assert (events[-1].finish_reason, "".join(event.text for event in events)) == ("stop", BYTES.decode(np.array(tokens[:first])))


class _Ends(tokenizer_lib.ByteTokenizer):
    """Bytes, but an answer ends with another token."""

    def __init__(self, eos: int):
        self.eos = eos


def test_the_most_likely_tokens_are_reported_to_those_who_ask(decoder):
    asked, plain = run(decoder, request(1, top_logprobs=3), request(2))
    assert all(event.top == () for event in plain)
    for event in asked:
        assert event.top[0] == (event.token, pytest.approx(event.logprob, rel=1e-6))
        assert [value for _, value in event.top] == sorted((value for _, value in event.top), reverse=True)
        assert len(event.top) == 3


def test_cancelled_requests_end_and_leave_the_others_alone(decoder):
    expected = run(decoder, request(1), request(2))
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    first, gone, second, last = (made.submit(request(i)) for i in (1, 8, 2, 9))
    last.cancel()
    for _ in range(8):
        made.turn()
    gone.cancel()
    finish(made)
    assert list(last) == [request_lib.Event(None, "", finish_reason="cancelled")]
    assert list(gone)[-1].finish_reason == "cancelled"
    assert [answer(first), answer(second)] == [[event.token for event in events] for events in expected]
    assert made.statistics().pages == 0


def test_what_cannot_be_answered_is_refused_with_all_reasons(decoder):
    made = scheduler.Scheduler(decoder, tokenizer=BYTES, waiting=1)
    with pytest.raises(ValueError, match=r"max_tokens 45.*1 to 44.*temperature -1.*top_p 0.*top_k -2.*top_logprobs 21.*stop text"):
        made.submit(request(tokens=45, temperature=-1.0, top_p=0.0, top_k=-2, top_logprobs=21, stop=("",)))
    with pytest.raises(ValueError, match="all that a sequence may have"):
        made.submit(request(length=LENGTH, tokens=1))
    with pytest.raises(ValueError, match="token ids"):
        made.submit(request_lib.Request(prompt_lib.Prompt.of_tokens(np.array([272]))))
    made.submit(request())
    with pytest.raises(request_lib.QueueFullError, match="try again"):
        made.submit(request())
    assert made.submit(request(tokens=None)).max_tokens == 44 if made.turn() else False


class _Broken(tokenizer_lib.ByteTokenizer):
    """Cannot spell some tokens."""

    def decode(self, ids):
        if len(ids) and int(ids[-1]) % 7 == 0:
            raise ValueError("no such piece")
        return super().decode(ids)


def test_an_error_of_one_request_ends_this_one_only(decoder, caplog):
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    good = made.submit(request(1))
    made.tokenizer = _Broken()
    bad = made.submit(request(2, tokens=40, temperature=1.0, seed=0))
    finish(made)
    (expected,) = run(decoder, request(1))
    assert list(good) == expected
    with pytest.raises(ValueError, match="no such piece"):
        list(bad)
    assert made.statistics().finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 1}


def test_a_call_of_the_model_that_fails_ends_those_in_it(decoder, monkeypatch, caplog):
    expected = run(decoder, request(1), request(5))
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    lost, waiting = made.submit(request(2)), [made.submit(request(i)) for i in (3, 4)]
    for _ in range(5):
        made.turn()

    def fail(cache, **_):
        jax.tree.map(lambda x: x.delete(), cache)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "extend", fail)
        made.turn()
    late = [made.submit(request(i)) for i in (1, 5)]
    finish(made)
    for stream in (lost, *waiting):
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream)
    assert [list(stream) for stream in late] == expected
    assert "a call of the model failed" in caplog.text


def test_the_engine_serves_threads_and_closes_after_the_last_answer(decoder):
    requests = [request(i, temperature=1.0, seed=i) for i in range(10)]
    expected = run(decoder, *requests)
    found = {}
    with engine_lib.Engine(decoder, tokenizer=BYTES) as engine:
        threads = [threading.Thread(target=lambda i=i: found.update({i: list(engine.submit(requests[i]))})) for i in range(8)]
        for thread in threads:
            thread.start()
        heard = []
        engine.submit(requests[8], listener=heard.append)
        for thread in threads:
            thread.join()
        last = engine.submit(requests[9])
    assert [found[i] for i in range(8)] == expected[:8]
    assert (heard, list(last)) == (expected[8], expected[9])
    with pytest.raises(engine_lib.ClosedError):
        engine.submit(requests[0])


def test_nothing_is_compiled_twice(params):
    own = sequences.decoder(MODEL, jax.device_put(params, jax.devices()[0]), max_length=32, prefill_chunk=8)
    made = scheduler.Scheduler(own, tokenizer=BYTES)
    for number in range(5):
        made.submit(request(number, length=5, tokens=4))
        made.turn()
    finish(made)
    assert (own._prefill._cache_size(), own._extend._cache_size()) == (1, 1)


def test_an_engine_that_is_left_by_an_error_cancels(decoder):
    def leave():
        with engine_lib.Engine(decoder, tokenizer=BYTES) as engine:
            streams.extend(engine.submit(request(i, tokens=40)) for i in range(6))
            raise KeyboardInterrupt

    streams = []
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 6


def test_an_engine_that_breaks_says_so_to_everyone(decoder, monkeypatch, caplog):
    def fail():
        raise RuntimeError("a mistake of ours")

    engine = engine_lib.Engine(decoder, tokenizer=BYTES)
    monkeypatch.setattr(engine.scheduler, "turn", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(engine.submit(request()))
    assert engine.close(timeout=10)
    with pytest.raises(engine_lib.ClosedError):
        engine.submit(request())
