"""The learning rate as a function of the step.

::

    peak        ________________
               /                 `-.
              /                     `-._
    final                               `'------
          0   W-1           T-F-D-1    T-F-1   T-1     W warmup_steps, D decay_steps, F final_steps, T total_steps

Steps count from 0 and a ramp reaches its end *at* its last step: step W-1 is the first at the peak, step T-F-1 the first at the
final rate. The other convention, ``step / W``, spends the first step on a learning rate of 0: a full batch that moves nothing.

The decay takes the way from peak to final by one of three shapes of ``u``, its part that is done: ``(1 + cos(pi u)) / 2``, ``1 - u``, and
``1 - sqrt(u)``, which falls fastest at its beginning and does best after a long flat part (Haegele et al. 2024, section 3.3; WSD).

The sums over steps are done in integers, so the edges are exact at any step number.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4train.optim.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, *, step: Int[Array, ""] | int, total_steps: int) -> Float[Array, ""]:
    """The fp32 learning rate of update number ``step`` (from 0; may be traced). Past the last step it stays at its last value.

    Raises:
        ValueError: the warm-up, the decay and the final steps do not fit into ``total_steps``.
    """
    config.check(total_steps)
    done = jnp.asarray(step, jnp.int32) + 1
    warm = jnp.minimum(done, config.warmup_steps).astype(jnp.float32) / max(config.warmup_steps, 1)
    rising_or_flat = config.peak_lr * (warm if config.warmup_steps else 1.0)
    if not config.decay_steps:
        return jnp.asarray(rising_or_flat, jnp.float32)
    into_decay = done - (total_steps - config.final_steps - config.decay_steps)
    fraction = jnp.clip(into_decay, 0, config.decay_steps).astype(jnp.float32) / config.decay_steps
    falling = config.final_lr + (config.peak_lr - config.final_lr) * _left(config.decay_shape, fraction)
    return jnp.where(into_decay > 0, falling, rising_or_flat)


def _left(shape: str, fraction: Float[Array, ""]) -> Float[Array, ""]:
    """How much of the way from peak to final is still to go: 1 at the decay's beginning, 0 at its end."""
    if shape == "cosine":
        return 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))
    return 1.0 - (jnp.sqrt(fraction) if shape == "sqrt" else fraction)
