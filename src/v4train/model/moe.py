"""Experts: many routed ones, of which a token uses a few, and a shared one that every token uses.

An expert is a SwiGLU whose gate is clamped from above and whose up-projection from both sides, on every path, also the shared one.
Routed experts are split over devices; tokens travel (`ops.expert_exchange`), nothing is dropped.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import context as context_lib
from v4train.model import router
from v4train.ops import expert_exchange, grouped_matmul, select
from v4train.sharding import constrain


def swiglu(gate: Float[Array, "... f"], up: Float[Array, "... f"], *, limit: float) -> Float[Array, "... f"]:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)``."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


class SharedExpert(nnx.Module):
    """The dense part of the mixture."""

    def __init__(self, config: config_lib.ModelConfig):
        width, init = config.moe.ffn * config.moe.shared, param.Normal(config.init_std)
        self.limit = config.moe.swiglu_limit
        self.w1 = param.param((config.hidden, width), "D F", init)
        self.w3 = param.param((config.hidden, width), "D F", init)
        self.w2 = param.param((width, config.hidden), "F D", init)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return swiglu(x @ self.w1[...], x @ self.w3[...], limit=self.limit) @ self.w2[...]


class RoutedExperts(nnx.Module):
    """The sparse part: ``w1`` gates, ``w3`` goes up, ``w2`` comes down."""

    def __init__(self, config: config_lib.ModelConfig):
        moe, d, init = config.moe, config.hidden, param.Normal(config.init_std)
        self.config = moe
        self.w1 = param.param((moe.experts, d, moe.ffn), "E D F", init)
        self.w3 = param.param((moe.experts, d, moe.ffn), "E D F", init)
        self.w2 = param.param((moe.experts, moe.ffn, d), "E F D", init)

    def __call__(self, x: Float[Array, "b s d"], routing: router.Routing) -> Float[Array, "b s d"]:
        moe, axis = self.config, constrain.mesh_axis("E")
        matmul, transport = select.implementation("grouped_matmul"), select.implementation("expert_exchange")

        def local(x, experts, weights, w1, w3, w2):
            def expert_fn(rows: Array, group_sizes: Array) -> Array:
                def times(x: Array, w: Array) -> Array:
                    return grouped_matmul.grouped_matmul(x, w, group_sizes, implementation=matmul)

                return times(swiglu(times(rows, w1), times(rows, w3), limit=moe.swiglu_limit), w2)

            out = expert_exchange.route_through_experts(
                x.reshape(-1, x.shape[-1]),
                experts.reshape(-1, moe.top_k),
                weights.reshape(-1, moe.top_k),
                expert_fn,
                num_experts=moe.experts,
                axis_name=axis,
                transport=transport,
            )
            return out.reshape(x.shape)

        run = constrain.shard_local(local, inputs=("B S _", "B S _", "B S _", "E _ _", "E _ _", "E _ _"), outputs="B S _")
        return run(x, routing.experts, routing.weights, self.w1[...], self.w3[...], self.w2[...])


class Moe(nnx.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, config: config_lib.ModelConfig, *, hashed: bool):
        self.router = router.Router(config, hashed=hashed)
        self.experts = param.tag(RoutedExperts(config), "routed_expert")
        self.shared = SharedExpert(config)

    def __call__(self, x: Float[Array, "b s d"], inputs: context_lib.Inputs) -> tuple[Float[Array, "b s d"], router.Routing]:
        routing = self.router(x, inputs)
        return self.experts(x, routing) + self.shared(x), routing
