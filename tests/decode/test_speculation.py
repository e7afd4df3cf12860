"""Drafts decide how fast an answer comes and never what it is: against the model without drafts, with good, bad and wrong drafts."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small
from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib
from v4train.decode import sampling, scheduler

BYTES = tokenizer_lib.ByteTokenizer()
MODEL = small.config("csa", "hca", vocab_size=BYTES.vocab_size, media_tokens=(BYTES.image, BYTES.audio))
SIZES = {"max_length": 64, "prefill_chunk": 8, "pages": 10}
SAMPLE = jax.jit(sampling.sample)


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def decoder(params):
    return sequences.decoder(MODEL, params, **SIZES, speculate=True)


def options(number: int) -> dict:
    return [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}][number % 4]


def requests(count: int = 12) -> list[request_lib.Request]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        prompt = sequences.text(int(rng.integers(1, 38)), vocab=256, seed=i)
        values = {"temperature": 0.0, "max_tokens": int(rng.integers(1, 26)), "seed": i, "ignore_end": True} | options(i)
        made.append(request_lib.Request(prompt, **values))
    return made


def answers(decoder: decoder_lib.Decoder, asked: list[request_lib.Request], tokenizer=BYTES) -> tuple[list, list]:
    made = scheduler.Scheduler(decoder, tokenizer=tokenizer)
    streams = [made.submit(one) for one in asked]
    while made.turn():
        pass
    return [[event.token for event in stream] for stream in streams], [*streams, made.statistics()]


@pytest.fixture(scope="module")
def plain(params):
    """Answers without drafts, each request alone."""
    own = sequences.decoder(MODEL, params, **SIZES)
    return [answers(own, [one])[0][0] for one in requests()]


class _Oracle:
    """Stands for the MTP block: says the token that the training forward pass would choose, or another one on purpose."""

    def __init__(self, decoder: decoder_lib.Decoder, *, share: float, seed: int = 0):
        self._draft, self.share, self.rng = decoder.draft, share, np.random.default_rng(seed)
        self.known: dict[tuple[int, int], int] = {}

    def __call__(self, cache, *, streams, following, counts):
        drafted = self._draft(cache, streams=streams, following=following, counts=counts)
        logits = np.full(drafted.logits.shape, -1e3, np.float32)
        lengths = np.asarray(drafted.cache.lengths)
        for slot in np.flatnonzero(counts):
            newest = int(following[slot, counts[slot] - 1])
            right = self.known.get((int(lengths[slot]), newest))
            wrong = int(self.rng.integers(0, 256))
            logits[slot, right if right is not None and self.rng.random() < self.share else wrong] = 0.0
        return drafted._replace(logits=logits)


def test_answers_are_those_without_drafts_in_any_company(decoder, plain):
    found, (*streams, counts) = answers(decoder, requests())
    assert found == plain
    assert counts.drafted == sum(stream.drafted for stream in streams) > 50
    assert counts.accepted == sum(stream.accepted for stream in streams)
    assert counts.pages == 0


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_right_drafts_halve_the_steps_and_wrong_ones_change_nothing(decoder, plain, monkeypatch, share):
    oracle = _Oracle(decoder, share=share)
    for one, answer in zip(requests(), plain, strict=True):
        at = len(one.prompt)
        oracle.known |= {(at + i, answer[i]): answer[i + 1] for i in range(len(answer) - 1)}
    monkeypatch.setattr(decoder, "draft", oracle)
    steps = []
    extend = decoder.extend
    monkeypatch.setattr(decoder, "extend", lambda *args, **kwargs: steps.append(kwargs["counts"].sum()) or extend(*args, **kwargs))
    found, (*_, counts) = answers(decoder, requests())
    assert found == plain
    made = sum(map(len, plain))
    assert counts.tokens == made
    if share == 1.0:
        alike = sum(len(answer) - 1 for answer in plain) - len(oracle.known)  # two requests with one token at one place
        assert counts.drafted - alike <= counts.accepted <= counts.drafted
        assert abs(counts.drafted - sum((len(answer) - 1) // 2 for answer in plain)) <= alike < 5
    elif share == 0.5:
        assert 0.3 < counts.accepted / counts.drafted < 0.7
    else:
        assert counts.accepted <= 3  # by chance
    # Each answer's first token comes from its prompt; a step makes one token, and one more for each accepted draft.
    assert sum(steps) - counts.drafted == made - len(plain) - counts.accepted


def test_an_answer_ends_at_the_first_of_two_tokens(decoder, plain, monkeypatch):
    """The end of the sequence, and a stop text, as the token before an accepted draft."""

    class Ends(tokenizer_lib.ByteTokenizer):
        eos = plain[0][2]

    number = next(i for i, answer in enumerate(plain) if len(answer) > 12)
    answer, one = plain[number], requests()[number]
    oracle = _Oracle(decoder, share=1.0)
    oracle.known = {(len(one.prompt) + i, answer[i]): answer[i + 1] for i in range(len(answer) - 1)}
    monkeypatch.setattr(decoder, "draft", oracle)
    for at in (3, 4, 5, 6):
        Ends.eos = answer[at]
        again = dataclasses.replace(one, ignore_end=False)
        (found,), (_, counts) = answers(decoder, [again], Ends())
        assert found == answer[: answer.index(answer[at]) + 1]
        assert (counts.pages, counts.tokens) == (0, len(found))


def test_two_tokens_are_reported_with_their_own_likelihoods(decoder, params, plain, monkeypatch):
    number = next(i for i, answer in enumerate(plain) if len(answer) > 12)
    answer, one = plain[number], requests()[number]
    oracle = _Oracle(decoder, share=1.0)
    oracle.known = {(len(one.prompt) + i, answer[i]): answer[i + 1] for i in range(len(answer) - 1)}
    monkeypatch.setattr(decoder, "draft", oracle)
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    stream = made.submit(dataclasses.replace(one, top_logprobs=2))
    while made.turn():
        pass
    events = list(stream)
    assert stream.accepted > 3
    whole = np.concatenate([one.prompt.tokens, answer])
    logits = sequences.teacher(MODEL, params, prompt_lib.Prompt.of_tokens(np.pad(whole, (0, 64 - len(whole)))))[0]
    expected = jax.nn.log_softmax(logits[len(one.prompt) - 1 : len(whole) - 1])
    np.testing.assert_allclose([e.logprob for e in events], [expected[i, token] for i, token in enumerate(answer)], atol=1e-3)
    np.testing.assert_allclose([e.top[0][1] for e in events], np.max(expected, axis=-1), atol=1e-3)


def test_prompts_that_are_taken_up_and_entries_on_the_host_change_nothing(params, plain):
    """The MTP block's window is part of what is kept of a prompt."""
    tiers = {"hot_entries": 24, "host_bytes": 2**20}
    own = sequences.decoder(MODEL, params, **SIZES | {"pages": 40}, speculate=True, prefix_bytes=2**24, state_tokens=16, tiers=tiers)
    made = scheduler.Scheduler(own, tokenizer=BYTES)
    for turn in range(2):
        streams = [made.submit(one) for one in requests()]
        while made.turn():
            pass
        assert [[event.token for event in stream] for stream in streams] == plain
        taken = [stream.cached_tokens for stream in streams]
        assert any(taken) == bool(turn)
        assert all(n in (0, 16, 32) for n in taken)
    own.close()


def test_nothing_is_compiled_twice(params):
    own = sequences.decoder(MODEL, jax.device_put(params, jax.devices()[0]), slots=2, max_length=48, prefill_chunk=8, speculate=True)
    made = scheduler.Scheduler(own, tokenizer=BYTES)
    for number in range(4):
        made.submit(request_lib.Request(sequences.text(5, vocab=256, seed=number), max_tokens=6, ignore_end=True))
        made.turn()
    while made.turn():
        pass
    assert (own._prefill._cache_size(), own._extend._cache_size(), own._draft._cache_size()) == (1, 1, 1)
