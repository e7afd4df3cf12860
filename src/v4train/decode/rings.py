"""Where the tokens of a call stand in their sequences, and the rings that hold the last raw tokens; see `decode.cache`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Span(NamedTuple):
    """``t`` tokens for each of ``b`` sequences, of which the first ``count`` are real; they follow the ``start`` tokens before."""

    slots: Int[Array, "b"]
    start: Int[Array, "b"]
    count: Int[Array, "b"]
    pages: Int[Array, "b p"]
    positions: Int[Array, "b t"]

    @property
    def end(self) -> Int[Array, "b"]:
        """Tokens of each sequence afterwards."""
        return self.start + self.count

    @property
    def real(self) -> Bool[Array, "b t"]:
        """Which tokens are not padding; positions before the sequence are (they occur when something runs one token behind)."""
        return (self.positions < self.end[:, None]) & (self.positions >= 0)


def span(*, slots: Array, start: Array, count: Array, pages: Array, length: int) -> Span:
    """The span of ``length`` tokens a row."""
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return Span(slots, start, count, pages, positions)


def write(ring: Float[Array, "l slots r w"], new: Float[Array, "b t w"], at: Span, *, layer: Array) -> Array:
    """Puts the real tokens into their places; of tokens that share a place, the last."""
    size = ring.shape[2]
    kept = at.real & (at.positions >= at.end[:, None] - size)
    places = jnp.where(kept, at.positions % size, size)  # beyond the end: dropped
    return ring.at[layer, at.slots[:, None], places].set(new.astype(ring.dtype), mode="drop")


def read(ring: Float[Array, "l slots r w"], at: Span, *, layer: Array) -> Float[Array, "b r w"]:
    """Each row's ring as it lies."""
    return ring.at[layer, at.slots].get(mode="promise_in_bounds")


def extend(
    ring: Float[Array, "l slots r w"], new: Float[Array, "b t w"], at: Span, *, layer: Array
) -> tuple[Float[Array, "b r+t w"], Array]:
    """The ring's tokens in order of position, ``start - r`` to ``start - 1``, followed by the new ones; and the ring with these in it."""
    size = ring.shape[2]
    places = (at.start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]) % size
    before = ring.at[layer, at.slots[:, None], places].get(mode="promise_in_bounds")
    # What is read here is overwritten below. Unless the write waits for it, the compiler copies the whole stacked ring.
    ring, before = jax.lax.optimization_barrier((ring, before))
    return jnp.concatenate([before.astype(new.dtype), new], axis=1), write(ring, new, at, layer=layer)
