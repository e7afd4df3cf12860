"""Experts for a few tokens against a plain loop in fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4train.decode import experts
from v4train.model import router

HIDDEN, WIDTH, EXPERTS, LAYERS, TOP_K, LIMIT = 24, 36, 5, 2, 3, 2.0


@functools.cache
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"w1": (HIDDEN, WIDTH), "w3": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN)}
    return {name: rng.standard_normal((LAYERS, EXPERTS, *size), np.float32) for name, size in sizes.items()}


def expected(x: np.ndarray, chosen: np.ndarray, shares: np.ndarray, layer: int) -> np.ndarray:
    out, w = np.zeros(x.shape, np.float64), {name: each[layer].astype(np.float64) for name, each in weights().items()}
    for at in np.ndindex(chosen.shape):
        if chosen[at] == EXPERTS:
            continue
        gate, up = (x[at[:2]].astype(np.float64) @ w[name][chosen[at]] for name in ("w1", "w3"))
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        out[at[:2]] += shares[at] * (gate / (1 + np.exp(-gate)) * up @ w["w2"][chosen[at]])
    return out


@pytest.mark.parametrize("slab", [2**20, 300, 7], ids=["a matrix at once", "slabs", "rows"])
@pytest.mark.parametrize(("batch", "length", "rows"), [(1, 1, 32), (4, 1, 32), (2, 9, 4)], ids=["a token", "a step", "several turns"])
def test_experts_are_those_of_a_plain_loop(monkeypatch, slab, batch, length, rows):
    """Matrices in slabs or whole; one turn or several for an expert; a token that is padding; an expert that nobody chose."""
    monkeypatch.setattr(experts, "_SLAB", slab)
    monkeypatch.setattr(experts, "_ROWS", rows)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, length, HIDDEN), np.float32)
    chosen = np.stack([rng.permutation(EXPERTS - 1)[:TOP_K] for _ in range(batch * length)]).reshape(batch, length, TOP_K).astype(np.int32)
    shares = rng.random(chosen.shape, np.float32)
    if batch > 1:
        chosen[1, 0], shares[1, 0] = EXPERTS, 0
    routing = router.Routing(jnp.asarray(chosen), jnp.asarray(shares), jnp.zeros((1, EXPERTS)), jnp.zeros(()))
    run = jax.jit(lambda x, w, layer: experts.routed(x, routing, w, layer=layer, limit=LIMIT))
    for layer in range(LAYERS):
        want = expected(x, chosen, shares, layer)
        np.testing.assert_allclose(run(x, weights(), jnp.int32(layer)), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(("shape", "parts"), [((4096, 2048), 8), ((2048, 4096), 8), ((7168, 3072), 28), ((256, 512), 1), ((7, 2**19), 7)])
def test_slabs_are_equal_and_small(shape, parts):
    assert jax.default_backend() != "cpu" or experts._parts(*shape) == parts
