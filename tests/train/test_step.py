"""The training step: what it changes, by how much, and what it leaves alone. All on one compiled program where possible."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import tiny
from tests.train.compiled import case
from v4train.core import param, tree
from v4train.model import config as model_config
from v4train.train import step as step_lib


@pytest.fixture(scope="module")
def base(data):
    return case(data)


@pytest.fixture(scope="module")
def after_one(base):
    return base.run(base.state, base.batch())


def same_bits(a, b) -> bool:
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(found, wanted, *, rtol=1e-4, atol=1e-6):
    def compare(path, a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=param.path_name(path))

    jax.tree_util.tree_map_with_path(compare, jax.device_get(found), jax.device_get(wanted))


def uneven(batch):
    """Rows with very different numbers of targets and tokens: one without targets, one almost empty, one of padding only."""
    weight, segments = batch.loss_weight.copy(), batch.segment_ids.copy()
    weight[1] = 0
    weight[2, 5:] = 0
    kept = (batch.modality[3] == 0) & (np.arange(tiny.SEQUENCE) < 7)
    blank = {"tokens": 258, "positions": 0, "modality": 0, "loss_weight": 0.0, "patch_slot": -1, "audio_slot": -1}
    changed = {name: getattr(batch, name).copy() for name in blank} | {"loss_weight": weight}
    for row, keep in ((3, kept), (4, np.zeros(tiny.SEQUENCE, bool))):
        segments[row, ~keep] = 0
        for name, value in blank.items():
            changed[name][row, ~keep] = value
    return dataclasses.replace(batch, segment_ids=segments, **changed)


@pytest.fixture(scope="module")
def four_parts(data):
    return case(data, train={**tiny.values(data, data)["train"], "microbatches": 4})


@pytest.mark.slow
def test_microbatches_change_nothing(base, four_parts):
    for batch in (base.batch(1), uneven(base.batch(2))):
        whole, by_whole = base.run(base.state, batch)
        parts, by_parts = four_parts.run(four_parts.state, batch)
        close(by_parts, by_whole, rtol=2e-5)
        assert bool(by_whole.finite)
        # First moments are the clipped gradients times a constant: gradients are compared through them, the rest with the state.
        close(parts.optimizer, whole.optimizer, rtol=2e-3, atol=1e-7)
        close(parts.buffers, whole.buffers)
        # Both optimizers lift rounding errors to full size where a gradient is 0 but for them: nearly all elements must agree.
        pairs = list(zip(*(jax.tree.leaves(jax.device_get(s.params)) for s in (parts, whole)), strict=True))
        assert sum((np.abs(a - b) > 1e-5).sum() for a, b in pairs) < 0.005 * sum(a.size for a, _ in pairs)


def test_the_loss_is_weighted_by_targets_not_by_rows(base):
    """One row's loss alone, by the same program on a batch that is all padding but for that row, must add up with its targets."""
    batch = uneven(base.batch(2))
    _, whole = base.run(base.state, batch)
    total, targets, means = 0.0, 0.0, []
    for row in range(8):
        others = np.arange(8) != row
        weight = batch.loss_weight.copy()
        weight[others] = 0
        _, one = base.run(base.state, dataclasses.replace(batch, loss_weight=weight))
        sums = np.asarray(one.text, np.float64) @ np.asarray(one.text_weight)
        total, targets = total + sums, targets + float(one.text_weight.sum())
        means.append(sums / max(float(one.text_weight.sum()), 1))
    assert targets == float(whole.text_weight.sum())
    exact = float(np.asarray(whole.text, np.float64) @ np.asarray(whole.text_weight)) / targets
    assert exact == pytest.approx(total / targets, rel=1e-5)
    assert abs(np.mean(means) - exact) > 0.1  # the wrong way is far off


def test_losses_are_put_together_with_their_weights(base, after_one):
    report, model = jax.device_get(after_one[1]), base.parts.recipe.model
    text = report.text @ report.text_weight / report.text_weight.sum()
    balance = 2 * report.balance  # the report has the mean over the routers that learn: of csa and of MTP, not of the hash layer
    total = text + model.mtp.loss_weight * report.mtp + model.moe.balance_loss * balance + model.indexer_loss * report.indexer
    assert float(report.loss) == pytest.approx(float(total), rel=1e-6)
    assert all(5 < x < 6.5 for x in (*report.text, report.mtp)), "about ln 272 before training"
    assert 0.9 < report.balance < 2, "1 is balanced"
    assert report.indexer > 0
    batch = base.batch()
    assert report.tokens == (batch.segment_ids > 0).sum()
    shifted = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
    of_row = (batch.loss_weight[:, 1:] * shifted).sum(axis=1)
    np.testing.assert_array_equal(report.text_weight, [of_row[batch.source == i].sum() for i in (0, 1)])


def biases(buffers, declarations):
    """Layer name -> router bias ``[M, E]``."""
    flat = {
        path: x for (path, x) in zip(param.flatten(declarations), jax.tree.leaves(buffers), strict=True) if path.endswith("router/bias")
    }
    stack = sorted(path for path in flat if path.startswith("stack"))
    mtp = next(path for path in flat if path.startswith("mtp"))
    assert len(stack) == 2
    return [np.asarray(flat[path])[0] for path in stack] + [np.asarray(flat[mtp])]


def of_buffers(p):
    return tree.select(p.declarations, declarations=p.declarations, keep=lambda d: not d.trained)


def test_router_biases_move_against_the_load_without_padding(base):
    batch = uneven(base.batch(2))
    new, report = base.run(base.state, batch)
    report, speed = jax.device_get(report), np.float32(base.parts.recipe.model.moe.bias_speed)
    real = batch.segment_ids > 0
    by_modality = np.array([(real & (batch.modality == i)).sum() for i in range(3)])
    np.testing.assert_array_equal(report.load.sum(axis=2), np.tile(2 * by_modality, (3, 1)))
    before, after = (biases(s.buffers, of_buffers(base.parts)) for s in (base.state, new))
    moved = [new - old for new, old in zip(after, before, strict=True)]
    for layer, load in enumerate(report.load):
        mean = load.mean(axis=1, keepdims=True)
        np.testing.assert_array_equal(moved[layer], speed * np.sign(mean - load))
    # The hash layer's load of text follows from the ids alone.
    paths = param.flatten(of_buffers(base.parts))
    tables = [np.asarray(x) for path, x in zip(paths, jax.tree.leaves(base.state.buffers), strict=True) if path.endswith("table")]
    text = batch.tokens[real & (batch.modality == 0)]
    np.testing.assert_array_equal(report.load[0, 0], np.bincount(tables[0][0][text].ravel(), minlength=8))
    same = [(a == b).all() for p, a, b in zip(paths, *(jax.tree.leaves(s.buffers) for s in (new, base.state)), strict=True) if "table" in p]
    assert same == [True]


def test_the_bias_may_warm_up():
    moe = model_config.MoeConfig(experts=4, top_k=2, ffn=8, bias_speed=0.02)
    assert step_lib.bias_speed(moe, jnp.int32(0)) == 0.02
    slow = moe.model_copy(update={"bias_warmup_steps": 4})
    found = [float(step_lib.bias_speed(slow, jnp.int32(step))) for step in (0, 1, 3, 4, 100)]
    np.testing.assert_allclose(found, [0.005, 0.01, 0.02, 0.02, 0.02], rtol=1e-6)


def poison(state, *, path, value):
    """The state with one parameter multiplied by a value."""
    names = [param.path_name(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    leaves, structure = jax.tree.flatten(state.params)
    assert path in names, names
    return state._replace(params=jax.tree.unflatten(structure, [x * value if n == path else x for n, x in zip(names, leaves, strict=True)]))


def check_skipped(before, after, report):
    for field in ("params", "buffers", "optimizer"):
        assert same_bits(getattr(before, field), getattr(after, field)), field
    assert (int(after.step), int(after.skipped)) == (int(before.step) + 1, int(before.skipped) + 1)
    assert not bool(report.finite)


def test_a_nan_parameter_changes_nothing_but_the_step(base, after_one):
    state = poison(after_one[0], path="norm", value=np.nan)
    new, report = base.run(state, base.batch(1))
    assert not np.isfinite(float(report.loss))
    check_skipped(state, new, report)


def test_a_nan_in_the_batch_changes_nothing_but_the_step(base, after_one):
    batch = base.batch(1)
    weight = batch.loss_weight.copy()
    weight[tuple(np.argwhere(weight > 0)[3])] = np.nan
    new, report = base.run(after_one[0], dataclasses.replace(batch, loss_weight=weight))
    check_skipped(after_one[0], new, report)
    # The run goes on as if the batch had not been, but for the count.
    goes_on, report = base.run(new, base.batch(2))
    assert bool(report.finite)
    assert (int(goes_on.step), int(goes_on.skipped)) == (3, 1)


def test_an_overflowing_gradient_is_seen_though_the_loss_is_finite(base, after_one):
    state = poison(after_one[0], path="norm", value=1e25)
    new, report = base.run(state, base.batch(1))
    assert np.isfinite(float(report.loss))
    assert not np.isfinite(float(report.grad_norm))
    check_skipped(state, new, report)


def test_a_good_step_moves_every_trained_parameter(base, after_one):
    new, report = after_one
    assert bool(report.finite)
    assert (int(new.step), int(new.skipped)) == (1, 0)
    flat = jax.tree_util.tree_flatten_with_path(base.state.params)[0]
    still = [param.path_name(p) for (p, a), b in zip(flat, jax.tree.leaves(new.params), strict=True) if np.array_equal(a, b)]
    assert still == []


def test_the_step_repeats_bit_for_bit(base, after_one):
    assert same_bits(base.run(base.state, base.batch()), after_one)


@pytest.mark.slow
def test_bf16_keeps_fp32_masters(data, base, after_one):
    half = case(data, numerics={"compute": "bfloat16"})
    new, report = half.run(half.state, half.batch())
    assert {str(x.dtype) for x in jax.tree.leaves((new.params, new.optimizer))} <= {"float32", "int32"}
    assert float(report.loss) == pytest.approx(float(after_one[1].loss), rel=5e-3)
    assert not np.array_equal(report.text, after_one[1].text), "bf16 was not used"
    # An update far below bf16's resolution of the weight is kept.
    changes = []
    for a, b in zip(jax.tree.leaves(half.state.params), jax.tree.leaves(new.params), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        changes.append(((a != b) & (a.astype(jax.numpy.bfloat16) == b.astype(jax.numpy.bfloat16))).any())
    assert sum(changes) > len(changes) / 2


@pytest.mark.slow
def test_the_warm_up_moves_the_indexer_only(data):
    values = tiny.values(data, data)["model"]
    kinds = [k | {"phase": "warmup"} if k["kind"] == "csa" else k for k in values["kinds"]]
    warm = case(data, model={"kinds": kinds})
    new, report = warm.run(warm.state, warm.batch())
    assert bool(report.finite)
    assert float(report.loss) == pytest.approx(warm.parts.recipe.model.indexer_loss * float(report.indexer), rel=1e-6)
    assert same_bits(new.buffers, warm.state.buffers)
    trained = param.flatten(tree.select(warm.parts.declarations, declarations=warm.parts.declarations, keep=lambda d: d.trained))
    pairs = zip(trained.items(), jax.tree.leaves(warm.state.params), jax.tree.leaves(new.params), strict=True)
    moved = {path: not np.array_equal(a, b) for (path, _), a, b in pairs}
    assert moved == {path: "indexer" in d.tags for path, d in trained.items()}
    assert any(moved.values())
