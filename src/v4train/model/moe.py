"""Experts: many routed ones, of which a token uses a few, and a shared one that every token uses.

An expert is a SwiGLU whose gate is clamped from above and whose up-projection from both sides, on every path, the shared one included
unless the recipe says otherwise.
Routed experts are split over devices and tokens travel to them (`ops.exchange`); nothing is dropped unless the recipe asks for it. Each
expert's hidden width is split over `tensor`: the devices that share an expert see the same tokens and add up what they compute.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import product, router
from v4train.ops import products, select
from v4train.ops.exchange import route
from v4train.sharding import constrain


def swiglu(gate: Float[Array, "... f"], up: Float[Array, "... f"], *, limit: float) -> Float[Array, "... f"]:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)``."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


class SharedExpert(nnx.Module):
    """The dense part of the mixture."""

    def __init__(self, config: config_lib.ModelConfig):
        width, init = config.moe.ffn * config.moe.shared, param.Normal(config.init_std)
        self.limit = config.moe.swiglu_limit if config.moe.clamp_shared else math.inf
        self.w1 = param.param((config.hidden, width), "D F", init, product="linear")
        self.w3 = param.param((config.hidden, width), "D F", init, product="linear")
        self.w2 = param.param((width, config.hidden), "F D", init, product="linear")

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return product.times(swiglu(product.times(x, self.w1), product.times(x, self.w3), limit=self.limit), self.w2)


class Travelled(NamedTuple):
    """What the routed experts give. Slots are (token, choice) pairs; counts are over all devices."""

    out: Float[Array, "b s d"]
    late: Float[Array, ""]  # slots that did not fit into the first round
    dropped: Float[Array, ""]


class RoutedExperts(nnx.Module):
    """The sparse part: ``w1`` gates, ``w3`` goes up, ``w2`` comes down."""

    def __init__(self, config: config_lib.ModelConfig):
        moe, d, init = config.moe, config.hidden, param.Normal(config.init_std)
        self.config = moe
        self.w1 = param.param((moe.experts, d, moe.ffn), "E D F", init, product="experts")
        self.w3 = param.param((moe.experts, d, moe.ffn), "E D F", init, product="experts")
        self.w2 = param.param((moe.experts, moe.ffn, d), "E F D", init, product="experts")

    def __call__(self, x: Float[Array, "b s d"], routing: router.Routing) -> Travelled:
        moe, exchange = self.config, exchange_of(self.config.exchange)
        matmul, formats = select.implementation("grouped_matmul"), product.formats(self.w1)

        def experts(params: tuple[Array, Array, Array, products.Formats], rows: Array, group_sizes: Array) -> Array:
            w1, w3, w2, formats = params
            times = functools.partial(formats.grouped, group_sizes=group_sizes, implementation=matmul)
            return times(swiglu(times(rows, w1), times(rows, w3), limit=moe.swiglu_limit), w2)

        def local(x, chosen, factors, w1, w3, w2, formats):
            routed = route.through_experts(
                x.reshape(-1, x.shape[-1]),
                expert_ids=chosen.reshape(-1, moe.top_k),
                weights=factors.reshape(-1, moe.top_k),
                expert_fn=experts,
                params=(w1, w3, w2, formats),
                num_experts=moe.experts,
                exchange=exchange,
            )
            counts = jnp.stack([routed.late, routed.dropped]).astype(jnp.float32)
            return routed.out.astype(x.dtype).reshape(1, *x.shape), counts[None]

        stored = constrain.Stored("E D F"), constrain.Stored("E D F"), constrain.Stored("E F D")
        run = constrain.shard_local(local, inputs=("B S _", "B S _", "B S _", *stored, "_"), outputs=("P B S _", "T _"))
        parts, counts = run(x, routing.experts, routing.weights, self.w1[...], self.w3[...], self.w2[...], formats)
        return Travelled(parts.sum(axis=0), *counts.sum(axis=0))


def exchange_of(config: config_lib.ExchangeConfig) -> route.Exchange:
    """The exchange that a recipe asks for, on the ambient mesh and the platform that is compiled for."""
    transport = config.transport or select.implementation("expert_exchange")
    if transport == "ragged":
        transport = select.implementation("ragged_all_to_all")
    drop = config.overflow == "drop"
    return route.Exchange(constrain.mesh_axes("E"), transport, capacity=config.capacity, drop=drop, waves=config.waves)


class Mixture(NamedTuple):
    """What the mixture of one layer gives."""

    out: Float[Array, "b s d"]
    routing: router.Routing
    late: Float[Array, ""]
    dropped: Float[Array, ""]


class Moe(nnx.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, config: config_lib.ModelConfig, *, hashed: bool):
        self.router = router.Router(config, hashed=hashed)
        self.experts = param.tag(RoutedExperts(config), "routed_expert")
        self.shared = SharedExpert(config)

    def __call__(self, x: Float[Array, "b s d"], inputs: context_lib.Inputs, given: Int[Array, "b s k"] | None = None) -> Mixture:
        """``given``: see `router.Router`."""
        routing = self.router(x, inputs, given)
        routed = self.experts(x, routing)
        return Mixture(routed.out + self.shared(x), routing, routed.late, routed.dropped)
