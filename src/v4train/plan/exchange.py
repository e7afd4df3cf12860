"""Routed tokens on their way: the rows that the expert exchange makes room for, and the bytes that it sends.

A device has T tokens of a microbatch; each goes to k experts, so there are T k *slots*. They travel in waves, between the ep devices
of a group, by one of three transports (`ops.exchange.route`):

| transport | room on a device, rows per wave                     | sent by a device, one way, per pass                  |
| ragged    | ep C, C rows for each pair of devices               | slots (ep - 1) / ep rows: only what is routed        |
| padded    | ep C                                                | waves (ep - 1) C rows                                |
| gathered  | ep C, and the ep T tokens                           | (ep - 1) T rows; the way back in fp32                |

The CPU's ``emulated`` twin of ``ragged`` has its buffers and sends as ``padded`` does.

A layer's forward pass has a way there and a way back, its backward pass likewise; the indexer's warm-up has no such backward pass. A layer
that is computed again travels again, and once more if there are waves: each is computed again on its own, so that only two of them are in
memory. A balanced load is assumed: rounds for what does not fit at first send more.
"""

import dataclasses
import math
from typing import Any

from v4train import recipe as recipe_lib
from v4train.numerics import policy
from v4train.ops import select
from v4train.ops.exchange import route
from v4train.sharding import mesh as mesh_lib
from v4train.sharding import rules


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange of one layer and one microbatch, on one device.

    Attributes:
        transport: as the table calls it; ``none`` on one device.
        axes: mesh axes that the experts are on.
        devices: along them.
        rows: room for rows that arrive in a wave.
        bytes: of all buffers while the layer's backward pass runs.
        saved: bytes that a layer without remat keeps.
        sent: bytes that a device sends in a pass, there and back together.
        passes: of a training step over the layer.
        waves: chunks of tokens, one after the other.
    """

    transport: str
    axes: tuple[str, ...]
    devices: int
    rows: int
    bytes: float
    saved: float
    sent: float
    passes: int
    waves: int


def of(recipe: recipe_lib.Recipe, *, platform: str, tokens: int) -> Exchange:
    """The exchange of a recipe.

    Args:
        recipe: all settings.
        platform: ``cpu``, ``gpu`` or ``tpu``; it decides the transport unless the recipe names one.
        tokens: of a microbatch on one device.
    """
    model, moe, setting = recipe.model, recipe.model.moe, recipe.model.moe.exchange
    transport = setting.transport or select.implementation("expert_exchange", platform=platform)
    if transport == "ragged":
        transport = select.implementation("ragged_all_to_all", platform=platform)
    mesh: Any = mesh_lib.abstract(recipe.mesh)
    axes = rules.names(rules.spec(("experts",), shape=None, mesh=mesh)[0])
    ep = math.prod(recipe.mesh.sizes[name] for name in axes)
    width, d, f = policy.compute_dtype(recipe.numerics).itemsize, model.hidden, moe.ffn // recipe.mesh.tensor
    waves = min(setting.waves, tokens)
    slots = math.ceil(tokens / waves) * moe.top_k
    per_pair = route.Exchange(axes, transport, capacity=setting.capacity).rows_per_pair(slots, devices=ep)
    rows, extra, sent = ep * per_pair, 0, 0.0
    if ep == 1:
        rows = slots
    elif transport == "gathered":
        extra = 2 * ep * math.ceil(tokens / waves) * d
        sent = (ep - 1) * tokens * d * (width + 4)
    elif transport in ("padded", "emulated"):
        sent = 2 * waves * (ep - 1) * per_pair * d * width
    else:
        sent = 2 * tokens * moe.top_k * (ep - 1) / ep * d * width
    once = rows * (2 * d + 3 * f) + extra
    return Exchange(
        transport="none" if ep == 1 else transport,
        axes=axes,
        devices=ep,
        rows=rows,
        bytes=(2 * once + 2 * slots * d) * width * min(waves, 2),
        saved=(rows * (d + 3 * f) + 2 * slots * d) * width if waves == 1 else 0.0,
        sent=sent,
        passes=(1 if model.warming_up else 2) + (model.remat != "none") + (waves > 1),
        waves=waves,
    )
