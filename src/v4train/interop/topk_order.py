"""Which of equal index scores the public PyTorch class attends.

A query attends the k entries with the highest index scores. A score is a weighted sum of ReLUs, so a few index heads that are all shut
give exactly 0.0, to many entries at once. Where such a tie lies across the k-th place, "the top k" is not one set: v4train takes the
earlier entries, as XLA does on every platform; `torch.topk` on a CPU takes what its partial sort happens to leave in front. Both are
right, and their logits differ from that token on. To compare two models, and not two sorts, this module follows the other sort.

It is deterministic. The scores of a row, in order, are the list; "before" means greater, NaN before everything, equal scores unordered.

- ``64 k <= n``: heap selection. A heap of the first k, its worst on top; each later element that comes before the top replaces it.
- otherwise: introselect of place k - 1, as in the C++ library of the GNU compiler. While more than 3 elements are in question, the
  median of the second, the middle and the last one becomes the pivot and is swapped to the front, the rest is partitioned around it from
  both ends (equal elements are swapped too, which is what scatters them), and the part with place k - 1 is kept. At last an insertion
  sort. Should 2 log2(n) partitions not suffice, heap selection does the rest.

The list has the entries that exist when the class runs a query. In one forward pass over S tokens these are all ``S // m``, among them
those that the query cannot see yet, with score -inf; how many they are changes the choice between the others. When it generates with a
cache, the prompt's queries have the prompt's entries in their lists and each later query those complete by then: hence `Order.entries`.

The rejected alternative, to require that no score ties, leaves a third of the golden logits out of the comparison. The cost of this one
is a comparison of two scores per query; rows are sorted on the host only where there is a tie.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

INVISIBLE = float(np.finfo(np.float32).min)
"""The score of an entry that a query does not see."""


@dataclasses.dataclass(frozen=True)
class Order:
    """An implementation of the op ``top_k`` (see `ops.top_k`) that breaks ties as the public class does. For rows of one document each.

    Attributes:
        entries: entries that exist at every query (those of the prompt, if the class generates with a cache); the list of a query that
            sees more than these has what it sees. None: all of the row, as in one forward pass.
    """

    entries: int | None = None

    def __call__(self, scores: Float[Array, "... n"], *, k: int) -> Int[Array, "... k"]:
        """Places of the k highest scores. Works under jit, grad, scan and remat; invisible entries have the lowest fp32 value."""
        visible = (scores > INVISIBLE).sum(axis=-1, dtype=jnp.int32)
        least = scores.shape[-1] if self.entries is None else self.entries
        return pick(scores, k=k, existing=jnp.maximum(visible, least))


def pick(scores: Float[Array, "... n"], *, k: int, existing: Int[Array, "..."]) -> Int[Array, "... k"]:
    """Places of the k highest scores, when the first ``existing`` entries of a row are in the list. Not differentiated."""
    scores = jax.lax.stop_gradient(scores)
    if k >= scores.shape[-1]:
        return jax.lax.top_k(scores, k)[1]
    best, picked = jax.lax.top_k(scores, k + 1)
    picked = picked[..., :k]
    tied = (best[..., k - 1] == best[..., k]) & (best[..., k] > INVISIBLE)
    result = jax.ShapeDtypeStruct(picked.shape, picked.dtype)

    def on_host(scores: Array, picked: Array, tied: Array, existing: Array) -> Array:
        return jax.pure_callback(_break_ties, result, scores, picked, tied, existing)

    return jax.lax.cond(tied.any(), on_host, lambda scores, picked, tied, existing: picked, scores, picked, tied, existing)


def _break_ties(scores: Array, picked: Array, tied: Array, existing: Array) -> np.ndarray:
    values, chosen, counts = np.asarray(scores), np.array(picked), np.asarray(existing)
    for row in zip(*np.nonzero(np.asarray(tied)), strict=True):
        chosen[row] = select(values[row][: counts[row]], k=chosen.shape[-1])
    return chosen


def select(scores: Float[np.ndarray, "n"], *, k: int) -> Int[np.ndarray, "k"]:
    """Places of the k highest scores of one row, the set that ``torch.topk`` finds on a CPU; in no particular order. ``0 < k <= n``."""
    assert 0 < k <= len(scores), (k, len(scores))
    _, rank = np.unique(scores, return_inverse=True)  # NaNs are one value and the last; -0.0 equals 0.0
    heights, places = rank.tolist(), list(range(len(scores)))
    queue = _Queue(heights, places)
    if 64 * k <= len(scores):
        queue.heap_select(0, k, len(scores))
    else:
        queue.introselect(k - 1)
    return np.array(queue.places[:k])


class _Queue:
    """A list of places that is permuted; ``before`` compares what lies at two of its slots."""

    def __init__(self, heights: list[int], places: list[int]):
        self.heights, self.places = heights, places

    def before(self, a: int, b: int) -> bool:
        return self.heights[self.places[a]] > self.heights[self.places[b]]

    def swap(self, a: int, b: int) -> None:
        places = self.places
        places[a], places[b] = places[b], places[a]

    def introselect(self, nth: int) -> None:
        """Afterwards nothing behind slot ``nth`` comes before anything up to it."""
        first, last = 0, len(self.places)
        depth = 2 * (last.bit_length() - 1)
        while last - first > 3:
            if depth == 0:
                self.heap_select(first, nth + 1, last)
                self.swap(first, nth)
                return
            depth -= 1
            cut = self.partition(first, last)
            if cut <= nth:
                first = cut
            else:
                last = cut
        for slot in range(first + 1, last):
            while slot > first and self.before(slot, slot - 1):
                self.swap(slot, slot - 1)
                slot -= 1

    def partition(self, first: int, last: int) -> int:
        """Partitions ``first + 1 .. last`` around the median of three, which goes to ``first``; returns where the second part begins."""
        second, middle, end = first + 1, first + (last - first) // 2, last - 1
        if self.before(second, middle):
            median = middle if self.before(middle, end) else end if self.before(second, end) else second
        else:
            median = second if self.before(second, end) else end if self.before(middle, end) else middle
        self.swap(first, median)
        left, right = first + 1, last
        while True:
            while self.before(left, first):
                left += 1
            right -= 1
            while self.before(first, right):
                right -= 1
            if left >= right:
                return left
            self.swap(left, right)
            left += 1

    def heap_select(self, first: int, middle: int, last: int) -> None:
        """Brings the best of ``first .. last`` into ``first .. middle``, a heap with its worst on top."""
        size = middle - first
        for parent in range((size - 2) // 2, -1, -1) if size > 1 else ():
            self.sift(first, parent, size, self.places[first + parent])
        for slot in range(middle, last):
            if self.before(slot, first):
                value = self.places[slot]
                self.places[slot] = self.places[first]
                self.sift(first, 0, size, value)

    def sift(self, first: int, top: int, size: int, value: int) -> None:
        """Fills the hole ``top``: the worse children move up to the bottom, then ``value`` climbs from there."""
        places, heights = self.places, self.heights
        hole = top
        while 2 * hole + 2 < size:
            child = 2 * hole + 2
            if self.before(first + child, first + child - 1):
                child -= 1
            places[first + hole] = places[first + child]
            hole = child
        if 2 * hole + 2 == size:
            places[first + hole] = places[first + 2 * hole + 1]
            hole = 2 * hole + 1
        while hole > top and heights[places[first + (hole - 1) // 2]] > heights[value]:
            places[first + hole] = places[first + (hole - 1) // 2]
            hole = (hole - 1) // 2
        places[first + hole] = value
