"""What FP8 makes of a step's time and memory, by role: only where this program multiplies codes is FP8 faster.

`numerics.linear` and `numerics.experts` say in which format a role's products are; by which units they are computed, `ops.select` says:

* ``codes``: a kernel multiplies the codes in FP8 units. Products take their share of the chip's FP8 peak;
* ``emulated``: rounded values are multiplied in the compute dtype. Products take what they take without FP8.

Both must round first, which is work for the memory: every factor is read in the compute dtype and written as codes of a byte, or as
rounded values. Per product and token the input is rounded once a forward pass (by width), once more for the gradient of the weights (by
tokens), and the output's gradient twice (for either gradient). Weights have been rounded with the cast that every step does; kernels want
their codes in each pass. Nothing rounded is kept from the forward to the backward pass: what a layer keeps is what it keeps without FP8, in
the compute dtype (`ops.products`), so of memory only the rounded factors of one product at a time come on top.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from v4train import recipe as recipe_lib
from v4train.core import hardware
from v4train.ops import select
from v4train.plan import machine, weights

ROLES: dict[str, str] = {"linear": "projections and shared experts", "experts": "routed experts"}
"""Key of `numerics` -> what its products are with."""
_ROWS = {"linear": "fp8_linear", "experts": "fp8_experts"}
_SCALES = 1 + 4 / 128
"""Bytes of a code and of its part of an fp32 scale for 128 of them."""


@dataclasses.dataclass(frozen=True)
class Role:
    """Products of one role.

    Attributes:
        name: key of `ROLES`.
        form: of the recipe's `numerics`: ``compute``, ``fp8`` or ``mxfp4``.
        units: that compute them.
    """

    name: str
    form: str
    units: Literal["compute", "codes", "emulated"]


def of(recipe: recipe_lib.Recipe, *, platform: str) -> dict[str, Role]:
    """The roles of a recipe on a platform."""
    found = {}
    for name in ROLES:
        form = getattr(recipe.numerics, name)
        kernel = not recipe.numerics.emulate and select.implementation(_ROWS[name], platform=platform) != "emulated"
        found[name] = Role(name, form, "compute" if form == "compute" else "codes" if kernel else "emulated")
    return found


def check(recipe: recipe_lib.Recipe, *, on: machine.Machine, platform: str) -> None:
    """Refuses a chip that the kernels for codes are not for.

    Raises:
        ValueError: with the setting that does without them.
    """
    for role in of(recipe, platform=platform).values():
        if role.units == "codes" and not hardware.multiplies_codes(on.name):
            raise ValueError(
                f"numerics.{role.name} is {role.form}, whose kernels are for NVIDIA's Hopper and Blackwell, and {on.option} has {on.name}: "
                f"set numerics.emulate=true to multiply rounded values in the compute dtype, or numerics.{role.name}=compute"
            )


def product_flops(placed: Iterable[weights.Weight], name: str, *, top_k: int) -> float:
    """Of a forward pass and token, of all layers: two for each element of the role's matrices that a token meets."""
    return sum(2.0 * w.declaration.size * _share(w, top_k) for w in placed if w.declaration.product == name)


def rounding_bytes(
    placed: Iterable[weights.Weight], role: Role, *, top_k: int, width: int, forward: int, backward: bool, tokens: int, microbatches: int
) -> float:
    """Memory traffic of rounding, of all microbatches of a step on one device.

    Args:
        placed: the parameters on the mesh.
        role: whose products.
        top_k: experts of a token.
        width: bytes of the compute dtype.
        forward: passes, recomputation included.
        backward: whether there is a backward pass.
        tokens: of a device, of all microbatches.
        microbatches: of a step.
    """
    if role.units == "compute":
        return 0.0
    each, total = width + (_SCALES if role.units == "codes" else width), 0.0
    for w in placed:
        if w.declaration.product != role.name:
            continue
        copies = w.declaration.size / math.prod(w.declaration.shape[-2:]) * _share(w, top_k)  # matrices that a token meets, over all layers
        size_in, size_out = w.declaration.shape[-2:]
        total += tokens * copies * each * (forward * size_in + backward * (size_in + 2 * size_out))
        if role.units == "codes":
            total += microbatches * (forward + backward) * w.used * each
    return total


def product_bytes(placed: Iterable[weights.Weight], role: Role, *, width: int, tokens: int, rows: int) -> float:
    """Bytes of the rounded factors of the largest product of one layer on one device.

    Args:
        placed: the parameters on the mesh.
        role: whose products.
        width: bytes of the compute dtype.
        tokens: of a microbatch on the device.
        rows: room for rows that arrive at the device's experts.
    """
    if role.units == "compute":
        return 0.0
    codes, most = role.units == "codes", 0.0
    for w in placed:
        if w.declaration.product != role.name:
            continue
        matrices = w.used / w.layers / math.prod(w.declaration.shape[-2:])  # that the device multiplies with in a layer
        size_in, size_out = w.declaration.shape[-2:]
        many = rows if w.routed else tokens * matrices
        matrix = matrices * size_in * size_out if codes else 0.0  # emulated, the weights are those that the layer has
        most = max(most, many * size_in + matrix, many * size_out + matrix, many * (size_in + size_out))
    return most * (_SCALES if codes else width)


def words(recipe: recipe_lib.Recipe, *, on: machine.Machine, platform: str, share: float) -> str:
    """What a plan assumes of the roles in low precision, in a line; "" without any.

    Args:
        recipe: all settings.
        on: the machine.
        platform: the column of `ops.select`.
        share: `timing.Assumptions.fp8`.
    """
    told = []
    for role in of(recipe, platform=platform).values():
        form = {"fp8": "FP8", "mxfp4": "FP4 expanded to FP8"}.get(role.form, "")
        if role.units == "codes":
            peak = f"{on.chip.fp8_flops / 1e12:,.0f} TFLOP/s"
            told.append(f"{ROLES[role.name]} in {form} by kernels that were never run, at {share:.0%} of the shares above of {peak}")
        elif role.units == "emulated":
            told.append(f"{ROLES[role.name]} in {form} emulated: multiplied in {recipe.numerics.compute}, and rounded before")
    return f"Low precision: {'; '.join(told)}." if told else ""


def _share(w: weights.Weight, top_k: int) -> float:
    """Of a parameter's elements, those that one token meets."""
    experts = w.declaration.axes.index("experts") if w.routed else None
    return 1.0 if experts is None else top_k / w.declaration.shape[experts]
