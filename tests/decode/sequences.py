"""What decoding is compared with: the training forward pass, at every position; and ways to feed a decoder."""

import functools

import numpy as np

from tests.model import small
from v4train.core import param
from v4train.decode import cache as cache_lib
from v4train.decode import config as config_lib
from v4train.decode import decoder as decoder_lib
from v4train.decode import prompt as prompt_lib
from v4train.model import config as model_config
from v4train.model import transformer
from v4train.numerics import config as numerics_config

FAST = {"xla_backend_optimization_level": 0}  # to compile


def decoder(model: model_config.ModelConfig, params: dict, *, compute: str = "float32", **config) -> decoder_lib.Decoder:
    """By default of three slots with small pages, chunks of 16 tokens, and fp32 throughout."""
    values = {"slots": 3, "max_length": 128, "prefill_chunk": 16, "page_tokens": 16, "cache": "fp32"} | config
    numerics = numerics_config.NumericsConfig.model_validate({"compute": compute})
    return decoder_lib.Decoder(
        model, params, config=config_lib.DecodeConfig.model_validate(values), numerics=numerics, compiler_options=FAST
    )


@functools.cache
def _forward(model: model_config.ModelConfig):
    abstract = transformer.Transformer(model)

    @small.jit
    def run(params: dict, inputs):
        bound = param.bind(abstract, params)
        out = bound(inputs)
        return bound.logits(out.hidden)[0], None if out.mtp_hidden is None else bound.logits(out.mtp_hidden)[0]

    return run


def teacher(model: model_config.ModelConfig, params: dict, prompt: prompt_lib.Prompt) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits of every position by the training forward pass over one row: of the next token, and of the one after by the MTP block."""
    logits, ahead = _forward(model)(params, prompt.chunk(0, size=len(prompt)))
    return np.asarray(logits), None if ahead is None else np.asarray(ahead)


def prefill(
    decoder: decoder_lib.Decoder, cache: cache_lib.Cache, prompt: prompt_lib.Prompt, *, slot: int, pieces: list[int]
) -> tuple[cache_lib.Cache, np.ndarray]:
    """Feeds pieces of these lengths from the prompt's beginning; the logits of all their tokens."""
    found, at = [], 0
    for size in pieces:
        cache, logits, _ = decoder.prefill(cache, prompt=prompt, start=at, slot=slot, count=size, every=True)
        found.append(np.asarray(logits)[:size])
        at += size
    return cache, np.concatenate(found)


def pieces(length: int, *, size: int) -> list[int]:
    """A length in pieces of ``size`` and a rest."""
    return [min(size, length - at) for at in range(0, length, size)]


def walk(
    decoder: decoder_lib.Decoder, cache: cache_lib.Cache, prompt: prompt_lib.Prompt, *, slot: int, start: int
) -> tuple[cache_lib.Cache, np.ndarray]:
    """Feeds the tokens from ``start`` on one by one; their logits."""
    found = []
    for token in prompt.tokens[start:]:
        cache, logits, _ = step(decoder, cache, {slot: int(token)})
        found.append(logits[slot])
    return cache, np.array(found)


def step(decoder: decoder_lib.Decoder, cache: cache_lib.Cache, tokens: dict[int, int]) -> decoder_lib.Decoded:
    """One step of the slots named; logits as numpy."""
    slots = decoder.config.slots
    ids = np.array([tokens.get(slot, 0) for slot in range(slots)], np.int32)
    decoded = decoder.step(cache, tokens=ids, active=np.array([slot in tokens for slot in range(slots)]))
    return decoded._replace(logits=np.asarray(decoded.logits))


def text(length: int, *, vocab: int = small.VOCAB - 2, seed: int = 0) -> prompt_lib.Prompt:
    """Random tokens."""
    return prompt_lib.Prompt.of_tokens(np.random.default_rng(seed).integers(0, vocab, length))
