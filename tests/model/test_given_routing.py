"""Routing that was chosen elsewhere: the selection is foreign, everything else is the router's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import router, transformer
from v4train.train import loss

CONFIG = small.config("window", "csa", "csa", mtp={}, moe={"top_k": 3, "scaling": 2.5}, remat="full")
LAYOUT = [[(9, 0, "ttiia"), (11, 3, "t")], [(17, 0, "ita")]]


@pytest.fixture(scope="module")
def rows():
    return small.batch(LAYOUT, length=24)


@pytest.fixture(scope="module")
def inputs(rows):
    return loss.model_inputs(rows, config=CONFIG)


@pytest.fixture(scope="module")
def forward():
    abstract = transformer.Transformer(CONFIG)

    @small.jit
    def run(params, inputs, given):
        return param.bind(abstract, params)(inputs, given=given, keep_experts=True)

    return run


def test_weights_load_and_balance_of_given_experts_are_those_of_current_affinities(rows, inputs):
    layer = router.Router(CONFIG, hashed=False)
    params = small.draw(param.declarations(layer))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 24, 32)).astype(np.float32) * 2
    given = np.argsort(rng.random((2, 24, 8)), axis=-1)[..., :3]
    routing = param.bind(layer, params)(x, inputs, jnp.asarray(given))
    real = rows.segment_ids > 0
    affinity = np.sqrt(np.log1p(np.exp(x.astype(np.float64) @ np.asarray(params["gate"], np.float64))))
    chosen = np.take_along_axis(affinity, given, axis=-1)
    np.testing.assert_array_equal(routing.experts[real], given[real])
    assert (np.asarray(routing.experts)[~real] == 8).all()
    assert not np.asarray(routing.weights)[~real].any()
    np.testing.assert_allclose(routing.weights[real], (chosen / chosen.sum(-1, keepdims=True) * 2.5)[real], rtol=1e-5)
    counts = np.zeros((3, 8))
    balance = 0.0
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        of = rows.segment_ids[row] == segment
        tokens, share = of.sum(), (affinity / affinity.sum(-1, keepdims=True))[row][of]
        picks = np.bincount(given[row][of].ravel(), minlength=8)
        balance += tokens * 8 / (3 * tokens**2) * float((picks * share.sum(0)).sum())
    for at in np.argwhere(real):
        counts[rows.modality[tuple(at)], given[tuple(at)]] += 1
    np.testing.assert_array_equal(routing.load, counts)
    np.testing.assert_allclose(routing.balance_loss, balance, rtol=1e-5)


def test_a_routers_own_choice_given_back_changes_nothing(inputs):
    for hashed in (False, True):
        layer = router.Router(CONFIG, hashed=hashed)
        bound = param.bind(layer, small.draw(param.declarations(layer)))
        x = np.random.default_rng(2).standard_normal((2, 24, 32)).astype(np.float32)
        own = bound(x, inputs)
        jax.tree.map(np.testing.assert_array_equal, bound(x, inputs, own.experts), own)


def test_the_routing_of_one_model_is_used_by_another_in_every_layer(forward, inputs):
    here, there = small.parameters(CONFIG, seed=0), small.parameters(CONFIG, seed=1)
    own, foreign = forward(here, inputs, None), forward(there, inputs, None)
    assert jax.tree.structure(own.experts) == jax.tree.structure(own.loads)
    same = forward(here, inputs, own.experts)
    jax.tree.map(np.testing.assert_array_equal, same, own)
    mixed = forward(here, inputs, foreign.experts)
    jax.tree.map(np.testing.assert_array_equal, mixed.experts, foreign.experts)
    jax.tree.map(np.testing.assert_array_equal, mixed.loads, foreign.loads)
    learned = [name for name, load in small_named(own.loads).items() if not np.array_equal(load, small_named(foreign.loads)[name])]
    assert len(learned) >= 3, learned
    assert np.abs(np.asarray(mixed.hidden - own.hidden)).max() > 1e-3
    assert np.abs(np.asarray(mixed.mtp_hidden - own.mtp_hidden)).max() > 1e-3


def small_named(loads):
    """Loads by the path of their layer."""
    return {jax.tree_util.keystr(path): np.asarray(load) for path, load in jax.tree_util.tree_leaves_with_path(loads)}


def test_experts_are_only_reported_when_they_are_asked_for(inputs):
    abstract = transformer.Transformer(CONFIG)
    out = jax.eval_shape(lambda params: param.bind(abstract, params)(inputs), small.parameters(CONFIG))
    assert out.experts is None
