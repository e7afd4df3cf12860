"""Compression while decoding: when a block's last token comes, its entry is made and written to the pool.

Blocks follow positions from 0 of the sequence, whatever the calls are that bring its tokens. A call of t tokens completes at most
``(t + m - 1) // m`` blocks of m. They are pooled by the function that training uses, from a row that is put together from the tail and
the call's
own tokens. When no sequence completes a block, as in most single steps, nothing is pooled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v4train.decode import cache as cache_lib
from v4train.decode import formats, rings
from v4train.model.attention import compressor as compressor_lib
from v4train.ops import compress


class Done(NamedTuple):
    """Blocks that a span may complete, in order."""

    number: Int[Array, "b n"]
    complete: Bool[Array, "b n"]


def of_span(at: rings.Span, *, ratio: int) -> Done:
    """The blocks of ``ratio`` tokens that end in the span, and for a fixed shape perhaps some that do not."""
    most = (at.positions.shape[1] + ratio - 1) // ratio
    number = at.start[:, None] // ratio + jnp.arange(most, dtype=jnp.int32)[None]
    return Done(number, (number + 1) * ratio <= at.end[:, None])


def pool(
    compressor: compressor_lib.Compressor,
    x: Float[Array, "b t d"],
    tail: cache_lib.Tail,
    at: rings.Span,
    *,
    layer: Array,
    ratio: int,
    freqs: np.ndarray,
) -> tuple[Float[Array, "b n k"], cache_lib.Tail]:
    """Entries of the blocks `of_span` names, and the tail with the new tokens in it. Entries of incomplete blocks are finite and
    meaningless."""
    done = of_span(at, ratio=ratio)
    new = cache_lib.Tail(*compressor.project(x))
    back = ratio * (1 + compressor.overlap) - 1
    fits = back + x.shape[1] <= tail.values.shape[2]
    before = at.start[:, None] + jnp.arange(-back, 0, dtype=jnp.int32)[None]
    # A ring that has room for all is read after it is written, where a block is complete; another one has to be read before.
    held = None if fits else [rings.read(ring, at, before, layer=layer) for ring in tail]
    tail = cache_lib.Tail(*(rings.write(ring, each, at, layer=layer) for ring, each in zip(tail, new, strict=True)))

    def entries() -> Array:
        old = [rings.read(ring, at, before, layer=layer) for ring in tail] if held is None else held
        first = (done.number[:, 0] - compressor.overlap) * ratio
        places = (first - at.start + back)[:, None] + jnp.arange((done.number.shape[1] + compressor.overlap) * ratio, dtype=jnp.int32)[None]
        places = jnp.clip(places, 0, back + x.shape[1] - 1)  # blocks that are not there, or not complete
        row = (jnp.concatenate([each, now.astype(each.dtype)], axis=1) for each, now in zip(old, new, strict=True))
        values, gates = (jnp.take_along_axis(each, places[..., None], axis=1, mode="promise_in_bounds") for each in row)
        blocks = _blocks(done, ratio=ratio, overlap=compressor.overlap)
        return compressor.entries(values.astype(new.values.dtype), gates, blocks, freqs=freqs)

    shape = jax.eval_shape(entries)
    return jax.lax.cond(done.complete.any(), entries, lambda: jnp.zeros(shape.shape, shape.dtype)), tail


def _blocks(done: Done, *, ratio: int, overlap: bool) -> compress.Blocks:
    """Their description for `ops.compress`; in the row, the block before comes first if there is overlap."""
    end = (jnp.arange(done.number.shape[1], dtype=jnp.int32) + 1 + overlap) * ratio - 1
    return compress.Blocks(
        end=jnp.broadcast_to(end[None], done.number.shape),
        segment=jnp.ones_like(done.number),
        position=done.number * ratio,
        has_previous=done.number > 0,
    )


def store(
    stored: formats.Stored, entries: Float[Array, "b n k"], at: rings.Span, *, layer: Array, ratio: int, as_format: formats.Format
) -> formats.Stored:
    """Writes the entries of complete blocks to their pages."""
    done = of_span(at, ratio=ratio)
    pages, per_page = next(iter(stored.values())).shape[1:3]
    column = done.number // per_page
    page = jnp.take_along_axis(at.pages, column, axis=1, mode="fill", fill_value=-1)
    page = jnp.where(done.complete & (page >= 0), page, pages)  # beyond the end: dropped
    encoded = as_format.encode(entries)
    return {name: pool.at[layer, page, done.number % per_page].set(encoded[name], mode="drop") for name, pool in stored.items()}
