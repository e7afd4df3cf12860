"""Random inputs of one attention layer over the packed rows of `packing`, and the definition in loops, in fp64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops import packing
from v4train.ops import compress, sparse_attention

SEGMENTS, POSITIONS = packing.layout()
BATCH, LENGTH = SEGMENTS.shape
HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH = 3, 8, 2, 4
RATIO, WINDOW, TOP_K = 4, 5, 3

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles faster; what runs here is too small to need fast code."""


class Case(NamedTuple):
    """What gradients are taken of."""

    query: np.ndarray
    kv: np.ndarray
    sink: np.ndarray
    values: np.ndarray
    index: sparse_attention.Index


def draw(*, seed: int = 0) -> Case:
    """Logits are about as large as the entries are many, so that no softmax is flat."""
    rng, n = np.random.default_rng(seed), LENGTH // RATIO

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Case(
        query=2 * normal(BATCH, LENGTH, HEADS, WIDTH),
        kv=normal(BATCH, LENGTH, WIDTH),
        sink=normal(HEADS),
        values=normal(BATCH, n, WIDTH),
        index=sparse_attention.Index(
            normal(BATCH, LENGTH, INDEX_HEADS, INDEX_WIDTH), normal(BATCH, LENGTH, INDEX_HEADS), normal(BATCH, n, INDEX_WIDTH)
        ),
    )


def entries(values: jax.Array) -> sparse_attention.Entries:
    """Values with the blocks of the packed rows."""
    blocks = compress.block_table(SEGMENTS, POSITIONS, ratio=RATIO)
    return sparse_attention.Entries(jnp.asarray(values), blocks.end, blocks.segment)


class Looped(NamedTuple):
    """The definition's results."""

    out: np.ndarray  # [B, S, H, K]
    shares: np.ndarray  # [B, H, S, N]: probability of each entry
    seen: np.ndarray  # [B, S, N]: the entries a query attends
    scores: np.ndarray  # [B, S, N]: index scores
    loss: np.ndarray  # [B]


def loop(case: Case, *, top_k: int | None, use_entries: bool = True) -> Looped:
    """One query, one head, one key at a time."""
    query, kv, sink, values = (np.asarray(x, np.float64) for x in case[:4])
    n = values.shape[1]
    out, shares = np.zeros(query.shape), np.zeros((BATCH, HEADS, LENGTH, n))
    seen, scores, loss = np.zeros((BATCH, LENGTH, n), bool), np.zeros((BATCH, LENGTH, n)), np.zeros(BATCH)
    for b, blocks in enumerate(packing.blocks(SEGMENTS, POSITIONS, ratio=RATIO)):
        for t in np.where(SEGMENTS[b] > 0)[0]:
            scores[b, t] = _scores(case.index, b, t)
            document, place = SEGMENTS[b, t], POSITIONS[b, t]
            visible = [i for i, x in enumerate(blocks) if x.segment == document and x.position // RATIO < (place + 1) // RATIO]
            visible = sorted(visible, key=lambda i: -scores[b, t, i])[:top_k] if use_entries else []
            seen[b, t, visible] = True
            near = [u for u in range(max(t - WINDOW + 1, 0), t + 1) if SEGMENTS[b, u] == document]
            keys = np.concatenate([kv[b, near], values[b, visible]])
            for h in range(HEADS):
                mass = np.exp(keys @ query[b, t, h] / np.sqrt(WIDTH))
                share = mass / (mass.sum() + np.exp(sink[h]))
                out[b, t, h], shares[b, h, t, visible] = share @ keys, share[len(near) :]
            if visible:
                loss[b] += _divergence(shares[b, :, t, visible].sum(1), scores[b, t, visible])
    return Looped(out, shares, seen, scores, loss)


def _scores(index: sparse_attention.Index, b: int, t: int) -> np.ndarray:
    query, weight, key = (np.asarray(x, np.float64) for x in (index.query[b, t], index.weight[b, t], index.key[b]))
    return np.array([sum(weight[h] * max(query[h] @ k, 0) for h in range(len(weight))) for k in key])


def _divergence(mass: np.ndarray, scores: np.ndarray) -> float:
    teacher, student = mass / mass.sum(), np.exp(scores) / np.exp(scores).sum()
    return float((teacher * np.log(teacher / student)).sum())
