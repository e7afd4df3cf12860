"""Memory by tier, time per token and time to first token by length of context, with and without tiers, for each format and attention.

**Time per token** is a decode step of one sequence in a model with V4-Flash's true widths and heads, cut as `bench.decode.filled` says,
from a cache that is full to the length. Its tokens change from step to step, and its index keys are random: a selection has little in
common with the one before, which is the worst that can happen to a hot buffer. How much of it was found there is told.

**Time to first token** is that of reading a prompt, token by token of its length, in a model of small widths and true ratios
(`bench.decode.million`): at true widths a prompt of 128K tokens takes hours on a CPU. One prompt of the greatest length is read in
chunks; the time until the chunk that ends at a length is the time to first token of a prompt that ends there, because a chunk depends on
nothing that comes later. Compilation is left out. What the tiers bring must give the logits of the same mode without them, bit for bit.

Tiers are `host` (hot buffer on the device, all entries in host memory) and `disk` (host memory for a quarter of the entries, the rest in a
file; the operating system may have that in memory too).
"""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from v4train.bench.decode import filled, million, speed
from v4train.decode import cache as cache_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import prompt as prompt_lib
from v4train.model import config as model_config

MODES: dict[str, tuple[str, str | None]] = {
    "dense-bf16": ("dense-bf16", None),
    "sparse-bf16": ("sparse-bf16", None),
    "sparse-bf16 host": ("sparse-bf16", "host"),
    "sparse-fp8": ("sparse-fp8", None),
    "sparse-fp8 host": ("sparse-fp8", "host"),
    "sparse-fp8 disk": ("sparse-fp8", "disk"),
}
"""What is compared: a mode of `filled.MODES`, and tiers."""
_PLENTY = 2**34  # bytes
_IN_MEMORY = 4  # one of so many entries, with a disk


class Changing(speed.Stepper):
    """Steps with other tokens each time."""

    def __init__(self, decoder: decoder_lib.Decoder, *, length: int):
        """Fills the tiers too."""
        super().__init__(decoder, length=length)
        filled.fill_tiers(decoder, length=length)
        self._rng = np.random.default_rng(3)

    def __call__(self) -> jax.Array:
        """Logits of the next token."""
        self.tokens = self._rng.integers(0, self.decoder.model.vocab_size, len(self.tokens)).astype(np.int32)
        return super().__call__()


def tiers(layout_bytes: int, *, kind: str | None, hot: int, directory: pathlib.Path) -> dict[str, Any] | None:
    """Settings of `DecodeConfig.tiers` for this many bytes of selected entries."""
    if kind is None:
        return None
    disk = {"path": str(directory), "bytes": _PLENTY} if kind == "disk" else None
    return {"hot_entries": hot, "host_bytes": layout_bytes // _IN_MEMORY if disk else _PLENTY, "disk": disk}


@contextlib.contextmanager
def decoders(model: model_config.ModelConfig, params: dict, *, modes: Iterable[str], length: int, hot: int, **sizes: Any):
    """A decoder for each mode, with room for ``length`` tokens of one sequence."""
    made: dict[str, decoder_lib.Decoder] = {}
    directory = pathlib.Path(tempfile.mkdtemp(prefix="v4train-latency-"))
    try:
        for mode in modes:
            stored, kind = MODES[mode]
            plain = filled.decoder(model, params, filled.config(stored, length=length, **sizes))
            whole = cache_lib.bytes_by_part(plain.layout.structure())["selected"]
            config = filled.config(stored, length=length, tiers=tiers(whole, kind=kind, hot=hot, directory=directory), **sizes)
            made[mode] = plain if kind is None else filled.decoder(model, params, config)
        yield made
    finally:
        for decoder in made.values():
            decoder.close()
        shutil.rmtree(directory, ignore_errors=True)


def bytes_by_tier(decoder: decoder_lib.Decoder) -> dict[str, int]:
    """Of the cache: on the device by its arrays, in host memory and in the file by what lies there now."""
    found = {"device": cache_lib.total_bytes(decoder.layout.structure())}
    if decoder.tiers is not None:
        said = decoder.tiers.statistics()
        found |= {"host": int(said["host_bytes"]), "disk": int(said.get("swap_bytes", 0))}
    return found


def per_token(
    model: model_config.ModelConfig, params: dict, *, length: int, modes: Sequence[str], hot: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step at a length by mode, bytes by tier, and the share of selected entries that the hot buffer had."""
    with decoders(model, params, modes=modes, length=length, hot=hot) as made:
        steppers = {mode: Changing(decoder, length=length - rounds - 2) for mode, decoder in made.items()}
        times = speed.times(dict(steppers), rounds=rounds)
        found: dict[str, dict[str, Any]] = {}
        for mode, decoder in made.items():
            found[mode] = {"ms": times.wall[mode], "cpu_ms": times.cpu[mode], "bytes": bytes_by_tier(decoder)}
            if decoder.tiers is not None:
                hits, misses = (decoder.tiers.counts[name] for name in ("hot_hits", "hot_misses"))
                found[mode]["hot"] = hits / max(hits + misses, 1)
        return found


def first_token(model: model_config.ModelConfig, params: dict, *, lengths: Sequence[int], mode: str, hot: int, chunk: int) -> Any:
    """Seconds until the logits of the last token of prompts of these lengths, and those of the longest."""
    longest = max(lengths)
    prompt = prompt_lib.Prompt.of_tokens(np.random.default_rng(0).integers(0, model.vocab_size, longest))
    with decoders(model, params, modes=[mode], length=longest, hot=hot, prefill_chunk=chunk) as made:
        decoder = made[mode]
        placed = jax.tree.leaves(decoder.params)[0].sharding

        def read(until: int) -> tuple[dict[int, float], np.ndarray]:
            cache, logits = jax.device_put(decoder.empty(), placed), None
            began, seconds = time.perf_counter(), {}
            for start in range(0, until, chunk):
                cache, logits, _ = decoder.prefill(cache, prompt=prompt, start=start, slot=0)
                if start + chunk in lengths:
                    jax.block_until_ready(logits)
                    seconds[start + chunk] = round(time.perf_counter() - began, 3)
            return seconds, np.asarray(logits)

        read(chunk)  # compiles
        return read(longest)


def measure(
    model: model_config.ModelConfig,
    *,
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    modes: Sequence[str] = tuple(MODES),
    hot: int = 1024,
    rounds: int,
    chunk: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All of the above.

    Args:
        model: whose steps are measured.
        lengths: at which steps are measured.
        prompt_lengths: those of them at which prompts are, multiples of the chunk.
        hot: entries of the hot buffer.
        rounds: steps whose median counts.
        chunk: of prompts.
        say: is told what goes on.

    Raises:
        ValueError: a prompt's length is no multiple of the chunk or not among the lengths, or tiers changed a logit.
    """
    if any(length % chunk for length in prompt_lengths) or not set(prompt_lengths) <= set(lengths):
        raise ValueError(f"prompts of {list(prompt_lengths)} tokens: give multiples of the chunk, {chunk}, that are among the lengths")
    say("drawing weights")
    params = filled.parameters(model)
    rows = []
    for length in lengths:
        say(f"steps at {length:,} tokens")
        rows.append({"length": length, "modes": per_token(model, params, length=length, modes=modes, hot=hot, rounds=rounds)})
    del params
    if not prompt_lengths:
        return {"hot_entries": hot, "chunk": chunk, "lengths": rows}
    small = million.model(tokens=max(prompt_lengths))
    params, logits = filled.parameters(small), {}
    for mode in modes:
        say(f"prompts, {mode}")
        seconds, logits[mode] = first_token(small, params, lengths=prompt_lengths, mode=mode, hot=hot, chunk=chunk)
        for row in rows:
            if row["length"] in seconds:
                row["modes"][mode]["first_token_seconds"] = seconds[row["length"]]
        plain = MODES[mode][0]
        if plain in logits and not np.array_equal(logits[mode], logits[plain]):
            raise ValueError(
                f"{mode}: the logits after {max(prompt_lengths):,} tokens are not those of {plain}: the tiers changed an answer"
            )
    return {"hot_entries": hot, "chunk": chunk, "lengths": rows}
