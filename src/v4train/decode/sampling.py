"""Logits to tokens: greedy, or drawn, with a request's own temperature, limits and seed in every row.

A draw is ``argmax(logits / T + g)`` with Gumbel noise g, which is a draw from the softmax. The noise of a token is a function of the
request's seed, the position that is filled and the token's id, and of nothing else: an answer does not depend on the row that it is
computed in, on what the other rows hold, or on how often the engine was asked before. (The rejected alternative, one random state that
goes from step to step, makes an answer depend on every request served since the start.)

The limits leave out tokens before the draw, in the order that is customary: temperature, then the ``top_k`` most likely, then the smallest
set of the most likely of these whose mass reaches ``top_p``. Of equally likely tokens the lower id comes first, in a greedy choice too. The
sort that the limits need runs only if a row asks for limits, and the noise is made only if a row draws.

A temperature below `LEAST` is greedy: logits divided by it would overflow, and the lowest id would win instead of the most likely.

Log-probabilities are the model's own: before temperature and limits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

LEAST = 1e-5
"""The lowest temperature that draws."""


class Knobs(NamedTuple):
    """How each row is sampled.

    Attributes:
        temperature: below `LEAST`, as 0 is, takes the most likely token.
        top_k: tokens that may be drawn; 0: all.
        top_p: mass that may be drawn; 1: all.
        seed: low and high word.
    """

    temperature: Float[Array | np.ndarray, "b"]
    top_k: Int[Array | np.ndarray, "b"]
    top_p: Float[Array | np.ndarray, "b"]
    seed: UInt32[Array | np.ndarray, "b 2"]


class Chosen(NamedTuple):
    """Tokens and their log-probabilities, natural."""

    tokens: Int[Array | np.ndarray, "b ..."]
    logprobs: Float[Array | np.ndarray, "b ..."]


def sample(logits: Float[Array, "b v"], *, knobs: Knobs, positions: Int[Array, "b"]) -> Chosen:
    """One token for each row.

    Args:
        logits: of the next token, fp32.
        knobs: of the rows.
        positions: in its sequence, of the token that is chosen.
    """
    greedy = jnp.argmax(logits, axis=-1)
    draws = knobs.temperature >= LEAST

    def draw() -> Array:
        kept = jnp.where(allowed(logits, knobs=knobs), _scaled(logits, knobs), -jnp.inf)
        drawn = jnp.argmax(kept + jax.vmap(_noise, (0, 0, None))(jnp.asarray(knobs.seed), positions, logits.shape[-1]), axis=-1)
        return jnp.where(draws, drawn, greedy)

    tokens = jax.lax.cond(draws.any(), draw, lambda: greedy).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Chosen(tokens, chosen - jax.nn.logsumexp(logits, axis=-1))


def score(logits: Float[Array, "b v"], *, tokens: Int[Array, "b"]) -> Float[Array, "b"]:
    """Log-probability of a given token in each row."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def best(logits: Float[Array, "b v"], *, count: int) -> Chosen:
    """The ``count`` most likely tokens of each row, ``[b, count]``, in order."""
    highest, tokens = jax.lax.top_k(logits, count)
    return Chosen(tokens, highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def allowed(logits: Float[Array, "b v"], *, knobs: Knobs) -> Bool[Array, "b v"]:
    """Which tokens a row's limits leave."""
    limited = (knobs.temperature >= LEAST) & ((knobs.top_k > 0) | (knobs.top_p < 1))

    def limits() -> Array:
        scaled = _scaled(logits, knobs)
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        ordered = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(logits.shape[-1])[None]
        kept = rank < jnp.where(knobs.top_k > 0, knobs.top_k, logits.shape[-1])[:, None]
        mass = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        kept &= (jnp.cumsum(mass, axis=-1) - mass < knobs.top_p[:, None]) | (knobs.top_p >= 1)[:, None]
        # The most likely token stays whatever the rounding of the sums.
        kept |= rank == 0
        rows = jnp.arange(len(logits))[:, None]
        return jnp.zeros(logits.shape, bool).at[rows, order].set(kept) | ~limited[:, None]

    return jax.lax.cond(limited.any(), limits, lambda: jnp.ones(logits.shape, bool))


def _scaled(logits: Array, knobs: Knobs) -> Array:
    return logits / jnp.where(knobs.temperature >= LEAST, knobs.temperature, 1.0)[:, None]


def _noise(seed: UInt32[Array, "2"], position: Int[Array, ""], size: int) -> Float[Array, "v"]:
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,), jnp.float32)
