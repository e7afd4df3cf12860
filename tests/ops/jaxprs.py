"""Looks into traced programs, the bodies of their loops included."""

from collections.abc import Callable, Iterator

import jax
import numpy as np


def equations(jaxpr) -> Iterator:
    """All equations, those of scans, conditionals and recomputed functions included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(inner)


def largest_result(function: Callable, *arguments) -> int:
    """Elements of the largest array that the program ever makes. Arguments may be `jax.ShapeDtypeStruct`s."""
    traced = jax.make_jaxpr(function)(*arguments)
    return max(int(np.prod(out.aval.shape)) for equation in equations(traced) for out in equation.outvars)
