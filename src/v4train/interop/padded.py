"""Padding inside a prompt, as the public PyTorch class treats it when it generates.

Told of a padding id and given no mask, `transformers` hides every token of the prompt that has it (prompts of a batch are padded in front
that way). The class keeps these tokens in the sequence and hides them in part only, and differently for prompt and continuation, because
its cache does not know them. Precisely, at index t of the sequence, with P tokens of prompt:

- Positions count what is not hidden: ``p(t)`` is the number of earlier tokens that are not; 0 for a hidden token itself. After the prompt
  they go on from ``p(P - 1)``. Queries, raw keys and the result are rotated by p.
- Hidden tokens are no keys of the window. The window still reaches back by index, and hidden tokens are queries like others.
- Compression knows nothing of this: entry i is made of tokens ``m i .. m i + m - 1``, hidden ones too, and is rotated by ``m i``.
- Entries are visible by position, ``i < floor((p(t) + 1) / m)``: a query sees its newest entries later than without padding. With one
  exception: after the prompt, HCA layers show every entry that exists.

So padding changes the result, which no batching should; v4train neither trains nor serves this way. It is here because stored
continuations were made so. Used only where a prompt has hidden tokens: it computes dense attention, S^2 logits per head.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from v4train.interop import topk_order
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.ops import select, sparse_attention


class Padding:
    """The hidden tokens of one prompt, continued to ``length`` tokens."""

    def __init__(self, hidden: Bool[np.ndarray, "p"], *, length: int):
        prompt = len(hidden)
        positions = np.where(hidden, 0, np.cumsum(~hidden) - 1)
        after = positions[-1] + 1 + np.arange(length - prompt)
        self.positions = np.concatenate([positions, after]).astype(np.int32)
        self.is_key = np.concatenate([~hidden, np.ones(length - prompt, bool)])
        self.prompt = prompt

    def context(self, inputs: context_lib.Inputs, *, config: config_lib.ModelConfig) -> context_lib.Context:
        """Of one row: positions that leave out what is hidden, and blocks that do not."""
        return context_lib.make(inputs, config=config)._replace(inputs=inputs._replace(positions=jnp.asarray(self.positions)[None]))

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Attention that is traced inside sees what the class sees."""
        with select.using("sparse_attention", implementation=self._attend):
            yield

    def _attend(
        self,
        query: Float[Array, "1 s h k"],
        kv: Float[Array, "1 s k"],
        sink: Float[Array, "h"],
        *,
        segment_ids: Int[Array, "1 s"],
        window: int,
        chunk: int,
        entries: sparse_attention.Entries | None = None,
        index: sparse_attention.Index | None = None,
        selection: sparse_attention.Selection | None = None,
    ) -> sparse_attention.Attended:
        del chunk
        keys, ages = kv[0], np.subtract.outer(np.arange(kv.shape[1]), np.arange(kv.shape[1]))
        visible = jnp.asarray((ages >= 0) & (ages < window) & self.is_key)
        if entries is not None:
            seen = self._visible(entries.end[0], by_position=index is not None)
            if index is not None and selection is not None and selection.top_k is not None and selection.top_k < seen.shape[1]:
                seen = _selected(index, seen, top_k=selection.top_k, existing=self._existing(entries.end[0]))
            keys, visible = jnp.concatenate([keys, entries.values[0]]), jnp.concatenate([visible, seen], axis=1)
        logits = jnp.einsum("shk,nk->shn", query[0] * query.shape[-1] ** -0.5, keys)
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        with_sink = jnp.concatenate([logits, jnp.broadcast_to(sink[:, None], (*logits.shape[:2], 1))], axis=-1)
        out = jnp.einsum("shn,nk->shk", jax.nn.softmax(with_sink, axis=-1)[..., :-1], keys)
        return sparse_attention.Attended((out * (segment_ids[0] > 0)[:, None, None])[None], jnp.zeros(1))

    def _existing(self, end: Int[Array, "n"]) -> Int[Array, "s"]:
        """Entries that the class has made when it runs a query: the prompt's, or those complete at the query."""
        index = np.arange(len(self.positions))
        return (end[None] <= jnp.asarray(np.maximum(index, self.prompt - 1))[:, None]).sum(axis=1, dtype=jnp.int32)

    def _visible(self, end: Int[Array, "n"], *, by_position: bool) -> Bool[Array, "s n"]:
        """Which query sees which entry; entries end where they end by index."""
        index = np.arange(len(self.positions))
        newest = self.positions if by_position else np.where(index < self.prompt, self.positions, index)
        return end[None] <= jnp.asarray(newest)[:, None]


def _selected(index: sparse_attention.Index, seen: Bool[Array, "s n"], *, top_k: int, existing: Int[Array, "s"]) -> Bool[Array, "s n"]:
    products = jnp.einsum("sij,nj->sin", index.query[0], index.key[0])
    scores = jnp.einsum("si,sin->sn", index.weight[0], jax.nn.relu(products))
    picked = topk_order.pick(jnp.where(seen, scores, topk_order.INVISIBLE), k=top_k, existing=existing)
    return seen & (picked[..., None] == jnp.arange(seen.shape[1])[None, None]).any(axis=1)
