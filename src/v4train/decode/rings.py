"""Where the tokens of a call stand in their sequences, and the rings that hold the last raw tokens; see `decode.cache`."""

from typing import NamedTuple

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


def read(ring: Float[Array, "l slots r w"], at: Span, positions: Int[Array, "b n"], *, layer: Array) -> Float[Array, "b n w"]:
    """What lies at the places of these positions."""
    return ring.at[layer, at.slots[:, None], positions % ring.shape[2]].get(mode="promise_in_bounds")


def through(
    ring: Float[Array, "l slots r w"], new: Float[Array, "b t w"], at: Span, *, layer: Array, back: int
) -> tuple[Float[Array, "b back+t w"], Array]:
    """The tokens from ``start - back`` on, the new ones included, in the new ones' dtype; and the ring with the new ones in it.

    A ring with room for ``back`` tokens and the new ones is written first and then read: it is updated where it is. Into a smaller one
    the new tokens
    go over what has yet to be read, for which the compiler copies the ring: for prompts, whose rings are taken out of the cache first.
    """
    length = new.shape[1]
    positions = at.start[:, None] + jnp.arange(-back, length, dtype=jnp.int32)[None]
    if back + length <= ring.shape[2]:
        ring = write(ring, new, at, layer=layer)
        return read(ring, at, positions, layer=layer).astype(new.dtype), ring
    before = read(ring, at, positions[:, :back], layer=layer)
    return jnp.concatenate([before.astype(new.dtype), new], axis=1), write(ring, new, at, layer=layer)
