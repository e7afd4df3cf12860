"""Products of few bits in a training step: where model code gets them from, and what is counted of them.

What is traced inside `formats` multiplies as the recipe's `numerics` says. The zeros that it is given are the counts' way out: the loss
does not depend on them, and their gradient is how many elements saturate and vanish, summed over layers (`ops.products`).
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4train.numerics import config as numerics_config
from v4train.ops import products, select

ROLES = ("linear", "experts")
Probes = dict[str, Float[Array, "2 3"]]


def probes(config: numerics_config.NumericsConfig) -> Probes:
    """Zeros for each role whose products are in FP8; none in the compute dtype."""
    return {role: jnp.zeros(products.PROBE_SHAPE) for role in ROLES if getattr(config, role) != "compute"}


@contextlib.contextmanager
def formats(config: numerics_config.NumericsConfig, *, counted: Probes | None = None) -> Iterator[None]:
    """What is traced inside has the recipe's formats.

    Args:
        config: the recipe's.
        counted: `probes`, differentiated with respect to; None: nothing is counted.
    """
    with contextlib.ExitStack() as stack:
        for role in probes(config):
            chosen = products.Fp8(None if counted is None else counted[role])
            stack.enter_context(select.using(f"{role}_product", implementation=chosen))
            if config.emulate:
                stack.enter_context(select.using(f"fp8_{role}", implementation="emulated"))
        yield


def shares(counts: dict[str, Float[Array, "3"]]) -> dict[str, Float[Array, "2"]]:
    """Elements, saturated and vanished ones -> the shares of saturated and vanished ones."""
    return {name: count[1:] / jnp.maximum(count[0], 1.0) for name, count in counts.items()}


def by_role(weights: dict[str, Array], of_probes: Probes) -> dict[str, Float[Array, "2"]]:
    """The shares of each role: ``weights/linear``, ``activations/linear``, ``gradients/linear``, ..."""
    counts = {f"weights/{role}": count for role, count in weights.items()}
    for role, (activations, gradients) in of_probes.items():
        counts |= {f"activations/{role}": activations, f"gradients/{role}": gradients}
    return shares(jax.tree.map(jax.lax.stop_gradient, counts))
