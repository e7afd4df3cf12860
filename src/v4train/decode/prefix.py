"""Reuse of prompts that begin alike: across requests, and with a disk tier across restarts.

**What is kept.** Pages of complete chunks of prompts, and *states* (`decode.moves`) at some of their ends: every ``state_tokens`` tokens
and at the last whole chunk of a prompt. A prompt is taken up at the deepest state that lies within what it shares with an earlier one; from
there on it is computed. V4-Flash's state is 7 MB, a page 1 MB: a state at every page would make the cache eight times as large, and no
state at all means 128 x 43 tokens to be computed again for the windows.

**Why that changes no bit.** A page is known by a hash over all that went into it: the model (its parameters, config and number formats),
the layout, the versions and the platform that computed it, and every token, patch and frame from the prompt's beginning. It is kept only
if it was computed by chunks that begin at multiples of the chunk, and a state only where such a chunk ends. So what is taken up is what the
request itself would have computed, by the same programs on the same shapes; the rest is computed on the same shapes too. Answers are not
kept: steps compute the same numbers as chunks only up to rounding. What a model said is read again as part of the next prompt.

**Unless** ``keep_answers`` is set. Then an answer's pages are kept like a prompt's, with the state at the end of the last of them, which is
taken when a step finds the sequence at that length: the rings keep no older token than the window needs. A prompt is then taken up at the
end of any page, and its first chunk ends where one from its beginning would have. What is so computed goes by other names than without
the option (`fingerprint`): who promises bits never finds it.

**Where it is kept.** Pages stay where they are in the pools, held by one more owner, until somebody needs the room; then those go that were
used longest ago, ends before beginnings. States lie in host memory (``prefix_bytes``). With a disk tier both are written to blocks when a
state is made, and are read back when memory no longer has them. A block that is damaged shortens what can be taken up, nothing else.

A prompt is looked up when its own turn comes to be computed: requests with a common beginning that arrive together find what the first of
them has computed. What is not in memory is loaded a few pages a turn (`Reuse`), with a step of the others in between.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
from typing import Any

import jax
import numpy as np
import xxhash

from v4train.decode import attention, moves
from v4train.decode import cache as cache_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import pages as pages_lib
from v4train.decode import prompt as prompt_lib

_log = logging.getLogger(__name__)
_STATE = b"state"


@dataclasses.dataclass
class _Held:
    """A page in memory that others may share."""

    page: int
    depth: int
    used: int


def fingerprint(decoder: decoder_lib.Decoder) -> bytes:
    """Of all that decides the numbers of a page but the prompt."""
    config = decoder.config
    widest = max((attention.block_pages(config.page_tokens // ratio) for ratio in decoder.model.compress_ratios if ratio), default=1)
    said = {
        "model": decoder.model.model_dump(mode="json"),
        "cache": [config.cache, config.attention, config.page_tokens, config.prefill_chunk, config.speculate],
        "layout": [str(decoder.layout.dtype), bool(decoder.layout.host_layers), min(config.pages_per_slot, widest)],
        "made": [
            importlib.metadata.version("v4train"),
            jax.__version__,
            jax.default_backend(),
            jax.devices()[0].device_kind,
            str(getattr(jax.config, "jax_default_matmul_precision", None)),
        ],
    }
    whole = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=32)
    if config.keep_answers:
        said["answers"] = True
    for path, x in jax.tree.leaves_with_path(decoder.params):
        array = np.ascontiguousarray(np.asarray(x))
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(xxhash.xxh3_128_digest(array.reshape(-1).view(np.uint8).data))
    return whole.digest()


def open_prefixes(decoder: decoder_lib.Decoder, *, pages: pages_lib.Pages) -> "Prefixes | None":
    """The prefixes of a decoder; None if its config does not ask for them."""
    return Prefixes(decoder, pages=pages) if decoder.config.prefix_bytes else None


class Prefixes:
    """The pages and states that prompts can begin with."""

    def __init__(self, decoder: decoder_lib.Decoder, *, pages: pages_lib.Pages):
        """Nothing in memory; on disk, what is there."""
        config = decoder.config
        self._decoder, self._pages, self._moves = decoder, pages, moves.Moves(decoder.layout)
        self._blocks = decoder.blocks
        page, chunk = config.page_tokens, config.prefill_chunk
        self._grid = int(np.lcm(page, chunk))
        self._page, self._every = page, -(-config.state_tokens // self._grid) * self._grid
        self._ends = page if config.keep_answers else self._grid  # what is taken up is a multiple of it
        self._held: dict[bytes, _Held] = {}
        self._states: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()
        self._clock = 0
        self._latest: tuple[prompt_lib.Prompt, list[bytes]] | None = None  # the keys of a prompt, as far as they were needed
        self.counts = dict.fromkeys(("prefix_queries", "prefix_hits", "prefix_tokens"), 0)

    @functools.cached_property
    def _seed(self) -> bytes:
        return fingerprint(self._decoder)

    @property
    def held(self) -> int:
        """Pages in memory that can be shared."""
        return len(self._held)

    def forget(self, pages: set[int]) -> None:
        """These pages, and what follows them, are not what they were."""
        least = min((held.depth for held in self._held.values() if held.page in pages), default=None)
        if least is None:
            return
        for key, held in list(self._held.items()):
            if held.depth >= least:
                del self._held[key]
                self._pages.drop([held.page])

    def clear(self) -> None:
        """The cache was lost, and with it all pages in memory."""
        self._pages.drop([held.page for held in self._held.values()])
        self._held.clear()

    def make_room(self, pages: int) -> None:
        """Lets pages go until so many are free, if there are as many."""
        order = sorted(self._held.items(), key=lambda item: (-item[1].used, item[1].depth))
        while self._pages.free < pages and order:
            key, held = order.pop()
            del self._held[key]
            self._pages.drop([held.page])

    def reuse(self, prompt: prompt_lib.Prompt, *, slot: int, tokens: int) -> "Reuse":
        """Begins to take up what is known of a prompt; the slot has pages of its own for ``tokens`` tokens."""
        most = (len(prompt) - 1) // self._ends * self._ends
        self.counts["prefix_queries"] += 1
        return Reuse(self, self._keys(prompt, most), slot=slot, tokens=tokens)

    def remember(self, cache: cache_lib.Cache, prompt: prompt_lib.Prompt, *, slot: int, read: int) -> None:
        """Keeps what a prompt has brought so far, if a state is due; ``read`` tokens of it were computed or taken up."""
        last = (len(prompt) - 1) // self._grid * self._grid
        if read == 0 or read % self._grid or (read % self._every and read != last) or read > last:
            return
        state = None if _state_key(self._keys(prompt, read)[-1]) in self._states else self.state(cache, slot=slot)
        self._keep(cache, prompt, slot=slot, tokens=read, state=state, last=read == last)

    def state(self, cache: cache_lib.Cache, *, slot: int) -> Any:
        """What `keep` wants of a slot, whose sequence now ends with a page."""
        return self._moves.take_state(cache, slot)

    def keep(self, cache: cache_lib.Cache, prompt: prompt_lib.Prompt, *, slot: int, state: Any) -> None:
        """Keeps a sequence, whose answer is part of ``prompt`` here; it ended where the `state` was taken, and may be longer now."""
        assert self._decoder.config.keep_answers
        self._keep(cache, prompt, slot=slot, tokens=len(prompt), state=state, last=True)

    def _keep(self, cache: cache_lib.Cache, prompt: prompt_lib.Prompt, *, slot: int, tokens: int, state: Any, last: bool) -> None:
        keys, own = self._keys(prompt, tokens), self._pages.of(slot)
        new = [i for i, key in enumerate(keys) if self._blocks is not None and key not in self._blocks]
        self._hold(keys, own)
        if self._blocks is not None:
            self._write(cache, [(keys[i], own[i]) for i in new])
        key = _state_key(keys[-1])
        if key in self._states:
            self._states.move_to_end(key)
            return
        content = moves.as_bytes(state)
        self._keep_state(key, content)
        if self._blocks is not None:
            self._blocks.put(key, lambda: content)
            self._blocks.touch([key, *reversed(keys)] if last else ())

    def statistics(self) -> dict[str, float]:
        """Counts since the start (``_total``), and bytes of now."""
        found = {f"{name}_total": float(value) for name, value in self.counts.items()}
        found["state_bytes"] = float(sum(map(len, self._states.values())))
        return found | (self._blocks.statistics() if self._blocks is not None else {})

    def _keys(self, prompt: prompt_lib.Prompt, tokens: int) -> list[bytes]:
        """Of each page of the prompt's first tokens: the hash of all up to its end."""
        known, found = self._latest if self._latest is not None and self._latest[0] is prompt else (prompt, [])
        key, media = found[-1] if found else self._seed, [0, 0]
        for kind in (1, 2):
            media[kind - 1] = int(np.count_nonzero(prompt.modality[: len(found) * self._page] == kind))
        for start in range(len(found) * self._page, tokens, self._page):
            span = slice(start, start + self._page)
            modality = np.ascontiguousarray(prompt.modality[span], np.int32)
            whole = hashlib.blake2b(key, digest_size=32)
            whole.update(np.ascontiguousarray(prompt.tokens[span], np.int32).tobytes())
            whole.update(modality.tobytes())
            for kind, values in ((1, (prompt.patches, prompt.patch_xy)), (2, (prompt.audio,))):
                count = int(np.count_nonzero(modality == kind))
                for each in values:
                    if count and each is not None:
                        own = np.ascontiguousarray(each[media[kind - 1] : media[kind - 1] + count])
                        whole.update(f"{own.dtype} {own.shape}".encode())
                        whole.update(own.tobytes())
                media[kind - 1] += count
            key = whole.digest()
            found.append(key)
        self._latest = known, found
        return found[: tokens // self._page]

    def _deepest(self, keys: list[bytes]) -> tuple[int, bytes] | None:
        """Pages and state of the longest beginning that can be taken up."""
        known = len(self._shared(keys))
        while known < len(keys) and self._blocks is not None and keys[known] in self._blocks:
            known += 1
        step = self._ends // self._page
        for count in range(known // step * step, 0, -step):
            key = _state_key(keys[count - 1])
            state = self._states.get(key)
            if state is None and self._blocks is not None and key in self._blocks:
                state = self._blocks.get(key)
                if state is not None:
                    self._keep_state(key, state)
            if state is not None:
                return count, state
        return None

    def _shared(self, keys: list[bytes]) -> list[int]:
        """The pages of the longest beginning that is in memory."""
        count = next((i for i, key in enumerate(keys) if key not in self._held), len(keys))
        return [self._held[key].page for key in keys[:count]]

    def _hold(self, keys: list[bytes], own: list[int]) -> None:
        self._clock += 1
        for depth, (key, page) in enumerate(zip(keys, own, strict=False)):
            if key not in self._held:
                self._pages.hold([page])
                self._held[key] = _Held(page, depth, 0)
            self._held[key].used = self._clock

    def _keep_state(self, key: bytes, state: bytes) -> None:
        limit = self._decoder.config.prefix_bytes
        self._states[key] = state
        total = sum(map(len, self._states.values()))
        while total > limit and self._states:
            total -= len(self._states.popitem(last=False)[1])

    def _write(self, cache: cache_lib.Cache, new: list[tuple[bytes, int]]) -> None:
        """Hands pages to the writer, that turns them into bytes."""
        assert self._blocks is not None
        tiers = self._decoder.tiers
        if tiers is not None:
            tiers.settle()
        for first in range(0, len(new), moves.TOGETHER):
            group = new[first : first + moves.TOGETHER]
            arrays = self._moves.take_pages(cache, [page for _, page in group])
            for i, (key, page) in enumerate(group):
                host = [] if tiers is None else list(tiers.pool.page(page).values())
                if tiers is not None and tiers.pool.damaged:
                    return  # whoever has the page is told, and it is computed again
                self._blocks.put(key, functools.partial(_page_bytes, arrays, i, host))

    def _load(self, cache: cache_lib.Cache, keys: list[bytes], pages: list[int]) -> tuple[cache_lib.Cache, int]:
        """Reads blocks to these pages, at most `moves.TOGETHER`; how many of them are good."""
        blocks: list[bytes] = []
        for key in keys:
            block = None if self._blocks is None else self._blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        if blocks:
            cache = self._moves.put_pages(cache, pages[: len(blocks)], blocks)
            self._put_host(pages[: len(blocks)], blocks)
        return cache, len(blocks)

    def _put_host(self, pages: list[int], blocks: list[bytes]) -> None:
        tiers = self._decoder.tiers
        if tiers is None:
            return
        tiers.settle()
        for page, block in zip(pages, blocks, strict=True):
            rows, at = {}, self._moves.page_bytes
            for name, s in tiers.page_shapes.items():
                size = s.size * s.dtype.itemsize
                rows[name] = np.frombuffer(block, np.uint8, size, at).view(s.dtype).reshape(s.shape)
                at += size
            tiers.pool.put_page(page, rows)


class Reuse:
    """A beginning that is being taken up, a few pages at a time, so that others can take their steps in between."""

    def __init__(self, prefixes: Prefixes, keys: list[bytes], *, slot: int, tokens: int):
        """See `Prefixes.reuse`."""
        self._prefixes, self._slot = prefixes, slot
        self._state: bytes | None = None
        self._keys: list[bytes] = []  # of the pages that are taken up
        self._good = 0  # of these, that are there
        self.missed = False
        """A block that was there is not, or is damaged. Give the slot's pages back and ask `Prefixes.reuse` anew: it knows of less then."""
        found = prefixes._deepest(keys)
        if found is None:
            return
        count, self._state = found
        self._keys = keys[:count]
        shared = prefixes._shared(self._keys)
        self._good = len(shared)
        prefixes._pages.release(slot)
        prefixes._pages.share(slot, pages=shared)
        if not prefixes._pages.reserve(slot, tokens=tokens):
            raise AssertionError("a slot that gives its pages back can have them again")

    def advance(self, cache: cache_lib.Cache) -> tuple[cache_lib.Cache, int | None]:
        """Goes on.

        Args:
            cache: donated.

        Returns:
            The cache, and how many tokens of the prompt it holds at the end, or None if there is more to do or something is `missed`. Pages
            may have changed: place the table before the next call of the model.
        """
        p, last = self._prefixes, min(len(self._keys), self._good + moves.TOGETHER)
        if self._state is None:
            return cache, 0
        if self._good < last:
            cache, loaded = p._load(cache, self._keys[self._good : last], p._pages.of(self._slot)[self._good : last])
            self._good += loaded
            self.missed = self._good < last
            if self._good < len(self._keys):
                return cache, None
        tokens = len(self._keys) * p._page
        p._hold(self._keys, p._pages.of(self._slot))  # those behind have yet to be computed
        cache = p._moves.put_state(cache, self._slot, state=self._state, length=tokens)
        if p._decoder.tiers is not None:
            p._decoder.tiers.empty(self._slot)
        p.counts["prefix_hits"] += 1
        p.counts["prefix_tokens"] += tokens
        return cache, tokens


def _state_key(key: bytes) -> bytes:
    return hashlib.blake2b(key + _STATE, digest_size=32).digest()


def _page_bytes(arrays: list[Any], i: int, host: list[np.ndarray]) -> bytes:
    return b"".join(np.asarray(x)[:, i].tobytes() for x in arrays) + b"".join(x.tobytes() for x in host)
