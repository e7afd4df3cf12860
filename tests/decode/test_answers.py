"""With `keep_answers` the next turn of a conversation takes up the last answer: the same tokens, and the same numbers up to rounding."""

import dataclasses

import numpy as np
import pytest

from tests.decode import sequences
from tests.decode.test_prefix import BYTES, begun, disk, media, run, text
from tests.model import small
from v4train.decode import config as config_lib
from v4train.decode import prefix, scheduler
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib

MODEL = small.config("csa", "hca", vocab_size=BYTES.vocab_size, media_tokens=(BYTES.image, BYTES.audio), moe={"hash_layers": 0})
SIZES = {"max_length": 192, "prefill_chunk": 32, "page_tokens": 16, "prefix_bytes": 10**7, "cache": "fp8", "speculate": True}
PAGE = 16


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def plain(params):
    """Without drafts, tiers and reuse."""
    return sequences.decoder(MODEL, params, **SIZES | {"prefix_bytes": 0, "speculate": False})


@pytest.fixture(scope="module")
def keeping(params, tmp_path_factory):
    """With all of them: drafts are taken back, host memory spills to the file, and blocks outlive a scheduler."""
    made = sequences.decoder(MODEL, params, **SIZES, keep_answers=True, **disk(tmp_path_factory.mktemp("disk"), host=1500, hot=8))
    yield made
    made.close()


def next_turn(asked: request_lib.Request, answer: list, *, seed: int, length: int = 7, tokens: int = 45) -> request_lib.Request:
    """The prompt, all tokens of its answer, and a new message."""
    said = [token for token, _ in answer] + sequences.text(length, vocab=256, seed=seed).tokens.tolist()
    return dataclasses.replace(asked, prompt=asked.prompt.followed_by(said), max_tokens=tokens)


def same(found: list, expected: list) -> None:
    assert [token for token, _ in found] == [token for token, _ in expected]
    np.testing.assert_allclose([logprob for _, logprob in found], [logprob for _, logprob in expected], atol=2e-3)


def ends(prompt: int, answer: int) -> int:
    """Whole pages of a sequence when its last step begins, which processes the last token but one."""
    return (prompt + answer - 2) // PAGE * PAGE


def conversation(
    made: scheduler.Scheduler, plain, *, first: request_lib.Request, tokens: int = 45
) -> list[tuple[request_lib.Request, list]]:
    """Three turns, each compared with what is computed from nothing; requests and answers."""
    asked, turns, known = first, [], 0
    for turn in range(3):
        answer, cached = run(made, asked)[0]
        expected, _ = run(scheduler.Scheduler(plain, tokenizer=BYTES), asked)[0]
        same(answer, expected)
        assert cached == known
        turns.append((asked, answer))
        known = ends(len(asked.prompt), len(answer))
        asked = next_turn(asked, answer, seed=50 + turn, tokens=tokens)
    return turns


def test_each_turn_takes_up_the_last_ones_answer(keeping, plain):
    """Over restarts too; what lies on the disk gives the same bits as what is in memory."""
    made = begun(keeping)
    turns = conversation(made, plain, first=text((0, 20), tokens=45))
    assert made.statistics().drafted > 100
    assert made.statistics().pages == 0
    assert (made._pages._owners > 0).sum() == made._prefixes.held
    last = next_turn(*turns[2], seed=60, tokens=5)
    assert run(made, last) == run(begun(keeping), last)
    for asked, answer in turns[1:]:
        found, cached = run(begun(keeping), asked)[0]
        assert cached >= ends(len(asked.prompt) - 52, 45)
        same(found, answer)


@pytest.mark.parametrize("start", [20, 21])
def test_a_right_draft_does_not_step_over_the_end_of_a_page(keeping, plain, monkeypatch, start):
    """Two tokens a step: without a word against it, one of the two starts would go from 31 to 33."""
    asked = text((start, start), tokens=45)
    expected, _ = run(scheduler.Scheduler(plain, tokenizer=BYTES), asked)[0]
    draft = keeping.draft

    def right(cache, *, streams, following, counts):
        drafted = draft(cache, streams=streams, following=following, counts=counts)
        logits = np.zeros(drafted.logits.shape, np.float32)
        for slot in np.flatnonzero(counts):
            after = int(drafted.cache.lengths[slot]) - start + 1  # tokens of the answer that are out
            logits[slot, expected[after][0] if after < len(expected) else 0] = 1.0
        return drafted._replace(logits=logits)

    made = begun(keeping)
    with monkeypatch.context() as patched:
        patched.setattr(keeping, "draft", right)
        answer, _ = run(made, asked)[0]
    same(answer, expected)
    counts = made.statistics()
    assert counts.accepted == counts.drafted > 18
    following = next_turn(asked, answer, seed=start, tokens=10)
    found, cached = run(made, following)[0]
    assert cached == ends(start, 45)
    same(found, run(scheduler.Scheduler(plain, tokenizer=BYTES), following)[0][0])


def test_a_prompt_that_ends_with_a_page_is_taken_up_whole(keeping):
    """Its state is taken before the first step; a prompt alone leaves one at its last whole chunk."""
    asked = text((1, 48), tokens=3)
    made = begun(keeping)
    answer, _ = run(made, asked)[0]
    assert run(made, next_turn(asked, answer, seed=1))[0][1] == 48


def test_what_was_not_computed_is_not_shared(keeping, plain):
    """A cancelled answer leaves what its steps had processed; another continuation finds what it shares, by whole pages."""
    made, company = begun(keeping), []
    asked = text((2, 20), tokens=100)
    stream = made.submit(asked, listener=company.append)
    while len(company) < 40:
        made.turn()
    stream.cancel()
    made.turn()
    said = [(event.token, event.logprob) for event in company if event.token is not None]
    assert company[-1].finish_reason == "cancelled"
    for kept, cached in ((len(said), ends(20, len(said) + 1)), (15, 0)):
        following = next_turn(asked, said[:kept], seed=3, tokens=12)
        answer, found = run(made, following)[0]
        assert found == cached
        same(answer, run(scheduler.Scheduler(plain, tokenizer=BYTES), following)[0][0])
    assert (made._pages._owners > 0).sum() == made._prefixes.held


def test_an_answer_to_images_and_sound(keeping, plain):
    first = request_lib.Request(media(), max_tokens=30, temperature=0.0, ignore_end=True)
    conversation(begun(keeping), plain, first=first, tokens=25)
    made = begun(keeping)
    other = dataclasses.replace(first, prompt=media(patch=200))
    answer, cached = run(made, other)[0]
    assert cached == 0
    same(answer, run(scheduler.Scheduler(plain, tokenizer=BYTES), other)[0][0])


def test_together_as_alone(keeping, plain):
    """Conversations side by side, drawn ones among them."""
    made = begun(keeping)
    firsts = [text((10 + i, 9 + 11 * i), tokens=20 + 9 * i, temperature=float(i % 2), seed=i) for i in range(5)]
    turns = [next_turn(one, answer, seed=i, tokens=20) for i, (one, (answer, _)) in enumerate(zip(firsts, run(made, *firsts), strict=True))]
    found = run(made, *turns)
    for one, first, (answer, cached) in zip(turns, firsts, found, strict=True):
        same(answer, run(scheduler.Scheduler(plain, tokenizer=BYTES), one)[0][0])
        assert cached == ends(len(first.prompt), first.max_tokens)


def test_who_does_not_ask_for_it_finds_none(keeping, params):
    off = sequences.decoder(MODEL, params, **SIZES)
    assert prefix.fingerprint(off) != prefix.fingerprint(keeping)
    with pytest.raises(ValueError, match="keep_answers is true, but prefix_bytes 0"):
        config_lib.DecodeConfig(keep_answers=True)


def test_a_prompt_and_its_answer_are_one_prompt():
    whole = media().followed_by([1, 2])
    assert (len(whole), whole.tokens.dtype, whole.tokens[-2:].tolist(), whole.modality[-2:].tolist()) == (62, np.int32, [1, 2], [0, 0])
    assert whole.patches is not None
    assert len(whole.patches) == 20
    assert isinstance(whole, prompt_lib.Prompt)
