"""Optimizers of optax's transforms: their steps, what a recipe gives them, what is refused; and the hybrid inside of `optax.chain`."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from v4train.core import param
from v4train.optim import config as config_lib
from v4train.optim import flops, hybrid, named, optimizer, schedule

SCHEDULE = {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay_steps": 3}
TOTAL = 8


def declare(*shape, tag="", **options):
    return param.Declaration(shape, (None,) * len(shape), param.Normal(0.5), tags=frozenset({tag} - {""}), **options)


DECLARATIONS = {
    "embed": declare(16, 8, group="adamw"),
    "blocks": {"w": declare(2, 8, 4), "sink": declare(2, 3, tag="sink", group="adamw", decay=False)},
}
PEAK = 1e-2


def config(*transforms, **changes):
    given = [{"name": one} if isinstance(one, str) else {"name": one[0], "args": one[1]} for one in transforms]
    return config_lib.OptaxConfig(kind="optax", schedule=SCHEDULE, transforms=given, **changes)


def make(*transforms, trainable=None, **changes):
    return optimizer.make(config(*transforms, **changes), DECLARATIONS, total_steps=TOTAL, trainable=trainable)


def rate(step):
    return schedule.learning_rate(config_lib.ScheduleConfig(**SCHEDULE), step=step, total_steps=TOTAL)


def train(transformation, steps=3):
    params = param.initialise(DECLARATIONS, 0)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for step in range(steps):
        updates, state = update(param.initialise(DECLARATIONS, 100 + step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


DECAYS = param.map_declarations(lambda _, d: d.decay, DECLARATIONS)


@pytest.mark.parametrize(
    "transform", [("scale_by_adam", {"b2": 0.95, "eps": 1e-20}), ("adamw", {"b2": 0.95, "eps": 1e-20})], ids=["part", "whole"]
)
def test_adam_by_name_is_the_hybrid_without_muon(transform):
    expected = hybrid.hybrid(config_lib.OptimizerConfig(schedule=SCHEDULE, muon=None), DECLARATIONS, total_steps=TOTAL)
    same(train(make(transform)), train(expected))


def test_an_optimizer_without_decay_is_given_ours_afterwards():
    """sgd by hand: w <- w - lr (g + 0.1 w), without the second term for sinks."""
    params = param.initialise(DECLARATIONS, 0)
    for step in range(3):
        gradients = param.initialise(DECLARATIONS, 100 + step)
        directions = jax.tree.map(lambda w, g, d: g + 0.1 * w * d, params, gradients, DECAYS)
        params = optax.tree.add_scale(params, -rate(step), directions)
    same(train(make("sgd")), params)
    same(train(make("identity")), params)


def test_the_recipes_keys_reach_the_transforms():
    same(train(make("lion", weight_decay=0.3)), train(optax.lion(rate, weight_decay=0.3, mask=DECAYS)))
    everything = jax.tree.map(lambda _: True, DECAYS)
    same(train(make("lion", decays={"sinks": True})), train(optax.lion(rate, weight_decay=0.1, mask=everything)))
    same(train(make("lion", weight_decay=0.0)), train(optax.lion(rate, weight_decay=0.0)))


def test_order_and_lists_are_kept():
    found = train(make(("clip", {"max_delta": 0.1}), ("trace", {"decay": 0.9, "nesterov": True}), weight_decay=0))
    same(found, train(optax.chain(optax.clip(0.1), optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(rate))))
    table = [[3.4445, -4.775, 2.0315]] * 8 + [[2.0, -1.5, 0.5]] * 2
    assert jax.tree.leaves(train(make(("muon", {"ns_coeffs": table, "ns_steps": 10})), 1))


def test_muon_of_optax_takes_each_declared_matrix_alone():
    """The directions of the singular value decomposition, decay included, for the stacked matrices; Adam's for the others."""
    table = [[3.4445, -4.775, 2.0315]] * 8 + [[2.0, -1.5, 0.5]] * 2
    transformation = make(("muon", {"ns_coeffs": table, "ns_steps": 10, "consistent_rms": 0.18, "nesterov": False}))
    params, gradients = param.initialise(DECLARATIONS, 0), param.initialise(DECLARATIONS, 1)
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    for w, gradient, update in zip(*(np.asarray(x["blocks"]["w"], np.float64) for x in (params, gradients, updates)), strict=True):
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        np.testing.assert_allclose(update, -float(rate(0)) * (0.18 * 8**0.5 * u @ v + 0.1 * w), atol=1e-4)
    np.testing.assert_allclose(updates["embed"], -rate(0) * (np.sign(gradients["embed"]) + 0.1 * params["embed"]), rtol=1e-4)
    np.testing.assert_allclose(updates["blocks"]["sink"], -rate(0) * np.sign(gradients["blocks"]["sink"]), rtol=1e-4)


def test_what_does_not_train_stands_still_and_the_state_is_the_same():
    moving, some = make("adamw"), make("adamw", trainable=lambda path, d: path == "blocks/w")
    params = param.initialise(DECLARATIONS, 0)
    assert jax.tree.structure(moving.init(params)) == jax.tree.structure(some.init(params))
    updates, _ = some.update(params, some.init(params), params)
    assert not np.any(updates["embed"])
    assert not np.any(updates["blocks"]["sink"])
    assert np.all(updates["blocks"]["w"])


@pytest.mark.parametrize(
    "transforms, message",
    [
        ([("scale_by_adm", {})], r"optimizer\.transforms\.0\.name = scale_by_adm: .*did you mean `scale_by_adam`\? \(allowed: .*lion"),
        (
            [("clip", {"max_delta": 1.0}), ("lion", {"mu_type": "float32"})],
            r"optimizer\.transforms\.1\.args\.mu_type: lion has no such .*did you mean `mu_dtype`\? \(allowed: b1, b2, mu_dtype\)",
        ),
        ([("adamw", {"learning_rate": 0.1})], r"args\.learning_rate: comes from optimizer\.schedule"),
        ([("adamw", {"mask": True})], r"args\.mask: comes from optimizer\.weight_decay and optimizer\.decays"),
        ([("adamw", {}), ("sgd", {})], r"adamw and sgd each take a learning rate; name one of them"),
        ([("muon", {"muon_weight_dimension_numbers": 1})], r"comes from the model's declarations; remove it here"),
        ([("scale_by_muon", {})], r"\(scale_by_muon\) cannot be used in a recipe"),
        ([("clip", {})], r"optimizer\.transforms\.0: clip needs max_delta; give it in args"),
        ([("masked", {})], r"masked needs inner"),
        ([("freeze", {})], r"freeze needs mask"),
        ([("chain", {})], r"chain needs args"),
        ([("scale_by_polyak", {})], r"\(scale_by_polyak\) cannot be used in a recipe: .*no more. Optax says: .*value"),
        ([("scale_by_adam", {"mu_dtype": "float33"})], r"optimizer\.transforms\.0: optax refuses scale_by_adam\(.*float33"),
    ],
    ids=lambda x: x[-1][0] if isinstance(x, list) else "",
)
def test_refusals_name_path_and_remedy(transforms, message):
    with pytest.raises(ValueError, match=message):
        make(*transforms)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into a run of 4 steps"):
        optimizer.make(config("lion"), DECLARATIONS, total_steps=4)


def test_every_listed_name_can_be_used_or_says_why_not():
    """A listed transform works in a recipe as it stands, or needs what a step has not."""

    def refusal(name):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(name)
        except ValueError as e:
            return str(e)
        return ""

    messages = {name: refusal(name) for name in named.available()}
    refused = {name for name, message in messages.items() if message}
    assert all(name in messages[name] for name in refused)
    assert {"adam", "adamw", "lion", "adafactor", "scale_by_adam", "scale_by_sm3", "muon", "adopt"} <= set(named.available()) - refused
    assert len(refused) < len(named.available()) / 4, sorted(refused)


def test_the_hybrid_composes_like_any_transform():
    inner = hybrid.hybrid(config_lib.OptimizerConfig(schedule=SCHEDULE), DECLARATIONS, total_steps=TOTAL)
    doubled = optax.chain(optax.clip(10.0), inner, optax.scale(2.0))
    params, gradients = param.initialise(DECLARATIONS, 0), param.initialise(DECLARATIONS, 1)
    once, _ = inner.update(gradients, inner.init(params), params)
    twice, state = jax.jit(doubled.update)(gradients, doubled.init(params), params)
    same(twice, jax.tree.map(lambda x: 2 * x, once))
    skipping = optax.apply_if_finite(doubled, max_consecutive_errors=3)
    broken = gradients | {"embed": jnp.full((16, 8), jnp.nan)}
    held, _ = skipping.update(broken, skipping.init(params), params)
    assert not any(map(np.any, jax.tree.leaves(held)))
    averaged = optax.MultiSteps(inner, every_k_schedule=2)
    first, waiting = averaged.update(gradients, averaged.init(params), params)
    second, _ = averaged.update(gradients, waiting, params)
    assert not any(map(np.any, jax.tree.leaves(first)))
    same(second, once)
    del state


def test_flops_of_named_transforms_are_counted_from_their_trace():
    size = sum(d.size for d in param.flatten(DECLARATIONS).values())
    adam, lion = (flops.update(config(name, weight_decay=0), DECLARATIONS) for name in ("scale_by_adam", "scale_by_lion"))
    assert adam.newton_schulz == lion.newton_schulz == 0
    assert 13 * size <= adam.elementwise <= 20 * size
    assert lion.elementwise < adam.elementwise
    matrices = {"w": declare(3, 6, 10), "b": declare(6, group="adamw")}
    muon = flops.update(config(("muon", {"ns_steps": 5}), weight_decay=0), matrices)
    assert muon.newton_schulz == 3 * flops.newton_schulz((6, 10), steps=5)


def test_names_are_unique_in_the_list():
    assert all(a < b for a, b in itertools.pairwise(named.available()))
