"""Continuous batching: requests come and go while others run.

Each *turn* gives free slots to the requests that wait longest, processes one chunk of the oldest prompt that is not yet read, and takes one
step of all sequences that are being answered. So a long prompt delays the others by a chunk and not by its length, and a step
computes all answers together. The scheduler is a plain object without threads: `decode.engine` turns it on one.

**An answer does not depend on what else runs.** Sequences share arrays but no numbers: every call has the same shapes whoever is in it, a
row reads its own rings and pages only, and noise is a function of a request's seed and the position (`decode.sampling`).

**Memory is promised before a sequence begins.** A request gets its slot when there are pages for its prompt and all the tokens that it may
produce, and returns them when it ends; requests begin in the order of their arrival. So nothing that runs ever runs out of memory. The
rejected alternative, to hand out pages as they are needed and to throw sequences out when there are none left, fits more of them at a time,
and computes those again that it threw out.

**Errors stay where they belong.** What is wrong with a request is said when it is submitted; what fails in the course of one ends that one.
If a call of the model fails after it took the cache, the sequences in the cache are lost: they end with the error, and the engine goes on
with an empty cache. If entries of a sequence are lost on the disk tier, nothing that was computed from them is used: the sequence goes back
to the head of the queue, and its prompt and the tokens that are out already are processed again, the latter by steps, as they were.
"""

import collections
import dataclasses
import logging
import math
import os
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import cache as cache_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import likelihood, sampling, speculate, text
from v4train.decode import pages as pages_lib
from v4train.decode import prefix as prefix_lib
from v4train.decode import request as request_lib
from v4train.decode import sequence as sequence_lib

_log = logging.getLogger(__name__)
_sample = jax.jit(sampling.sample)
_best = jax.jit(sampling.best, static_argnames="count")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts since the start, and what there is now.

    Attributes:
        prompt_tokens: processed.
        tokens: of answers.
        finished: requests by the reason of their end; ``error`` among them.
        drafted: tokens that were guessed and checked; see `decode.speculate`.
        accepted: of these, the right ones.
        running: requests that have a slot.
        waiting: requests that have none yet.
        pages: of the pool that are promised to running requests.
        prefill_seconds: spent in chunks of prompts.
        step_seconds: spent in steps.
    """

    prompt_tokens: int
    tokens: int
    drafted: int
    accepted: int
    finished: dict[str, int]
    running: int
    waiting: int
    pages: int
    prefill_seconds: float
    step_seconds: float


class Scheduler:
    """Slots, pages and the queue. `submit` may be called from any thread, `turn` by one at a time."""

    def __init__(self, decoder: decoder_lib.Decoder, *, tokenizer: tokenizer_lib.Tokenizer, waiting: int = 64):
        """An idle scheduler; ``waiting`` requests may wait for a slot."""
        config = decoder.config
        self.decoder, self.tokenizer, self.most_waiting = decoder, tokenizer, waiting
        # Everything that a call takes is committed to the parameters' device, as what it returns is: else it would be compiled twice.
        self._device = jax.tree.leaves(decoder.params)[0].sharding
        self._cache = jax.device_put(decoder.empty(), self._device)
        freed = None if decoder.tiers is None else decoder.tiers.forget
        self._pages = pages_lib.Pages(config, pages=decoder.layout.pages, freed=freed)
        self._prefixes = prefix_lib.open_prefixes(decoder, pages=self._pages)
        self._waiting: collections.deque[sequence_lib.Sequence] = collections.deque()
        self._slots: list[sequence_lib.Sequence | None] = [None] * config.slots
        self._knobs = sampling.Knobs(
            np.zeros(config.slots, np.float32),
            np.zeros(config.slots, np.int32),
            np.ones(config.slots, np.float32),
            np.zeros((config.slots, 2), np.uint32),
        )
        self._lock = threading.Lock()
        self._order: list[sequence_lib.Sequence] = []  # those with a slot, oldest first
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = {"prefill": 0.0, "step": 0.0}

    @property
    def busy(self) -> bool:
        """Whether a turn has something to do."""
        return bool(self._waiting or self._order)

    def submit(self, request: request_lib.Request, *, listener: request_lib.Listener | None = None) -> request_lib.Stream:
        """Puts a request in the queue.

        Raises:
            ValueError: it cannot be answered, with all reasons.
            request_lib.QueueFullError: later, perhaps.
        """
        max_tokens = self._check(request)
        seed = int.from_bytes(os.urandom(8), "little") if request.seed is None else request.seed % 2**64
        stream = request_lib.Stream(request, seed=seed, max_tokens=max_tokens, listener=listener)
        sequence = sequence_lib.Sequence(stream, text.Answer(self.tokenizer, stop=request.stop))
        with self._lock:
            if len(self._waiting) >= self.most_waiting:
                raise request_lib.QueueFullError(f"{len(self._waiting)} requests are waiting, which is as many as may: try again later")
            self._waiting.append(sequence)
        return stream

    def turn(self) -> bool:
        """Admits, processes a chunk of one prompt, takes one step of all answers; whether there is more to do."""
        self._drop_cancelled()
        self._admit()
        reading = next((s for s in self._order if not s.answering), None)
        if reading is not None:
            self._guarded([reading], lambda: self._prefill(reading))
        answering = [s for s in self._order if s.answering]
        if answering:
            self._guarded(answering, lambda: self._step(answering))
        return self.busy

    def cancel_all(self) -> None:
        """Cancels every request, at the next turn."""
        with self._lock:
            for sequence in (*self._waiting, *self._order):
                sequence.stream.cancel()

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error, at once; for whoever turns."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for sequence in (*self._order, *waiting):
            self._fail(sequence, error)

    def statistics(self) -> Statistics:
        """A snapshot, from any thread."""
        finished = {name: self._counts[name] for name in ("stop", "length", "cancelled", "error")}
        return Statistics(
            prompt_tokens=self._counts["prompt_tokens"],
            tokens=self._counts["tokens"],
            drafted=self._counts["drafted"],
            accepted=self._counts["accepted"],
            finished=finished,
            running=len(self._order),
            waiting=len(self._waiting),
            pages=self._pages.in_slots,
            prefill_seconds=self._seconds["prefill"],
            step_seconds=self._seconds["step"],
        )

    def tier_statistics(self) -> dict[str, float]:
        """Counts (``_total``) and bytes of tiers and prefixes, from any thread; empty without them."""
        found = {} if self.decoder.tiers is None else self.decoder.tiers.statistics()
        if self._prefixes is not None:
            found |= self._prefixes.statistics() | {"prefix_pages": float(self._prefixes.held)}
        return found

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the cache's arrays; see `cache.bytes_by_part`."""
        return cache_lib.bytes_by_part(self.decoder.layout.structure())

    def _check(self, r: request_lib.Request) -> int:
        """Most tokens of the answer."""
        self.decoder.check(r.prompt)
        room = self.decoder.config.max_length - len(r.prompt)
        most = room if r.max_tokens is None else r.max_tokens
        tops = min(request_lib.MOST_LOGPROBS, self.decoder.model.vocab_size)
        problems = []
        if room < 1:
            problems.append(f"the prompt has {len(r.prompt)} tokens, all that a sequence may have: shorten it, or raise the length")
        elif not 1 <= most <= room:
            problems.append(
                f"max_tokens {most}: it must be from 1 to {room}, because the prompt has {len(r.prompt)} tokens and a sequence "
                f"may have {self.decoder.config.max_length}"
            )
        elif -(-(len(r.prompt) + most) // self.decoder.config.page_tokens) > self.decoder.layout.pages:
            problems.append(f"the cache cannot hold {len(r.prompt) + most} tokens: lower max_tokens, or give the cache more pages")
        if not (math.isfinite(r.temperature) and r.temperature >= 0):
            problems.append(f"temperature {r.temperature}: it must be 0 (greedy) or above")
        if not 0 < r.top_p <= 1:
            problems.append(f"top_p {r.top_p}: it must be above 0 and at most 1")
        if r.top_k < 0:
            problems.append(f"top_k {r.top_k}: it must be 0 (all tokens) or above")
        if not 0 <= r.top_logprobs <= tops:
            problems.append(f"top_logprobs {r.top_logprobs}: it must be from 0 to {tops}")
        if "" in r.stop:
            problems.append("a stop text is empty: leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return most

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [s for s in self._waiting if s.stream.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in (*gone, *(s for s in self._order if s.stream.cancelled)):
            self._finish(sequence, request_lib.Event(None, sequence.answer.flush(), finish_reason="cancelled"))

    def _admit(self) -> None:
        for slot, occupant in enumerate(self._slots):
            if occupant is not None:
                continue
            with self._lock:
                if not self._waiting:
                    return
                first = self._waiting[0]
                if not self._reserve(slot, tokens=first.most):
                    return
                self._waiting.popleft()
                self._order.append(first)
            first.slot = slot
            self._slots[slot] = first
            self._place_pages()
            request, seed = first.stream.request, first.stream.seed
            for knob, value in zip(
                self._knobs, (request.temperature, request.top_k, request.top_p, (seed % 2**32, seed >> 32)), strict=True
            ):
                knob[slot] = value

    def _reserve(self, slot: int, *, tokens: int) -> bool:
        if self._prefixes is not None:
            self._prefixes.make_room(self._pages.needed(slot, tokens=tokens))
        return self._pages.reserve(slot, tokens=tokens)

    def _taken_up(self, sequence: sequence_lib.Sequence) -> bool:
        """Begins a prompt with what earlier ones had in common with it, a few pages a turn; whether that is done."""
        if self._prefixes is None or sequence.read or sequence.stream.request.score_prompt:
            return True
        if sequence.reuse is None:
            sequence.reuse = self._prefixes.reuse(sequence.prompt, slot=sequence.slot, tokens=sequence.most)
        self._cache, taken = sequence.reuse.advance(self._cache)
        self._place_pages()
        if sequence.reuse.missed:
            self._begin_again(sequence)
        if taken is None:
            return False
        sequence.read = sequence.stream.cached_tokens = taken
        sequence.reuse = None
        return True

    def _begin_lost_again(self) -> None:
        """Sequences whose entries were lost begin again; what the last call computed for them is worth nothing."""
        pages = set() if self.decoder.tiers is None else self.decoder.tiers.damaged()
        if not pages:
            return
        if self._prefixes is not None:
            self._prefixes.forget(pages)
        for sequence in [s for s in self._order if pages.intersection(self._pages.of(s.slot))]:
            _log.warning("entries of a running sequence were damaged on the disk: they are computed again")
            self._begin_again(sequence)

    def _begin_again(self, sequence: sequence_lib.Sequence) -> None:
        """Puts a sequence back to the head of the queue: its pages are not what they should be. Tokens that are out stay as they are."""
        self._release(sequence)
        sequence.read, sequence.draft, sequence.again = 0, None, 0 if sequence.produced else None
        with self._lock:
            self._waiting.appendleft(sequence)

    def _place_pages(self) -> None:
        self._cache = self._cache._replace(page_table=jax.device_put(self._pages.table.copy(), self._device))

    def _prefill(self, sequence: sequence_lib.Sequence) -> None:
        began, prompt = time.monotonic(), sequence.prompt
        if not self._taken_up(sequence):
            self._seconds["prefill"] += time.monotonic() - began
            return
        chunk = self.decoder.config.prefill_chunk
        count = min(chunk - sequence.read % chunk, len(prompt) - sequence.read)
        every = sequence.stream.request.score_prompt
        decoded = self.decoder.prefill(self._cache, prompt=prompt, start=sequence.read, slot=sequence.slot, count=count, every=every)
        self._cache = decoded.cache
        self._begin_lost_again()
        if sequence.slot < 0:
            return
        if every and sequence.again is None:
            self._score(sequence, decoded.logits, count=count)
        logits = decoded.logits[count - 1] if every else decoded.logits
        sequence.read += count
        self._counts["prompt_tokens"] += count
        if self._prefixes is not None and not every:  # another program, whose bits nobody promises
            self._prefixes.remember(self._cache, prompt, slot=sequence.slot, read=sequence.read)
        if sequence.answering and sequence.again is None:
            knobs = sampling.Knobs(*(knob[sequence.slot : sequence.slot + 1] for knob in self._knobs))
            chosen = self._choose([sequence], logits[None, None], knobs, rows=[0])
            if self.decoder.config.speculate and sequence.slot >= 0:
                streams = speculate.after_prefill(self.decoder, self._cache)
                self._draft({sequence: chosen[0, :1].tolist()}, streams)
        else:
            jax.block_until_ready(logits)
        self._seconds["prefill"] += time.monotonic() - began

    def _score(self, sequence: sequence_lib.Sequence, logits: jax.Array, *, count: int) -> None:
        stream, start = sequence.stream, sequence.read
        del stream.prompt_scores[start + 1 if start else 0 :]  # of a chunk that is processed again
        stream.prompt_scores += likelihood.of_chunk(logits, sequence.prompt, start=start, count=count, tops=stream.request.top_logprobs)

    def _step(self, sequences: list[sequence_lib.Sequence]) -> None:
        began = time.monotonic()
        tokens, counts = self._rows()
        if self.decoder.config.keep_answers:
            self._note_states(sequences)
        for sequence in sequences:
            proposed = [sequence.last] if sequence.draft is None else [sequence.last, sequence.draft]
            if sequence.again is not None:
                proposed = [sequence.past[sequence.again]]
            tokens[sequence.slot, : len(proposed)], counts[sequence.slot] = proposed, len(proposed)
        before = {sequence: (sequence.slot, sequence.produced) for sequence in sequences}
        decoded = self.decoder.extend(self._cache, tokens=tokens, counts=counts)
        self._cache = decoded.cache
        self._begin_lost_again()
        sequences = self._catch_up(sequences)
        if not sequences:
            return
        # A slot that does not answer must not make the others pay for its limits.
        knobs = self._knobs._replace(temperature=np.where(counts > 0, self._knobs.temperature, 0).astype(np.float32))
        chosen = self._choose(sequences, decoded.logits, knobs, rows=[s.slot for s in sequences])
        if self.decoder.config.speculate:
            going = {s: chosen[slot, : s.produced - start].tolist() for s, (slot, start) in before.items() if s.slot >= 0}
            self._draft(going, decoded.streams)
        self._seconds["step"] += time.monotonic() - began

    def _note_states(self, sequences: list[sequence_lib.Sequence]) -> None:
        """Takes the states of those that end with a page, and lets none of them step over the end of one with a draft."""
        assert self._prefixes is not None
        page = self.decoder.config.page_tokens
        for sequence in sequences:
            if sequence.held % page == 0:
                sequence.state = sequence.held, self._prefixes.state(self._cache, slot=sequence.slot)
            if sequence.held % page == page - 1:
                sequence.draft = None

    def _keep_answer(self, sequence: sequence_lib.Sequence) -> None:
        """Lets later prompts take up what a sequence leaves: whole pages, to the last state."""
        if sequence.state is None or sequence.slot < 0:
            return
        assert self._prefixes is not None
        held, state = sequence.state
        whole = sequence.prompt.followed_by(sequence.past[: held - len(sequence.prompt)])
        try:
            self._prefixes.keep(self._cache, whole, slot=sequence.slot, state=state)
        except Exception:
            _log.exception("an answer cannot be kept for later prompts; it is complete all the same")

    def _catch_up(self, sequences: list[sequence_lib.Sequence]) -> list[sequence_lib.Sequence]:
        """Those that make new tokens: the others have processed one of their old ones."""
        sequences = [s for s in sequences if s.slot >= 0]
        for sequence in sequences:
            if sequence.again is not None:
                sequence.again = sequence.again + 1 if sequence.again < sequence.produced - 1 else None
        return [s for s in sequences if s.again is None]

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and counts of a call for all slots, zeros."""
        slots = len(self._slots)
        return np.zeros((slots, speculate.width(self.decoder)), np.int32), np.zeros(slots, np.int32)

    def _draft(self, new: dict[sequence_lib.Sequence, list[int]], streams: jax.Array) -> None:
        """Takes rejected tokens back, and guesses what follows the new tokens of these sequences."""
        following, counts = self._rows()
        lengths = np.zeros(len(self._slots), np.int32)
        for sequence in self._order:
            lengths[sequence.slot] = sequence.held
        for sequence, tokens in new.items():
            following[sequence.slot, : len(tokens)], counts[sequence.slot] = tokens, len(tokens)
        knobs = self._knobs._replace(temperature=np.where(counts > 0, self._knobs.temperature, 0).astype(np.float32))
        drafts = speculate.draft(
            self.decoder, self._cache, streams=streams, following=following, counts=counts, lengths=lengths, knobs=knobs
        )
        self._cache = drafts.cache
        for sequence in new:
            if sequence.produced + 1 < sequence.stream.max_tokens:  # the last token has no use for a guess
                sequence.draft = int(drafts.tokens[sequence.slot])

    def _choose(self, sequences: list[sequence_lib.Sequence], logits: jax.Array, knobs: sampling.Knobs, *, rows: list[int]) -> np.ndarray:
        """Samples the next token of each sequence, and if that is the draft, the one after it, and emits them.

        Args:
            logits: ``[b, t, V]``, after the newest token and after the draft.
            knobs: of the ``b`` rows.
            rows: of each sequence.

        Returns:
            What was chosen, ``[b, t]``: also after drafts that were wrong.
        """
        shape = logits.shape[:2]
        positions = np.zeros(shape, np.int32)
        positions[rows] = np.array([len(s.prompt) + s.produced for s in sequences])[:, None] + np.arange(shape[1])[None]
        logits = logits.reshape(-1, logits.shape[-1])
        each = sampling.Knobs(*(np.repeat(knob, shape[1], axis=0) for knob in knobs))
        chosen = sampling.Chosen(*(np.asarray(x) for x in _sample(logits, knobs=each, positions=positions.ravel())))
        best = None
        if any(s.stream.request.top_logprobs for s in sequences):
            best = sampling.Chosen(*(np.asarray(x) for x in _best(logits, count=min(request_lib.MOST_LOGPROBS, logits.shape[-1]))))
        for sequence, row in zip(sequences, rows, strict=True):
            try:
                self._take(sequence, chosen, best, row=row * shape[1])
            except Exception as error:
                self._fail(sequence, error)
        return np.asarray(chosen.tokens).reshape(shape)

    def _take(self, sequence: sequence_lib.Sequence, chosen: sampling.Chosen, best: sampling.Chosen | None, *, row: int) -> None:
        """Emits the token of a row, and that of the next one if the draft was right."""
        guess, sequence.draft = sequence.draft, None
        count = sequence.stream.request.top_logprobs
        for at in range(row, row + 1 + (guess is not None)):
            top = ()
            if best is not None and count:
                top = tuple(zip(best.tokens[at, :count].tolist(), best.logprobs[at, :count].tolist(), strict=True))
            token = int(chosen.tokens[at])
            if guess is not None and at == row:
                self._counts.update(drafted=1, accepted=int(token == guess))
                sequence.stream.drafted += 1
                sequence.stream.accepted += token == guess
            self._emit(sequence, token, float(chosen.logprobs[at]), top)
            if token != guess or sequence.slot < 0:
                return

    def _emit(self, sequence: sequence_lib.Sequence, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        request, answer = sequence.stream.request, sequence.answer
        if not math.isfinite(logprob):
            raise FloatingPointError(f"the model's logits are not finite at token {len(sequence.prompt) + sequence.produced}")
        sequence.produced, sequence.last = sequence.produced + 1, token
        sequence.past.append(token)
        self._counts["tokens"] += 1
        ended = token == self.tokenizer.eos and not request.ignore_end
        piece = "" if ended else answer.push(token)
        finish: request_lib.Finish | None = None
        if ended or answer.stopped:
            finish = "stop"
        elif sequence.produced == sequence.stream.max_tokens:
            finish = "length"
        if finish is None:
            sequence.stream.give(request_lib.Event(token, piece, logprob, top))
            return
        if not answer.stopped:
            piece += answer.flush()
        self._finish(sequence, request_lib.Event(token, piece, logprob, top, finish))

    def _finish(self, sequence: sequence_lib.Sequence, event: request_lib.Event) -> None:
        assert event.finish_reason is not None
        self._counts[event.finish_reason] += 1
        self._keep_answer(sequence)
        self._release(sequence)
        sequence.stream.give(event)

    def _fail(self, sequence: sequence_lib.Sequence, error: Exception) -> None:
        self._counts["error"] += 1
        self._release(sequence)
        sequence.stream.give(error)

    def _release(self, sequence: sequence_lib.Sequence) -> None:
        """Takes slot and pages back. What they hold is never read again: a sequence's length decides what is."""
        if sequence.slot < 0:
            return
        with self._lock:
            self._order.remove(sequence)
        self._slots[sequence.slot] = None
        self._pages.release(sequence.slot)
        sequence.slot, sequence.reuse, sequence.state = -1, None, None

    def _guarded(self, concerned: list[sequence_lib.Sequence], call: Callable[[], None]) -> None:
        """Runs a call of the model; if it fails, so do the sequences concerned, and all others whose cache it took."""
        try:
            call()
        except Exception as error:
            _log.exception("a call of the model failed")
            lost = any(x.is_deleted() for x in jax.tree.leaves(self._cache))
            for sequence in list(self._order) if lost else concerned:
                if sequence.slot >= 0:
                    self._fail(sequence, error)
            if lost:
                if self._prefixes is not None:
                    self._prefixes.clear()
                self._cache = jax.device_put(self.decoder.empty(), self._device)
                self._place_pages()
