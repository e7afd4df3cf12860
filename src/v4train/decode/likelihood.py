"""Likelihoods of a prompt's own tokens, from the logits that its chunks compute anyway: for evaluations that compare given answers.

A chunk gives the logits of all its tokens instead of its last one's, ``[C, V]`` in fp32, and of each only the likelihood of the token that
follows and the few best are kept. A prompt whose likelihoods are wanted is computed whole: pages that earlier prompts left have no logits.
"""

import jax
import numpy as np
from jaxtyping import Array, Float

from v4train.decode import prompt as prompt_lib
from v4train.decode import request as request_lib
from v4train.decode import sampling

_score = jax.jit(sampling.score)
_best = jax.jit(sampling.best, static_argnames="count")


def of_chunk(logits: Float[Array, "c v"], prompt: prompt_lib.Prompt, *, start: int, count: int, tops: int) -> list[request_lib.Scored]:
    """The tokens that follow those of a chunk, and if it is the first, the prompt's first token.

    Args:
        logits: of ``count`` tokens from ``start`` on, then of padding.
        tops: alternatives that were asked for.

    Raises:
        FloatingPointError: a likelihood is not finite.
    """
    following = prompt.tokens[start + 1 : start + count + 1]
    padded = np.zeros(len(logits), np.int32)
    padded[: len(following)] = following
    found = np.asarray(_score(logits, tokens=padded))[: len(following)]
    if not np.isfinite(found).all():
        raise FloatingPointError(f"the model's logits are not finite at token {start + 1 + int(np.argmin(np.isfinite(found)))}")
    rows: list[tuple[tuple[int, float], ...]] = [()] * len(following)
    if tops:
        best = _best(logits, count=min(request_lib.MOST_LOGPROBS, logits.shape[-1]))
        ids, values = (np.asarray(x)[:, :tops].tolist() for x in best)
        rows = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    first = [request_lib.Scored(int(prompt.tokens[0]), None)] if start == 0 else []
    return first + [request_lib.Scored(int(t), float(v), row) for t, v, row in zip(following, found, rows, strict=False)]
