"""Routing against a plain fp64 computation: scores, selection, weights, load, balance, hash tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import config as config_lib
from v4train.model import router, transformer
from v4train.train import loss

CONFIG = small.config(moe={"experts": 8, "top_k": 3, "scaling": 2.5})
LAYOUT = [[(9, 0, "ttiia"), (11, 3, "t")], [(17, 0, "ita")]]


@pytest.fixture(scope="module")
def rows():
    return small.batch(LAYOUT, length=24)


@pytest.fixture(scope="module")
def inputs(rows):
    return loss.model_inputs(rows, config=CONFIG)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, 24, 32)).astype(np.float32) * 2


def gate(*, hashed: bool, affinity: str = "sqrt_softplus", **changes):
    """A router and its parameters, some of them replaced."""
    moe = CONFIG.moe.model_copy(update={"affinity": affinity})
    layer = router.Router(CONFIG.model_copy(update={"moe": moe}), hashed=hashed)
    return layer, small.draw(param.declarations(layer)) | changes


def affinities(x, params, affinity: str = "sqrt_softplus") -> np.ndarray:
    logits = x.astype(np.float64) @ np.asarray(params["gate"], np.float64)
    return np.sqrt(np.log1p(np.exp(logits))) if affinity == "sqrt_softplus" else 1 / (1 + np.exp(-logits))


def top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, axis=-1)[..., :count], axis=-1)


@pytest.mark.parametrize("kind", ["sqrt_softplus", "sigmoid"])
def test_learned_routing_is_what_the_reports_say(x, rows, inputs, kind):
    layer, params = gate(hashed=False, affinity=kind)
    routing = param.bind(layer, params)(x, inputs)
    affinity = affinities(x, params, kind)
    expected = top(affinity + np.asarray(params["bias"])[rows.modality], 3)
    real = rows.segment_ids > 0
    np.testing.assert_array_equal(np.sort(routing.experts, axis=-1)[real], expected[real])
    chosen = np.take_along_axis(affinity, np.where(real[..., None], routing.experts, 0), axis=-1)
    weights = chosen / chosen.sum(-1, keepdims=True) * 2.5
    np.testing.assert_allclose(routing.weights[real], weights[real], rtol=1e-5)
    np.testing.assert_allclose(np.sum(routing.weights, axis=-1)[real], 2.5, rtol=1e-6)


def test_padding_goes_nowhere_and_is_not_counted(x, rows, inputs):
    for hashed in (False, True):
        layer, params = gate(hashed=hashed)
        routing = param.bind(layer, params)(x, inputs)
        padding = rows.segment_ids == 0
        assert padding.sum() == 11
        assert (np.asarray(routing.experts)[padding] == 8).all()
        assert (np.asarray(routing.weights)[padding] == 0).all()
        expected = np.zeros((3, 8))
        for at in np.argwhere(~padding):
            for expert in np.asarray(routing.experts)[tuple(at)]:
                expected[rows.modality[tuple(at)], expert] += 1
        np.testing.assert_array_equal(routing.load, expected)


def test_the_bias_changes_the_choice_of_its_modality_and_no_weight_of_the_chosen(x, rows, inputs):
    layer, params = gate(hashed=False, bias=jnp.zeros((3, 8)))
    plain = param.bind(layer, params)(x, inputs)
    biased = param.bind(layer, params | {"bias": jnp.zeros((3, 8)).at[1, 5].set(100.0)})(x, inputs)
    image = rows.modality == 1
    assert (np.asarray(biased.experts) == 5).any(-1)[image].all()
    assert not (np.asarray(plain.experts) == 5).any(-1)[image].all()
    np.testing.assert_array_equal(np.asarray(plain.experts)[~image], np.asarray(biased.experts)[~image])
    same = (np.sort(plain.experts) == np.sort(biased.experts)).all(-1)
    assert same[image].any()
    order = [np.argsort(r.experts, axis=-1) for r in (plain, biased)]
    weights = [np.take_along_axis(np.asarray(r.weights), o, axis=-1) for r, o in zip((plain, biased), order, strict=True)]
    np.testing.assert_allclose(weights[0][same], weights[1][same], rtol=1e-6)


def test_the_bias_has_no_gradient_and_the_gate_one_through_the_weights(x, inputs):
    layer, params = gate(hashed=False)

    def value(params):
        routing = param.bind(layer, params)(x, inputs)
        return jnp.sum(jnp.sin(routing.weights)) + routing.balance_loss

    gradient = jax.grad(value)(params)
    assert not np.asarray(gradient["bias"]).any()
    assert np.asarray(gradient["gate"]).all()


def test_hash_layers_take_text_from_the_table_and_media_from_the_gate(x, rows, inputs):
    layer, params = gate(hashed=True)
    routing = param.bind(layer, params)(x, inputs)
    affinity = affinities(x, params)
    real, text = rows.segment_ids > 0, rows.modality == 0
    np.testing.assert_array_equal(np.asarray(routing.experts)[real & text], np.asarray(params["table"])[rows.tokens][real & text])
    expected = top(affinity + np.asarray(params["bias"])[rows.modality], 3)
    np.testing.assert_array_equal(np.sort(routing.experts, axis=-1)[~text], expected[~text])
    chosen = np.take_along_axis(affinity, np.where(real[..., None], routing.experts, 0), axis=-1)
    np.testing.assert_allclose(routing.weights[real], (chosen / chosen.sum(-1, keepdims=True) * 2.5)[real], rtol=1e-5)
    assert routing.balance_loss == 0
    gradient = jax.grad(lambda g: jnp.sum(jnp.sin(param.bind(layer, params | {"gate": g})(x, inputs).weights)))(params["gate"])
    assert np.asarray(gradient).all(), "the gate of a hash layer learns from the weights"


def test_scores_are_fp32_when_activations_are_bf16(x, inputs):
    layer, params = gate(hashed=False)
    rounded = jnp.asarray(x, jnp.bfloat16)
    low = param.bind(layer, params)(rounded, inputs)
    high = param.bind(layer, params)(rounded.astype(jnp.float32), inputs)
    assert low.weights.dtype == jnp.float32
    np.testing.assert_array_equal(low.experts, high.experts)
    np.testing.assert_array_equal(low.weights, high.weights)


def balance_oracle(affinity: np.ndarray, experts: np.ndarray, segment_ids: np.ndarray, top_k: int) -> float:
    """Per document: E / (k T) sum_i (choices of i) (mean share of i), times its T tokens; fp64."""
    total, count = 0.0, affinity.shape[-1]
    for row in range(len(segment_ids)):
        for document in range(1, segment_ids[row].max() + 1):
            here = segment_ids[row] == document
            share = affinity[row, here] / affinity[row, here].sum(-1, keepdims=True)
            choices = np.bincount(experts[row, here].ravel(), minlength=count)
            total += here.sum() * count / top_k * np.sum(choices / here.sum() * share.mean(0))
    return total


@pytest.mark.parametrize("kind", ["sqrt_softplus", "sigmoid"])
def test_the_balance_loss_is_that_of_each_document(x, rows, inputs, kind):
    layer, params = gate(hashed=False, affinity=kind)
    routing = param.bind(layer, params)(x, inputs)
    expected = balance_oracle(affinities(x, params, kind), np.asarray(routing.experts), rows.segment_ids, 3)
    assert float(routing.balance_loss) == pytest.approx(expected, rel=1e-5)
    whole = balance_oracle(affinities(x, params, kind), np.asarray(routing.experts), (rows.segment_ids > 0).astype(int), 3)
    assert abs(expected - whole) > 1e-3 * expected, "documents packed together must not count as one"


@pytest.mark.parametrize(("gate_scale", "expected"), [(0.0, 1.0), (1.0, 8 / 3)])
def test_the_balance_loss_is_1_when_balanced_and_e_over_k_when_collapsed(rows, inputs, gate_scale, expected):
    """A gate of zeros has equal shares, whoever is chosen: exactly 1. If all tokens agree on three experts, far above the rest: E / k."""
    collapsed = np.where(np.arange(8) < 3, 300.0, -300.0).astype(np.float32)
    layer, params = gate(hashed=False, gate=jnp.asarray(np.tile(collapsed * gate_scale, (32, 1)) / 32))
    routing = param.bind(layer, params)(jnp.ones((2, 24, 32)), inputs)
    assert float(routing.balance_loss) / (rows.segment_ids > 0).sum() == pytest.approx(expected, rel=1e-4)


def test_biases_move_towards_balance_by_modality():
    load = jnp.asarray([[[9.0, 1, 5, 5], [0, 0, 0, 0], [4, 0, 0, 0]]])
    bias = jnp.full((1, 3, 4), 0.5)
    moved = router.update_bias(bias, load, speed=0.1)
    np.testing.assert_allclose(moved, [[[0.4, 0.6, 0.5, 0.5], [0.5] * 4, [0.4, 0.6, 0.6, 0.6]]], rtol=1e-6)


def test_bias_updates_balance_a_skewed_router():
    """In the long run: a gate that prefers two experts ends up using all of them."""
    rng = np.random.default_rng(1)
    rows = small.batch([[(256, 0, "t")]], length=256)
    inputs = loss.model_inputs(rows, config=CONFIG)
    layer, params = gate(hashed=False, bias=jnp.zeros((3, 8)))
    params["gate"] = params["gate"] * 0.2 + jnp.asarray(np.where(np.arange(8) < 2, 0.2, 0.0), jnp.float32)[None]
    run = small.jit(lambda bias, x: param.bind(layer, params | {"bias": bias})(x, inputs).load)
    loads, bias = [], params["bias"]
    for _ in range(300):
        loads.append(run(bias, (0.5 + rng.standard_normal((1, 256, 32))).astype(np.float32)))
        bias = router.update_bias(bias, loads[-1], speed=0.01)
    assert loads[0][0].max() / loads[0][0].mean() > 1.8
    assert np.mean([load[0] for load in loads[-20:]], axis=0).max() / loads[0][0].mean() < 1.2
    assert not np.asarray(bias[1:]).any(), "absent modalities keep theirs"


# Hash tables


def zipf(vocab: int) -> np.ndarray:
    return np.random.default_rng(0).permutation((1e6 / np.arange(1, vocab + 1)).astype(np.int64))


@pytest.fixture(scope="module")
def table():
    return router.balanced_table(zipf(5000), experts=64, top_k=6, seed=3)


def test_a_table_sends_each_token_to_distinct_experts(table):
    assert table.shape == (5000, 6)
    assert table.dtype == np.int32
    assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
    assert table.min() == 0
    assert table.max() == 63


def test_a_table_is_balanced_by_frequency(table):
    """As balanced as can be: the most frequent token alone may fill more than a fair share of its six experts."""
    counts = zipf(5000)
    load = np.bincount(table.ravel(), weights=np.repeat(counts, 6), minlength=64)
    assert load.max() <= max(counts.max(), load.mean()) * 1.01
    rest = np.sort(load)[:-6]
    assert rest.max() / rest.mean() < 1.02
    blind = np.random.default_rng(1).permuted(np.tile(np.arange(64), (5000, 1)), axis=1)[:, :6]
    random_load = np.bincount(blind.ravel(), weights=np.repeat(counts, 6), minlength=64)
    assert np.sort(random_load)[:-6].max() / rest.mean() > 1.2, "a table that ignores frequency is not"


def test_flat_counts_give_even_loads():
    table = router.balanced_table(np.zeros(1000, np.int64), experts=16, top_k=2, seed=0)
    loads = np.bincount(table.ravel(), minlength=16)
    assert loads.max() - loads.min() <= 1


def test_tables_differ_by_seed_and_repeat_with_it(table):
    counts = zipf(5000)
    np.testing.assert_array_equal(router.balanced_table(counts, experts=64, top_k=6, seed=3), table)
    assert (router.balanced_table(counts, experts=64, top_k=6, seed=4) != table).mean() > 0.9


def test_a_round_robin_table_takes_the_next_experts():
    table = router.hash_table("round_robin", zipf(100), experts=10, top_k=3, seed=3)
    assert table.dtype == np.int32
    assert [set(row) for row in table[:4].tolist()] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 0, 1}]


def test_a_random_table_has_distinct_experts_and_follows_its_seed():
    first, again, other = (router.hash_table("random", zipf(5000), experts=64, top_k=6, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9
    assert first.shape == (5000, 6)
    assert (np.diff(np.sort(first, axis=1), axis=1) > 0).all()
    loads = np.bincount(first.ravel(), minlength=64)
    assert loads.min() > 0.7 * loads.mean(), "every expert is as likely"


def test_filling_gives_every_hash_layer_a_table_of_its_own_and_changes_nothing_else():
    config = small.config("window", "window", "csa", moe={"hash_layers": 2})
    declared = small.declarations(config)
    params = jax.tree.map(jnp.zeros_like, small.parameters(config))
    counts = zipf(small.VOCAB)
    filled = transformer.fill_hash_tables(params, declarations=declared, counts=counts, seed=1)
    tables = np.asarray(filled["stack"]["run_0"]["layer_0"]["moe"]["router"]["table"])
    assert tables.shape == (2, small.VOCAB, 2)
    assert (tables[0] != tables[1]).any()
    for table in tables:
        assert table.dtype == np.int32
        load = np.bincount(table.ravel(), weights=np.repeat(counts, 2), minlength=8)
        assert load.max() <= max(counts.max(), load.mean()) * 1.05
    rest = [
        x
        for path, x in zip(param.flatten(declared), jax.tree.leaves(filled), strict=True)
        if not path.endswith("table") or "embedding" in path
    ]
    assert not any(np.asarray(x).any() for x in rest)
    again = transformer.fill_hash_tables(params, declarations=declared, counts=counts, seed=2)
    assert (np.asarray(again["stack"]["run_0"]["layer_0"]["moe"]["router"]["table"]) != tables).any()


def test_modalities_are_numbered_as_in_the_batch():
    assert config_lib.MODALITIES == ("text", "image", "audio")
