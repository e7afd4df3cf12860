"""Matrix products of activations with a parameter, in the formats that the parameter's declaration asks for.

A declaration says whose formats it has (`Declaration.product`), the recipe's `numerics` says what these are, and model code says neither.
"""

from flax import nnx
from jaxtyping import Array, Float

from v4train.core import axes, param
from v4train.ops import products, select


def formats(weight: nnx.Param) -> products.Formats:
    """The formats of products with a parameter."""
    declaration: param.Declaration = weight.get_metadata()["declaration"]
    chosen = "compute" if declaration.product == "high" else select.implementation(f"{declaration.product}_product")
    return products.Compute() if chosen == "compute" else chosen


def times(x: Float[Array, "b s *g d"], weight: nnx.Param) -> Float[Array, "b s *g f"]:
    """``x @ weight``, for a matrix ``[d, f]`` or one for each group, ``[g, d, f]``."""
    w, declaration = weight[...], weight.get_metadata()["declaration"]
    return formats(weight).linear(x, w, letters=axes.letters(declaration.axes[len(declaration.axes) - w.ndim :]))
