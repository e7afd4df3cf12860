"""Prompts that begin as earlier ones did are taken up where those are known, and get the same bits; over restarts too."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small
from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import moves, prefix, scheduler
from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib

BYTES = tokenizer_lib.ByteTokenizer()
VOCABULARY = {"vocab_size": BYTES.vocab_size, "media_tokens": (BYTES.image, BYTES.audio)}
MODEL = small.config("csa", "hca", **VOCABULARY, moe={"hash_layers": 0}, mtp=None)
SIZES = {"max_length": 128, "prefill_chunk": 16, "page_tokens": 16, "prefix_bytes": 10**7, "state_tokens": 32, "cache": "fp8"}


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


def disk(path, *, size: int = 10**7, host: int = 10**6, hot: int = 4) -> dict:
    return {"tiers": {"hot_entries": hot, "host_bytes": host, "disk": {"path": str(path), "bytes": size}}}


def text(*parts: tuple[int, int], tokens: int = 6, **options) -> request_lib.Request:
    """Of pieces (seed, length)."""
    ids = np.concatenate([sequences.text(length, vocab=256, seed=seed).tokens for seed, length in parts])
    values = {"max_tokens": tokens, "temperature": 0.0, "ignore_end": True} | options
    return request_lib.Request(prompt_lib.Prompt.of_tokens(ids), **values)


def run(made: scheduler.Scheduler, *requests: request_lib.Request) -> list[tuple[list, int]]:
    """Tokens with log-probabilities, and cached tokens."""
    streams = [made.submit(one) for one in requests]
    while made.turn():
        pass
    return [([(event.token, event.logprob) for event in stream], stream.cached_tokens) for stream in streams]


REQUESTS = [text((0, 70), (1, 9)), text((0, 70), (2, 20)), text((0, 40)), text((0, 32)), text((3, 5)), text((0, 70), (1, 9), (4, 20))]
CACHED = [0, 64, 32, 0, 0, 64]


@pytest.fixture(scope="module")
def plain(params):
    """Answers without reuse or tiers."""
    made = scheduler.Scheduler(sequences.decoder(MODEL, params, **SIZES | {"prefix_bytes": 0}), tokenizer=BYTES)
    return [run(made, one)[0][0] for one in REQUESTS]


@pytest.fixture(scope="module")
def reusing(params):
    return sequences.decoder(MODEL, params, **SIZES)


def test_what_was_computed_once_is_taken_up(reusing, plain):
    """A third of the last: the state at 64 of 79 tokens, and that of 32 for a prompt that ends before."""
    made = scheduler.Scheduler(reusing, tokenizer=BYTES)
    found = [run(made, one)[0] for one in REQUESTS]
    assert [answer for answer, _ in found] == plain
    assert [cached for _, cached in found] == CACHED
    assert made.statistics().pages == 0
    together = scheduler.Scheduler(reusing, tokenizer=BYTES)
    found = run(together, *REQUESTS)
    assert [answer for answer, _ in found] == plain
    assert [cached for _, cached in found] == CACHED
    counts = together.tier_statistics()
    assert (counts["prefix_hits_total"], counts["prefix_tokens_total"]) == (3, 160)


@pytest.fixture(scope="module")
def tiered(params, tmp_path_factory):
    """With little host memory: much of it goes through the file."""
    made = sequences.decoder(MODEL, params, **SIZES, **disk(tmp_path_factory.mktemp("disk"), host=900))
    yield made
    made.close()


def begun(decoder) -> scheduler.Scheduler:
    """As after a restart: memory is empty, the disk is not."""
    decoder.blocks.flush()
    return scheduler.Scheduler(decoder, tokenizer=BYTES)


def test_the_disk_has_what_memory_lost(tiered, plain):
    first = run(begun(tiered), *REQUESTS)
    assert first == list(zip(plain, CACHED, strict=True))
    made = begun(tiered)
    assert [run(made, one)[0] for one in REQUESTS] == list(zip(plain, [64, 80, 32, 16, 0, 96], strict=True))
    counts = made.tier_statistics()
    assert counts["swap_read_total"] > 10
    assert counts["crc_failures_total"] == counts["swap_damaged_total"] == 0
    assert counts["host_bytes"] <= 900


def test_no_flipped_bit_on_the_disk_changes_an_answer(tiered, reusing):
    requests = [text((100 + i, 97), tokens=3) for i in range(18)]
    expected = [answer for answer, _ in run(scheduler.Scheduler(reusing, tokenizer=BYTES), *requests)]
    run(begun(tiered), *requests)
    tiered.blocks.flush()
    rng, keys = np.random.default_rng(0), list(tiered.blocks._index)
    chosen = [keys[i] for i in rng.permutation(len(keys))[:100]]
    for key in chosen:
        file = tiered.blocks._file(key)
        data = bytearray(file.read_bytes())
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
    before = tiered.blocks.counts["crc_failures"]
    found = run(begun(tiered), *requests)
    assert [answer for answer, _ in found] == expected
    assert 0 < sum(cached for _, cached in found) < 18 * 96
    tiered.blocks.flush()
    for key in chosen:  # those behind a damaged one were not asked for; those that were are written anew
        tiered.blocks.get(key)
    assert tiered.blocks.counts["crc_failures"] - before == 100


def test_entries_that_the_file_loses_are_computed_again(tiered, plain):
    """While sequences run: what was answered stays, and what follows is what would have."""
    requests = [text((0, 70), (1, 9), tokens=40), text((7, 60), tokens=30, temperature=1.0, seed=5), text((8, 20), tokens=50)]
    expected = [answer for answer, _ in run(begun(tiered), *requests)]
    made, rng, damages = begun(tiered), np.random.default_rng(0), 0
    before = made.tier_statistics()["swap_damaged_total"]
    streams = [made.submit(one) for one in requests]
    swap = tiered.tiers.pool.swap
    for turn in range(400):
        if not made.turn():
            break
        if turn % 12 == 11 and swap._places and damages < 6:
            place, _ = list(swap._places.values())[int(rng.integers(len(swap._places)))]
            os.pwrite(swap._file, rng.bytes(20), place * swap._size)
            damages += 1
    assert [[(event.token, event.logprob) for event in stream] for stream in streams] == expected
    assert made.tier_statistics()["swap_damaged_total"] > before
    assert made.statistics().pages == 0


def test_cancelled_and_queued_requests_leave_no_page_behind(tiered, plain):
    made = begun(tiered)
    gone = [made.submit(text((0, 70), (20 + i, 30), tokens=25)) for i in range(6)]
    for turn in range(30):
        made.turn()
        if turn % 5 == 4:
            gone[turn // 5].cancel()
    kept = run(made, *REQUESTS)
    assert [answer for answer, _ in kept] == plain
    assert made.statistics().pages == 0
    owned = (made._pages._owners > 0).sum()
    assert owned == made._prefixes.held == made.tier_statistics()["prefix_pages"]


def test_pages_that_a_cancelled_prompt_never_computed_are_not_shared(reusing):
    """Its states are known, but of its six pages only two are left: the others get new pages, which hold nothing when it is cancelled."""
    one = text((0, 97), tokens=3)
    made = scheduler.Scheduler(reusing, tokenizer=BYTES)
    expected, _ = run(made, one)[0]
    known = made._prefixes
    keys = known._keys(one.prompt, 96)
    for key in keys[2:]:
        known._pages.drop([known._held.pop(key).page])
    run(made, text((9, 120), tokens=1))  # takes the pages that are free
    stream = made.submit(one)
    made.turn()
    stream.cancel()
    made.turn()
    assert stream.cached_tokens == 32
    assert [key in known._held for key in keys] == [True] * 2 + [False] * 4
    assert run(made, one)[0] == (expected, 32)


def test_others_take_their_steps_while_a_beginning_is_loaded(tiered, plain, monkeypatch):
    """A page a turn instead of sixteen: the prompt's 64 tokens take four turns, in each of which the other one gets its token."""
    monkeypatch.setattr(moves, "TOGETHER", 1)
    run(begun(tiered), REQUESTS[0])
    made, company, gone = begun(tiered), [], []
    other = text((8, 20), tokens=40)
    made.submit(other, listener=company.append)
    while not company:
        made.turn()
    leaving = made.submit(REQUESTS[0], listener=gone.append)
    before = len(company)
    for turn in range(2):
        made.turn()
        assert (len(company), gone, made._order[1].read) == (before + turn + 1, [], 0)
    leaving.cancel()
    made.turn()
    assert gone[0].finish_reason == "cancelled"
    before, answer = len(company), []
    stream = made.submit(REQUESTS[0], listener=answer.append)
    while not answer:
        made.turn()
    assert len(company) - before >= 64 // 16
    while made.turn():
        pass
    assert [(event.token, event.logprob) for event in answer] == plain[0]
    assert stream.cached_tokens == 64
    assert [(event.token, event.logprob) for event in company] == run(begun(tiered), other)[0][0]
    assert (made._pages._owners > 0).sum() == made._prefixes.held


def test_a_bad_block_in_the_middle_is_a_miss_and_the_prompt_is_looked_up_again(tiered, reusing, monkeypatch):
    """Two pages are shared with company, two are good, the fifth is not: the pages go back, and are too few until there are others."""
    monkeypatch.setattr(moves, "TOGETHER", 1)
    one = text((30, 97), tokens=3)
    expected, _ = run(scheduler.Scheduler(reusing, tokenizer=BYTES), one)[0]
    run(begun(tiered), one)
    made = begun(tiered)
    keys = made._prefixes._keys(one.prompt, 96)
    assert run(made, text((30, 33)))[0][1] == 32
    file = tiered.blocks._file(keys[4])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before, company, answer = tiered.blocks.counts["crc_failures"], [], []
    other = text((30, 33), (31, 5), tokens=40)
    made.submit(other, listener=company.append)
    stream = made.submit(one, listener=answer.append)
    made.turn()  # the other's prompt
    made.turn()  # the first page
    taken = [made._pages._free.pop() for _ in range(made._pages.free)]
    made._pages.hold(taken)
    made.turn()
    made.turn()
    assert (made.statistics().waiting, made.statistics().running, tiered.blocks.counts["crc_failures"] - before) == (1, 1, 1)
    steps = len(company)
    for _ in range(3):
        made.turn()
    assert (answer, made.statistics().waiting, len(company)) == ([], 1, steps + 3)
    made._pages.drop(taken)
    while made.turn():
        pass
    assert [(event.token, event.logprob) for event in answer] == expected
    assert stream.cached_tokens == 64
    assert [(event.token, event.logprob) for event in company] == run(begun(tiered), other)[0][0]
    assert (made._pages._owners > 0).sum() == made._prefixes.held


def test_a_prompt_that_is_scored_leaves_nothing(reusing, plain, monkeypatch):
    """Its chunks are computed by a program that gives the logits of all tokens, here played by the one that gives the last token's."""
    prefill = reusing.prefill

    def every(*args, every: bool, **options):
        decoded = prefill(*args, **options)
        return decoded._replace(logits=np.broadcast_to(decoded.logits, (16, len(decoded.logits)))) if every else decoded

    made = scheduler.Scheduler(reusing, tokenizer=BYTES)
    monkeypatch.setattr(reusing, "prefill", every)
    scored = dataclasses.replace(REQUESTS[0], score_prompt=True)
    assert [run(made, one)[0][1] for one in (scored, scored, REQUESTS[0], REQUESTS[0])] == [0, 0, 0, 64]
    assert run(made, REQUESTS[0])[0][0] == plain[0]


@pytest.mark.slow
def test_pages_of_prompts_make_room_for_requests(params, plain):
    """Slow: a decoder of its own. As many pages as one sequence needs: whatever is held has to go when the next one comes."""
    decoder = sequences.decoder(MODEL, params, **SIZES, pages=8)
    made = scheduler.Scheduler(decoder, tokenizer=BYTES)
    for _ in range(2):
        assert [run(made, one)[0][0] for one in REQUESTS] == plain
    assert made.tier_statistics()["prefix_hits_total"] > 2


def test_states_stay_within_their_bytes(reusing):
    made = scheduler.Scheduler(reusing, tokenizer=BYTES)
    known = made._prefixes
    for i in range(5):
        known._keep_state(bytes([i]), bytes(4 * 10**6))
    assert list(known._states) == [bytes([3]), bytes([4])]


def test_the_fingerprint_tells_models_and_layouts_apart(params, reusing):
    def of(values=params, **config) -> bytes:
        return prefix.fingerprint(sequences.decoder(MODEL, values, **SIZES | config))

    same = prefix.fingerprint(reusing)
    assert of() == of(slots=1) == same
    others = [of(cache="bf16"), of(prefill_chunk=32), of(page_tokens=32), of(compute="bfloat16"), of(small.parameters(MODEL, seed=1))]
    one = jax.tree.map(lambda x: x, params)
    one["head"] = one["head"].at[0, 0].add(1e-3)
    assert len({same, *others, of(one)}) == 7


def media(length: int = 60, *, patch: int = 3, frame: int = 5) -> prompt_lib.Prompt:
    """Text, 20 patches from token 10 on, text, and 10 frames from token 40 on."""
    ids, modality = sequences.text(length, vocab=256, seed=9).tokens.copy(), np.zeros(length, np.int32)
    ids[10:30], ids[40:50] = BYTES.image, BYTES.audio
    modality[10:30], modality[40:50] = 1, 2
    patches = np.random.default_rng(patch).integers(0, 256, (20, 3 * small.PATCH**2)).astype(np.uint8)
    places = np.stack([np.arange(20) % 5, np.arange(20) // 5], axis=1).astype(np.int16)
    return prompt_lib.Prompt(ids, modality, patches, places, np.full((10, 80), frame, np.uint8))


def test_images_and_sound_are_part_of_what_is_compared(reusing):
    made = scheduler.Scheduler(reusing, tokenizer=BYTES)
    keys = {
        name: made._prefixes._keys(one, 48)
        for name, one in {"a": media(), "same": media(), "patch": media(patch=4), "frame": media(frame=6)}.items()
    }
    assert keys["a"] == keys["same"]
    alike = {name: [x == y for x, y in zip(keys["a"], keys[name], strict=True)] for name in ("patch", "frame")}
    assert alike == {"patch": [False, False, False], "frame": [True, True, False]}
    requests = [request_lib.Request(one, max_tokens=4, temperature=0.0, ignore_end=True) for one in (media(), media(), media(patch=200))]
    first, again, other = run(made, *requests)
    assert (first[1], again, other[1]) == (0, (first[0], 48), 0)
    assert other[0] != first[0]
