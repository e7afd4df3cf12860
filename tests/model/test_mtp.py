"""Multi-token prediction: what goes in, what is predicted; and that every parameter of a whole model learns from the loss meant for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import block, context, hyper_connections, mtp, transformer
from v4train.train import loss

CONFIG = small.config("window", mtp={"loss_weight": 0.25})
LENGTH = 24
ROWS = [[(9, 0, "tttiia"), (11, 4, "ta")], [(1, 0, "t"), (23, 0, "t")]]


@pytest.fixture(scope="module")
def rows():
    return small.batch(ROWS, length=LENGTH)


@pytest.fixture(scope="module")
def head():
    layer = mtp.MultiTokenPrediction(CONFIG)
    return layer, small.draw(param.declarations(layer))


def rms(x, weight):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight)


def test_its_input_is_the_stream_and_the_next_embedding(monkeypatch, head, rows):
    """The block replaced by the identity and the collapse by the first stream: what is left is the input, per stream, in fp64."""
    layer, params = head
    rng = np.random.default_rng(0)
    streams, embedded = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, LENGTH, 4, 32), (2, LENGTH, 32)))
    monkeypatch.setattr(block.Block, "__call__", lambda self, streams, context, *_, **__: (streams, None))
    monkeypatch.setattr(hyper_connections.HeadCollapse, "__call__", lambda self, streams: streams[:, :, 2])
    there = context.make(loss.model_inputs(rows, config=CONFIG), config=CONFIG)
    out, _ = param.bind(layer, params)(streams, embedded, there)
    for row, place in np.ndindex(2, LENGTH):
        document = rows.segment_ids[row]
        goes_on = place + 1 < LENGTH and document[place + 1] == document[place]
        following = embedded[row, place + 1] if goes_on else np.zeros(32, np.float32)
        x = rms(streams[row, place, 2], params["hnorm"]) @ np.asarray(params["h_proj"], np.float64)
        x = x + rms(following, params["enorm"]) @ np.asarray(params["e_proj"], np.float64)
        np.testing.assert_allclose(out[row, place], rms(x, params["norm"]), rtol=1e-3, atol=1e-4)


def test_the_next_embedding_may_be_that_of_a_patch_or_a_frame(monkeypatch, rows):
    """The block gets what the stack got: media embeddings, not those of the placeholder."""
    seen = {}
    real = mtp.MultiTokenPrediction.__call__

    def spy(self, streams, embedded, context, *given, **keep):
        seen["embedded"] = embedded
        return real(self, streams, embedded, context, *given, **keep)

    monkeypatch.setattr(mtp.MultiTokenPrediction, "__call__", spy)
    model = transformer.Transformer(CONFIG)
    params = small.parameters(CONFIG)
    inputs = loss.model_inputs(rows, config=CONFIG)
    jax.eval_shape(lambda: param.bind(model, params)(inputs))
    assert seen["embedded"].shape == (2, LENGTH, 32)
    monkeypatch.setattr(mtp.MultiTokenPrediction, "__call__", lambda self, streams, embedded, context, *_, **__: (embedded, _no_stats()))
    monkeypatch.setattr(block.Block, "__call__", lambda self, streams, context, *_, **__: (streams, _no_stats()))
    embedded = param.bind(model, params)(inputs).mtp_hidden
    media = rows.modality > 0
    placeholder = np.asarray(params["embedding"]["table"])[rows.tokens]
    assert (np.abs(embedded - placeholder).max(-1)[media] > 0.1).all()
    np.testing.assert_array_equal(np.asarray(embedded)[~media], placeholder[~media])


def _no_stats():
    zero = jnp.zeros(())
    return block.LayerStats(load=jnp.zeros((3, 8)), balance_loss=zero, indexer_loss=zero, late=zero, dropped=zero)


@pytest.mark.parametrize("ahead", [1, 2])
def test_targets_stay_in_their_document_and_skip_what_does_not_count(rows, ahead):
    ids, weight = (np.asarray(x) for x in loss.targets(rows, ahead=ahead))
    for row, place in np.ndindex(2, LENGTH):
        document, there = rows.segment_ids[row], place + ahead
        counts = there < LENGTH and document[place] > 0 and document[there] == document[place] and rows.modality[row, there] == 0
        assert weight[row, place] == counts, (row, place)
        if counts:
            assert ids[row, place] == rows.tokens[row, there]


def test_counts_are_of_the_whole_batch_and_never_zero(rows):
    counts = loss.count(rows)
    assert float(counts.text) == 5 + 5 + 0 + 22  # text tokens with a predecessor, by document
    assert float(counts.mtp) == 4 + 5 + 0 + 21
    assert float(counts.tokens) == 44
    blank = jax.tree.map(np.zeros_like, rows)
    assert tuple(map(float, loss.count(blank))) == (1, 1, 1)


def test_the_total_is_the_weighted_sum_of_its_terms():
    sums = loss.Terms(
        text=jnp.asarray([30.0, 10.0]),
        text_weight=jnp.asarray([5.0, 5.0]),
        mtp=jnp.asarray(8.0),
        balance=jnp.asarray(60.0),
        indexer=jnp.asarray(100.0),
        loads={},
        late=jnp.zeros(()),
        dropped=jnp.zeros(()),
    )
    counts = loss.Counts(text=jnp.asarray(10.0), mtp=jnp.asarray(4.0), tokens=jnp.asarray(20.0))
    config = small.config(mtp={"loss_weight": 0.25}, indexer_loss=0.5, moe={"balance_loss": 0.01})
    assert float(loss.total(sums, counts, config=config)) == pytest.approx(4 + 0.25 * 2 + 0.01 * 3 + 0.5 * 5)
    assert float(loss.total(sums, counts, config=small.config(mtp=None, indexer_loss=0.5, moe={"balance_loss": 0.01}))) == pytest.approx(
        6.53
    )
    warm = small.config(phase="warmup", indexer_loss=0.5)
    assert warm.warming_up
    assert not config.warming_up
    assert float(loss.total(sums, counts, config=warm)) == pytest.approx(2.5)


# What learns from what, in a model with every part


@pytest.fixture(scope="module")
def whole():
    """A model with every part, and ``gradient(learned, rows, of the indexer's loss?) -> ((loss, loads), {path: gradient})``."""
    config = small.config()
    params, model = small.parameters(config), transformer.Transformer(config)
    declared = param.flatten(small.declarations(config))
    flat, structure = jax.tree.flatten(params)

    def value(learned, rows, of_indexer):
        everything = [learned.get(path, leaf) for path, leaf in zip(declared, flat, strict=True)]
        sums = loss.terms(model, jax.tree.unflatten(structure, everything), rows, sources=1)
        return jnp.where(of_indexer, sums.indexer, sums.text.sum() + sums.mtp + sums.balance), sums.loads

    learned = {path: leaf for (path, d), leaf in zip(declared.items(), flat, strict=True) if d.trained}
    rows = small.batch([[(11, 0, "ttiia"), (26, 5, "tttia"), (10, 0, "t")], [(47, 0, "tttttia")]], length=48)
    return params, learned, rows, small.jit(jax.value_and_grad(value, has_aux=True))


@pytest.fixture(scope="module")
def gradients(whole):
    """Declarations, gradients of the loss without the indexer's, and of the indexer's alone."""
    _, learned, rows, gradient = whole
    found = [jax.tree.map(np.asarray, gradient(learned, rows, flag)[1]) for flag in (False, True)]
    return param.flatten(small.declarations(small.config())), *found


def test_the_language_model_loss_reaches_every_parameter_but_the_indexers(gradients):
    declared, language, _ = gradients
    for path, x in language.items():
        assert np.isfinite(x).all(), path
        if "indexer" in declared[path].tags:
            assert not x.any(), f"{path} learns from the indexer's loss alone"
        else:
            assert x.any(), f"{path} is declared and not used"
    assert any("indexer" in d.tags for d in declared.values())


def test_the_indexer_loss_reaches_every_parameter_of_the_indexer_and_no_other(gradients):
    declared, _, indexer = gradients
    for path, x in indexer.items():
        assert np.isfinite(x).all(), path
        if "indexer" in declared[path].tags:
            assert x.any(), f"{path} does not learn"
        else:
            assert not x.any(), f"{path} must not learn from the indexer's loss"


def test_each_expert_and_each_head_gets_a_gradient(gradients):
    """A parameter as a whole may move while a slice of it is cut off."""
    declared, language, _ = gradients
    for path, x in language.items():
        if "indexer" in declared[path].tags:
            continue
        if path.endswith(("experts/w1", "experts/w2", "experts/w3")):
            assert x.any(axis=(-2, -1)).all(), path
        if path.endswith(("sink", "wo_a", "ape", "hnorm", "enorm")):
            assert (x != 0).mean() > 0.99, path


def test_two_runs_agree_bit_for_bit(whole, gradients):
    _, learned, rows, gradient = whole
    again = gradient(learned, rows, False)[1]
    for path, x in gradients[1].items():
        np.testing.assert_array_equal(x, again[path], err_msg=path)


@pytest.mark.parametrize("of_indexer", [False, True])
def test_a_blank_batch_has_no_loss_no_gradient_and_moves_no_router(whole, of_indexer):
    params, learned, _, gradient = whole
    blank = small.batch([[], []], length=48)
    (value, loads), found = gradient(learned, jax.tree.map(jnp.asarray, blank), of_indexer)
    assert value == 0
    assert all(not np.asarray(x).any() for x in found.values())
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(loads))
    moved = transformer.update_router_biases(params, loads, speed=0.1)
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_identical_tokens_stay_finite(whole):
    """A batch of one repeated token: every score ties, and its experts take all."""
    _, learned, _, gradient = whole
    same = small.batch([[(48, 0, "t")], [(48, 0, "t")]], length=48)
    same.tokens[:] = 7
    (value, loads), found = gradient(learned, same, False)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in found.values())
    assert loads["stack"]["run_0"]["layer_0"].sum() == 96 * 2


@pytest.mark.parametrize(
    "path", ["embedding/table", "stack/run_0/layer_1/attention/projections/sink", "stack/run_0/layer_2/moe/shared/w1", "mtp/e_proj"]
)
def test_a_nan_anywhere_shows_in_the_gradient_norm(whole, path):
    """No clamp, mask or selection swallows it."""
    _, learned, rows, gradient = whole
    broken = learned | {path: learned[path] * jnp.nan}
    _, found = gradient(broken, rows, False)
    assert not np.isfinite(sum(float(jnp.sum(jnp.square(x))) for x in found.values()))


def test_router_biases_move_in_every_layer_by_the_speed_and_nothing_else_does(whole):
    params, learned, rows, gradient = whole
    (_, loads), _ = gradient(learned, rows, False)
    moved = transformer.update_router_biases(params, loads, speed=0.25)
    for path, d in param.flatten(small.declarations(small.config())).items():
        before, after = params, moved
        for key in path.split("/"):
            before, after = before[key], after[key]
        if "router_bias" in d.tags:
            change = np.asarray(after - before)
            assert set(np.unique(np.round(np.abs(change), 4))) <= {0, 0.25}, path
            assert (np.abs(change).reshape(-1, 3, 8)[0] > 0).any(axis=1).all(), f"{path}: all three modalities are present"
        else:
            np.testing.assert_array_equal(before, after)
    assert loads["mtp"].shape == (3, 8)
