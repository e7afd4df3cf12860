"""What a layer keeps for its backward pass, from the layer itself: its derivative is traced on shapes, and the arrays that the forward pass
hands to the backward pass are added up.

No formula of ours has to follow what is inside of a layer (norms, gates, softmax, rotations): the trace sees the code that will run, with
its remat policy, and costs a second, no memory and no device. What it does not see is what a compiler makes of it: fused operations keep
less, padding and copies take more. Against the compiler's figures it is right within a few percent (docs/planner.md).

A layer is traced as one device sees it, with its rows and its part of the sequence. Two parts are left to formulas, because they depend
on the mesh and on the platform's transport: the buffers of routed experts (`exchange`), which are traced separately and taken out, and the
weights that the layer gathers (`memory`).
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import extend

from v4train.core import param
from v4train.model import block as block_lib
from v4train.model import config as model_config
from v4train.model import context as context_lib
from v4train.model import hyper_connections, moe, router, stack
from v4train.numerics import config as numerics_config
from v4train.numerics import policy
from v4train.ops import products, select

_COSTLY = {
    "dot_general",
    "ragged_dot_general",
    "gather",
    "sort",
    "top_k",
    "approx_top_k",
    "psum",
    "ppermute",
    "dynamic_slice",
    "conv_general_dilated",
}
"""Operations whose result is kept rather than made twice; with reductions, scatters, loops, and collectives."""
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
"""Operations that are what is inside of them."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes on one device.

    Attributes:
        saved: from the forward to the backward pass of a layer under the recipe's remat policy, its input included, experts apart.
        inside: what the backward pass of a layer needs again of its forward pass, experts apart; what is cheap to make twice is not kept.
    """

    saved: int
    inside: int


@dataclasses.dataclass(frozen=True)
class Place:
    """The part of a batch that one device holds.

    Attributes:
        rows: of it.
        tokens: of each row.
        compute: dtype of activations.
    """

    rows: int
    tokens: int
    compute: numerics_config.NumericsConfig

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.rows * self.tokens

    @property
    def dtype(self) -> jnp.dtype:
        return policy.compute_dtype(self.compute)

    def inputs(self) -> context_lib.Inputs:
        """The batch as a layer sees it: only shapes."""
        return context_lib.Inputs(*(jax.ShapeDtypeStruct((self.rows, self.tokens), jnp.int32) for _ in range(4)))  # type: ignore[arg-type]


def of_layer(config: model_config.ModelConfig, kind: str, *, place: Place) -> Kept:
    """What one layer of a kind keeps. (Hash-routed layers keep a little less; they are taken for learned ones.)"""
    return _of_layer(config.model_dump_json(), kind, place)


@functools.lru_cache(maxsize=256)
def _of_layer(model: str, kind: str, place: Place) -> Kept:
    config = model_config.ModelConfig.model_validate_json(model)
    layer = block_lib.Block(config, block_lib.LayerSpec(kind, hashed=False))
    streams = jax.ShapeDtypeStruct((place.rows, place.tokens, config.hyper.streams, config.hidden), place.dtype)
    inside = _saved(layer, "none", streams, config=config, place=place, fused=True) - _experts(model, place, True)
    if config.remat == "full":  # its input and nothing else
        return Kept(streams.size * streams.dtype.itemsize, inside)
    saved = _saved(layer, config.remat, streams, config=config, place=place, fused=False)
    return Kept(saved - (_experts(model, place, False) if config.remat == "none" else 0), inside)


def _saved(
    layer: block_lib.Block, remat: str, streams: jax.ShapeDtypeStruct, *, config: model_config.ModelConfig, place: Place, fused: bool
) -> int:
    def run(params: dict, streams: jax.Array, inputs: context_lib.Inputs):
        return stack.remember(param.bind(layer, params), policy=remat)(streams, context_lib.make(inputs, config=config))

    def kept(params: dict, streams: jax.Array, inputs: context_lib.Inputs):
        with _formats(place.compute):
            return jax.vjp(lambda p, x: run(p, x, inputs)[0], params, streams)[1]

    return residual_bytes(kept, _weights(layer, place=place), streams, place.inputs(), own=1, fused=fused)


@functools.lru_cache(maxsize=256)
def _experts(model: str, place: Place, fused: bool) -> int:
    config = model_config.ModelConfig.model_validate_json(model)
    experts = moe.RoutedExperts(config)
    rows, tokens, k = place.rows, place.tokens, config.moe.top_k
    routing = router.Routing(
        experts=jax.ShapeDtypeStruct((rows, tokens, k), jnp.int32),  # type: ignore[arg-type]
        weights=jax.ShapeDtypeStruct((rows, tokens, k), jnp.float32),  # type: ignore[arg-type]
        load=jax.ShapeDtypeStruct((len(model_config.MODALITIES), config.moe.experts), jnp.float32),  # type: ignore[arg-type]
        balance_loss=jax.ShapeDtypeStruct((), jnp.float32),  # type: ignore[arg-type]
    )
    x = jax.ShapeDtypeStruct((rows, tokens, config.hidden), place.dtype)

    def kept(params: dict, x: jax.Array, routing: router.Routing):
        def output(params: dict, x: jax.Array, weights: jax.Array):
            return param.bind(experts, params)(x, routing._replace(weights=weights))

        with _formats(place.compute):
            return jax.vjp(output, params, x, routing.weights)[1]

    return residual_bytes(kept, _weights(experts, place=place), x, routing, own=3, fused=fused)


@contextlib.contextmanager
def _formats(config: numerics_config.NumericsConfig) -> Iterator[None]:
    """What is traced inside has the products of the recipe, emulated."""
    with contextlib.ExitStack() as entered:
        for role in ("linear", "experts"):
            if getattr(config, role) != "compute":
                entered.enter_context(select.using(f"{role}_product", implementation=products.Fp8(None)))
            entered.enter_context(select.using(f"fp8_{role}", implementation="emulated"))
        yield


def of_media(config: model_config.ModelConfig, *, patches: int, frames: int, place: Place) -> int:
    """What the stems of images and audio keep for the backward pass."""
    total = 0
    width, dtype = config.hidden, place.dtype.itemsize
    if config.image is not None:
        total += place.rows * patches * (3 * config.image.patch**2 * (dtype + 4) + 2 * width * dtype * 2 + width * (4 + dtype))
    if config.audio is not None:
        total += place.rows * frames * (config.audio.bins * config.audio.levels + width * 2) * dtype
    return total


def of_collapse(config: model_config.ModelConfig, *, place: Place) -> int:
    """What the collapse of the streams before the head keeps."""
    collapse = hyper_connections.collapse(config)
    streams = jax.ShapeDtypeStruct((place.rows, place.tokens, config.hyper.streams, config.hidden), place.dtype)
    return residual_bytes(
        lambda p, x: jax.vjp(lambda p, x: param.bind(collapse, p)(x), p, x)[1], _weights(collapse, place=place), streams, own=1
    )


def _weights(module, *, place: Place) -> dict:
    """Parameters of a module as its forward pass gets them."""

    def struct(_: str, d: param.Declaration) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(d.shape, place.dtype if d.precision == "compute" else d.dtype)

    return param.map_declarations(struct, param.declarations(module))


def residual_bytes(function, *arguments, own: int, fused: bool = False) -> int:
    """Bytes of what a function returns, without those of its arguments that it returns as they are.

    Args:
        function: of pytrees of arrays; only traced.
        arguments: shapes.
        own: which of the arguments do count if they are returned (the input of a layer is kept; its weights are there anyway).
        fused: count of an array that is cheap to make again only what it is made of, as a compiler that fuses does.
    """
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
    counted = set(traced.invars[sum(sizes[:own]) : sum(sizes[: own + 1])])
    free = set(traced.invars) - counted
    kept = {v for v in traced.outvars if isinstance(v, extend.core.Var)}
    if fused:
        kept = _cheapest(traced, kept, free=free)
    return sum(_bytes(v) for v in kept - free)


def _cheapest(jaxpr, wanted: set, *, free: set) -> set:
    """The smallest arrays from which all wanted ones follow by cheap operations."""
    maker = {v: equation for equation in jaxpr.eqns for v in equation.outvars}

    @functools.cache
    def sources(v) -> frozenset:
        if v not in maker or not _is_cheap(maker[v]):
            return frozenset((v,))
        found = frozenset().union(*(sources(x) for x in maker[v].invars if isinstance(x, extend.core.Var)))
        return found if sum(_bytes(x) for x in found - free) <= _bytes(v) else frozenset((v,))

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 4 * len(jaxpr.eqns) + 1000))
    try:
        return set().union(*(sources(v) for v in wanted))
    finally:
        sys.setrecursionlimit(limit)


def _is_cheap(equation) -> bool:
    inner = [
        x for value in equation.params.values() for x in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")) if hasattr(x, "eqns")
    ]
    if inner:
        return equation.primitive.name in _CALLS and all(_is_cheap(e) for jaxpr in inner for e in jaxpr.eqns)
    return equation.primitive.name not in _COSTLY and not equation.primitive.name.startswith(("reduce_", "scatter", "cum", "all_", "arg"))


def _bytes(v) -> int:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize
