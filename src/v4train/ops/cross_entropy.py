"""Next-token cross-entropy without an array of all logits.

At V = 129,280 and S = 1M the logits would be 517 GB in fp32. They are computed, used and forgotten for one chunk of tokens at a time; the
backward pass computes them again.

The vocabulary may be split over a mesh axis (Megatron's vocabulary-parallel loss, arXiv 1909.08053, section 3). Each device has the
logits of its ids; what it needs of the others' are three numbers per token: their largest logit, their sum of exponentials, and the
target's logit, which one of them has. So 12 bytes a token are summed over the axis where gathered logits would be 4 V.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def logits(hidden: Float[Array, "... d"], head: Float[Array, "d v"], *, allowed: Bool[Array, "v"] | None = None) -> Float[Array, "... v"]:
    """fp32 logits; ids that are not ``allowed`` get the lowest finite value."""
    out = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
    if allowed is None:
        return out
    return jnp.where(jnp.expand_dims(allowed, range(out.ndim - 1)), out, jnp.finfo(jnp.float32).min)


def cross_entropy(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b s"],
    *,
    allowed: Bool[Array, "v"] | None = None,
    chunk: int = 2048,
    axis_name: str | None = None,
) -> Float[Array, "b s"]:
    """Nats per token, fp32, computed ``chunk`` positions of all rows at a time.

    Args:
        hidden: normalised hidden states.
        head: the output matrix, or this device's ids of it.
        targets: ids of the whole vocabulary.
        allowed: of the ids in ``head``, those that may be predicted.
        chunk: positions at a time; results do not depend on it.
        axis_name: inside of `jax.shard_map`, the mesh axis that splits the vocabulary.
    """

    def nats(hidden: Array, targets: Array) -> Array:
        return _nats(logits(hidden, head, allowed=allowed), targets, axis_name=axis_name)

    return _by_chunks(nats, hidden, targets, chunk=chunk)


def verdicts(
    hidden: Float[Array, "b s d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b s"],
    *,
    allowed: Bool[Array, "v"] | None = None,
    chunk: int = 2048,
    axis_name: str | None = None,
) -> Float[Array, "b s 2"]:
    """Of each target its nats, and 1 if no id has a higher logit, else 0: what an evaluation by choice or by recall asks for. Arguments are
    those of `cross_entropy`."""

    def judge(hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, head, allowed=allowed)
        top, chosen = scores.max(axis=-1), _chosen(scores, targets, axis_name=axis_name)
        if axis_name is not None:
            top, chosen = lax.pmax(top, axis_name), lax.psum(chosen, axis_name)
        return jnp.stack([_nats(scores, targets, axis_name=axis_name), (chosen >= top).astype(jnp.float32)], axis=-1)

    return _by_chunks(judge, hidden, targets, chunk=chunk)


def _by_chunks(function: Callable[[Array, Array], Array], hidden: Array, targets: Array, *, chunk: int) -> Array:
    """``function`` of hidden states and targets, for ``chunk`` positions of all rows at a time; the backward pass computes it again."""
    length = targets.shape[1]
    if length <= chunk:
        return jax.checkpoint(function)(hidden, targets)
    chunks = -(-length // chunk)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    out = jnp.moveaxis(lax.map(lambda xs: jax.checkpoint(function)(*xs), (split(hidden), split(targets))), 0, 1)
    return out.reshape(targets.shape[0], chunks * chunk, *out.shape[3:])[:, :length]


def _nats(scores: Float[Array, "b s v"], targets: Int[Array, "b s"], *, axis_name: str | None) -> Float[Array, "b s"]:
    chosen = _chosen(scores, targets, axis_name=axis_name)
    if axis_name is None:
        return jax.nn.logsumexp(scores, axis=-1) - chosen
    top = lax.pmax(lax.stop_gradient(scores.max(axis=-1)), axis_name)
    mass, chosen = lax.psum((jnp.exp(scores - top[..., None]).sum(axis=-1), chosen), axis_name)
    return jnp.log(mass) + top - chosen


def _chosen(scores: Float[Array, "b s v"], targets: Int[Array, "b s"], *, axis_name: str | None) -> Float[Array, "b s"]:
    """The targets' logits, of which each device adds up its own."""
    ids = jnp.arange(scores.shape[-1], dtype=targets.dtype)
    if axis_name is not None:
        ids = ids + lax.axis_index(axis_name) * len(ids)
    return jnp.sum(jnp.where(ids[None, None] == targets[..., None], scores, 0), axis=-1)  # its gradient needs no scatter
