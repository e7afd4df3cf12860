"""Optimizers made of `optax`'s transforms, named in a recipe.

::

    transforms: [{name: scale_by_adam, args: {b2: 0.95}}]        update = -lr (adam + weight_decay param)
    transforms: [{name: lion}]                                   lion's own, given the schedule, the decay and its mask

The learning rate, the weight decay and which parameters decay are always the recipe's, whatever the transforms are, so two optimizers
differ in what they are meant to differ in. A name or an argument that optax does not have is refused when the optimizer is made; so is a
transform that needs what a recipe cannot give (another transform, a function, the loss's value).

Optax works leaf by leaf, on the arrays as they are stored, and its states are sharded like the parameters whose paths they carry
(`train.state`). `optax.contrib.muon` is told which parameters are matrices, so it takes stacked layers and experts one by one (left alone
it would give every array of three dimensions to Adam). It is not divided among devices as this framework's Muon is (`stacking`).
"""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from v4train.config import explain
from v4train.core import param
from v4train.optim import groups, schedule
from v4train.optim.config import OptaxConfig, TransformConfig

_OURS = ("learning_rate", "weight_decay", "mask", "weight_decay_mask", "adam_weight_decay", "muon_weight_dimension_numbers")
"""Arguments that a recipe gives by its own keys."""


@dataclasses.dataclass(frozen=True)
class _Given:
    """What the recipe's own keys give to a transform that takes it."""

    rate: Callable
    weight_decay: float
    mask: dict
    matrices: dict


def transformation(
    config: OptaxConfig,
    declarations: dict,
    *,
    total_steps: int,
    trainable: Callable[[str, param.Declaration], bool] | None = None,
) -> optax.GradientTransformation:
    """The named transforms, then what they leave out of decay and learning rate.

    Args:
        config: the names, and the recipe's own keys. ``clip_norm`` is not applied here.
        declarations: nested dict of trained parameters, as the model declares them.
        total_steps: updates in the whole run, for the schedule.
        trainable: of a path and its declaration, whether the parameter moves (None: all do). One that does not move gets no update, but the
            transforms see its gradient.

    Raises:
        ValueError: the schedule does not fit into ``total_steps``; a name or an argument is unknown; optax refuses the values; a
            transform needs more than gradients and parameters.
    """
    config.schedule.check(total_steps)
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))
    matrices = param.map_declarations(lambda _, d: matrix if d.group == "muon" else None, declarations)
    declarations = groups.assign(config, declarations)
    mask = param.map_declarations(lambda _, d: d.decay, declarations)
    rate = _rate(config, total_steps)
    functions = [_function(one, i) for i, one in enumerate(config.transforms)]
    rated = [one.name for one, f in zip(config.transforms, functions, strict=True) if "learning_rate" in _parameters(f)]
    decayed = [one.name for one, f in zip(config.transforms, functions, strict=True) if _takes_decay(f)]
    for names, what in ((rated, "a learning rate"), (decayed, "a weight decay")):
        if len(names) > 1:
            raise ValueError(f"optimizer.transforms: {' and '.join(names)} each take {what}; name one of them")
    given = _Given(rate, config.weight_decay, mask, matrices)
    parts = [_made(f, one, i, given) for i, (one, f) in enumerate(zip(config.transforms, functions, strict=True))]
    if not decayed and config.weight_decay:
        parts.append(optax.add_decayed_weights(_after(rate, config.weight_decay) if rated else config.weight_decay, mask))
    if not rated:
        parts.append(optax.scale_by_learning_rate(rate))
    parts.append(_freeze(param.map_declarations(trainable or (lambda *_: True), declarations)))
    whole = optax.chain(*parts)
    _try(whole, declarations, names=[one.name for one in config.transforms])
    return whole


def available() -> list[str]:
    """The names that a recipe can give: transforms that need no argument but a learning rate."""
    return sorted({name for module in (optax.contrib, optax) for name in _transforms(module) if not _needs(getattr(module, name))})


def _transforms(module: types.ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        if not name.startswith("_") and inspect.isfunction(value) and "GradientTransformation" in str(_signature(value).return_annotation):
            yield name


def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(_signature(function).parameters)


def _needs(function: Callable) -> list[str]:
    """Required arguments other than those that the recipe's own keys give."""
    parameters = _parameters(function)
    given = set(_OURS) if "weight_decay" in parameters else {"learning_rate"}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in parameters.items() if name not in given and (p.default is inspect.Parameter.empty or p.kind in variadic)]


def _takes_decay(function: Callable) -> bool:
    """Whether decay and mask can go into it. `optax.contrib.muon` has a mask for its matrices only."""
    parameters = set(_parameters(function))
    return "weight_decay" in parameters and bool({"mask", "weight_decay_mask"} & parameters) and "adam_weight_decay" not in parameters


def _function(one: TransformConfig, place: int) -> Callable[..., Any]:
    for module in (optax, optax.contrib):
        if one.name in _transforms(module):
            return getattr(module, one.name)
    names = available()
    raise ValueError(
        f"optimizer.transforms.{place}.name = {one.name}: optax {optax.__version__} has no such transform"
        f"{explain.nearest(one.name, names)} (allowed: {', '.join(names)})"
    )


def _made(function: Callable[..., Any], one: TransformConfig, place: int, given: _Given) -> optax.GradientTransformation:
    """One transform, of its own arguments and of what the recipe gives."""
    path, parameters = f"optimizer.transforms.{place}", _parameters(function)
    allowed = [name for name in parameters if name not in _OURS]
    for name in one.args:
        if name in _OURS:
            origins = {"learning_rate": "optimizer.schedule", "muon_weight_dimension_numbers": "the model's declarations"}
            origin = origins.get(name, "optimizer.weight_decay and optimizer.decays")
            raise ValueError(f"{path}.args.{name}: comes from {origin}; remove it here")
        if name not in allowed:
            listed = ", ".join(allowed) or "none"
            raise ValueError(f"{path}.args.{name}: {one.name} has no such argument{explain.nearest(name, allowed)} (allowed: {listed})")
    ours: dict[str, Any] = {"learning_rate": given.rate} if "learning_rate" in parameters else {}
    if "weight_decay" in parameters:
        ours["weight_decay"] = given.weight_decay if _takes_decay(function) else 0.0
        ours |= {name: given.mask for name in ("mask", "weight_decay_mask") if name in parameters}
    if "muon_weight_dimension_numbers" in parameters:
        ours["muon_weight_dimension_numbers"] = given.matrices
    missing = [name for name in _needs(function) if name not in one.args]
    if missing:
        raise ValueError(f"{path}: {one.name} needs {', '.join(missing)}; give it in args if it is a number or a text, or name another")
    try:
        return function(**ours, **{name: _value(value) for name, value in one.args.items()})
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: optax refuses {one.name}({one.args}): {e}") from e


def _value(value: Any) -> Any:
    return tuple(map(_value, value)) if isinstance(value, list) else value


def _rate(config: OptaxConfig, total_steps: int) -> Callable:
    return lambda count: schedule.learning_rate(config.schedule, step=count, total_steps=total_steps)


def _after(rate: Callable, weight_decay: float) -> Callable:
    """Decay that is added to a finished update."""
    return lambda count: -weight_decay * rate(count)


def _freeze(moves: dict) -> optax.GradientTransformation:
    """It is always there, so that the state has one structure whatever moves."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, live: u if live else jnp.zeros_like(u), updates, moves))


def _try(whole: optax.GradientTransformation, declarations: dict, *, names: list[str]) -> None:
    """One update, traced: what fails here would fail in the training step.

    Raises:
        ValueError: it does.
    """
    params = param.map_declarations(lambda _, d: d.struct, declarations)
    said = f"optimizer.transforms ({', '.join(names)})"
    try:
        state = jax.eval_shape(whole.init, params)
        updates, after = jax.eval_shape(whole.update, params, state, params)
    except (TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as e:
        raise ValueError(
            f"{said} cannot be used in a recipe: a training step gives them gradients and parameters, no more. Optax says: {e}"
        ) from e
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (updates, params, after, state)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3]:
        raise ValueError(f"{said}: updates or state change their shape or type from one step to the next; name others")
