"""The k highest of n scores.

Where equal scores lie across the k-th place, more than one set is the top k. ``earliest`` takes the ones that come first. Another
choice is an `Implementation` of the caller's, brought in with `select.using`: to follow, for a comparison, the sort of another program.
"""

from typing import Literal, Protocol

import jax
from jaxtyping import Array, Float, Int

Named = Literal["earliest"]


class Implementation(Protocol):
    """Places of the k highest scores of the last axis, in any order. Not differentiated. ``0 < k <= n``."""

    def __call__(self, scores: Float[Array, "... n"], *, k: int) -> Int[Array, "... k"]: ...


def top_k(scores: Float[Array, "... n"], *, k: int, implementation: Named | Implementation) -> Int[Array, "... k"]:
    """Places of the k highest scores; nothing is differentiated."""
    scores = jax.lax.stop_gradient(scores)
    if implementation == "earliest":
        return jax.lax.top_k(scores, k)[1]
    assert callable(implementation), implementation
    return implementation(scores, k=k)
