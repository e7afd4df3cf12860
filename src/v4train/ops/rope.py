"""Rotary position embedding: partial, interleaved, invertible, with YaRN.

Only the trailing ``2 * len(frequencies)`` channels of a head turn, in pairs ``(2k, 2k + 1)``. Angles are fp32: in bf16 they are wrong by
17% at long positions. Because V4's one key/value head is key *and* value, values carry the rotation of their position; the attention
output is turned back by the query's position (``inverse=True``), so what a head reads depends on relative positions only.

YaRN (Peng et al. 2023, section 3.2) divides the slow frequencies by `factor`, leaves the fast ones, and ramps in between. V4 uses it
without the attention temperature, on every layer with compressed entries. It acts at all positions, not only beyond the original length.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def frequencies(
    width: int,
    *,
    theta: float,
    factor: float = 1.0,
    original_positions: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Radians per position of each channel pair: fp32 ``[width // 2]``. ``factor`` 1 means no YaRN."""
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if factor == 1.0:
        return plain.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        return width * math.log(original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - first) / max(last - first, 0.001), 0, 1)
    return (plain * (1 - ramp) + plain / factor * ramp).astype(np.float32)


def rotate(
    x: Float[Array, "b s ... k"],
    positions: Int[Array, "b s"],
    *,
    freqs: np.ndarray,
    inverse: bool = False,
) -> Float[Array, "b s ... k"]:
    """Turns the trailing ``2 * len(freqs)`` channels of ``x`` by its position (back, if ``inverse``)."""
    pairs = len(freqs)
    angles = positions.astype(jnp.float32)[..., None] * freqs[None, None]
    angles = jnp.expand_dims(angles, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angles), jnp.sin(-angles if inverse else angles)
    still, turning = jnp.split(x, [x.shape[-1] - 2 * pairs], axis=-1)
    turning = turning.astype(jnp.float32).reshape(*x.shape[:-1], pairs, 2)
    even, odd = turning[..., 0], turning[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([still, turned.reshape(*x.shape[:-1], 2 * pairs).astype(x.dtype)], axis=-1)
