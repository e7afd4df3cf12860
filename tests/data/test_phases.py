"""Phases: what they resolve to, and that what is read in their course is what the closed forms say."""

import fractions
import hashlib
import itertools

import jax
import numpy as np
import pytest

from tests.data import synthetic
from v4train.checkpoint import config as checkpoint_config
from v4train.checkpoint import manager, restore
from v4train.data import batch as batch_lib
from v4train.data import config, history, pipeline

SOURCES = ("prose", "code", "pairs", "talks", "single")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    for i, (name, kind) in enumerate(zip(SOURCES, ("text", "text", "media", "media", "text"), strict=True)):
        synthetic.make_test_store(root / name, kind=kind, documents=70 + 10 * i, seed=i)
    return root


def make(stores, *, batch_rows=200, phases=(), hosts=(0, 1), context=(0, 1), weights=(4.0, 2.0, 1.0, 1.0, 0.0), **changes):
    packings = ("split_text_keep_spans", "no_split", "no_split", "split_text_keep_spans", "one_document")
    sources = tuple(
        {"name": name, "path": str(stores / name), "weight": weight, "packing": packing}
        for name, weight, packing in zip(SOURCES, weights, packings, strict=True)
    )
    values = {"sequence_length": 32, "image_patch": 2, "max_patches": 10, "max_audio_frames": 12, "seed": 3}
    c = config.DataConfig(sources=sources, phases=phases, **(values | changes))
    places = {"host_index": hosts[0], "host_count": hosts[1], "context_index": context[0], "context_count": context[1]}
    return pipeline.Pipeline(c, batch_rows=batch_rows, **places)


# By step, by tokens, with and without a ramp, with a shape that grows, shrinks, and only has other budgets.
COURSE = (
    {"from_step": 30, "weights": {"single": 2.0, "prose": 1.0}, "ramp_steps": 20},
    {"from_tokens": 360_000, "sequence_length": 64, "batch_rows": 160, "max_patches": 20},
    {"from_step": 85, "sequence_length": 40, "max_audio_frames": 30, "weights": {"code": 0.0}},
)


def digest(batch) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()


def test_phases_are_what_the_recipe_says(stores):
    p = make(stores, phases=COURSE)
    phases = p.phases.phases
    edges = [phase.first_step for phase in phases]
    assert edges == [0, *range(30, 51), 57, 85]
    assert [p.phases.at(step).shape[:2] for step in (0, 56, 57, 84, 85, 10**9)] == [(200, 32)] * 2 + [(160, 64)] * 2 + [(160, 40)] * 2
    assert p.phases.places_before(57) == 57 * 200 * 32 >= 360_000 > 56 * 200 * 32
    assert p.phases.places_before(90) == 57 * 200 * 32 + 28 * 160 * 64 + 5 * 160 * 40
    assert p.phases.rows_before(90) == 57 * 200 + 33 * 160
    assert p.phases.at(0).weights == (*(fractions.Fraction(k, 8) for k in (4, 2, 1, 1)), 0)
    assert p.phases.at(50).weights == tuple(fractions.Fraction(k, 7) for k in (1, 2, 1, 1, 2))
    middle = [(a + b) / 2 for a, b in zip(p.phases.at(0).weights, p.phases.at(50).weights, strict=True)]
    assert [sum(w) / 2 for w in zip(p.phases.at(39).weights, p.phases.at(40).weights, strict=True)] == middle
    for name, value in (("patches", 20), ("audio", 30)):
        assert getattr(p.batch(86), name).shape[1] == value


def test_a_long_ramp_has_64_stairs(stores):
    p = make(stores, phases=({"from_step": 10, "ramp_steps": 1000, "weights": {"single": 8.0}},))
    assert len(p.phases.phases) == 66
    shares = [float(p.phases.at(step).weights[4]) for step in range(10, 1010)]
    assert np.abs(np.array(shares) - np.linspace(0, 0.5, 1000)).max() < 0.5 / 64


def test_counts_in_closed_form_are_those_observed_over_20_000_rows(stores):
    p = make(stores, phases=COURSE)
    rows, tokens, documents = np.zeros(5, int), np.zeros(5, int), np.zeros(5, int)
    step = 0
    while rows.sum() < 20_000:
        amounts = p.amounts(step)
        assert [amounts[name].rows for name in SOURCES] == rows.tolist() == list(p.rows_by_source(step).values())
        assert [amounts[name].tokens for name in SOURCES] == tokens.tolist()
        b = p.batch(step)
        assert b.tokens.shape == p.phases.at(step).shape[:2]
        rows += np.bincount(b.source, minlength=5)
        tokens += np.bincount(b.source, weights=(b.segment_ids > 0).sum(axis=1), minlength=5).astype(int)
        documents += np.bincount(b.source, weights=b.n_documents[:, 0], minlength=5).astype(int)
        step += 1
    assert step > 85 + 10, "all phases were seen"
    assert p.phases.rows_before(step) == rows.sum()
    due = np.array([float(sum(p.phases.at(i).weights[s] * p.phases.at(i).shape.rows for i in range(step))) for s in range(5)])
    assert np.abs(rows - due).max() < 3
    epochs = np.array([amount.epochs for amount in p.amounts(step).values()])
    stored = [int(np.load(stores / name / "documents.npy")["tokens"].sum()) for name in SOURCES]
    np.testing.assert_allclose(epochs, tokens / stored)
    assert (documents >= rows).all()


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_and_a_restore_on_any_other_number_of_them(stores, hosts):
    """Batches on both sides of every boundary, read by other processes than those before."""
    whole = make(stores, phases=COURSE)
    for step in (0, 29, 30, 41, 56, 57, 84, 85, 97):
        parts = [make(stores, phases=COURSE, hosts=(i, hosts)).batch(step) for i in range(hosts)] if step in (0, 57) else None
        if parts is None:
            fresh = make(stores, phases=COURSE, hosts=(hosts - 1, hosts))
            local = fresh.phases.at(step).shape.rows // hosts
            assert digest(fresh.batch(step)) == digest(batch_lib.rows(whole.batch(step), (hosts - 1) * local, hosts * local))
        else:
            assert digest(batch_lib.concatenate(parts)) == digest(whole.batch(step))


@pytest.mark.parametrize("slices", [2, 4, 8])
def test_context_slices_concatenate_to_the_row(stores, slices):
    whole = make(stores, phases=COURSE)
    parts = [make(stores, phases=COURSE, context=(i, slices)) for i in range(slices)]
    cut_spans = 0
    for step in (0, 40, 60, 90):
        expected, got = whole.batch(step), [p.batch(step) for p in parts]
        for name in ("tokens", "segment_ids", "positions", "modality", "loss_weight"):
            np.testing.assert_array_equal(np.concatenate([getattr(b, name) for b in got], axis=1), getattr(expected, name), err_msg=name)
        for kind, slots, payload in ((1, "patch_slot", "patches"), (1, "patch_slot", "patch_xy"), (2, "audio_slot", "audio")):
            together = np.concatenate([by_token(b, slots, payload) for b in got], axis=1)
            np.testing.assert_array_equal(together, by_token(expected, slots, payload), err_msg=payload)
            for b in got:
                used = np.sort(getattr(b, slots), axis=1)
                assert getattr(b, payload).shape[1] == min(getattr(expected, payload).shape[1], b.tokens.shape[1])
                assert (used.max(axis=1) + 1 == (used >= 0).sum(axis=1)).all(), "slots count from the slice's beginning"
            seams = itertools.pairwise(got)
            cut_spans += sum(int(((a.modality[:, -1] == kind) & (b.modality[:, 0] == kind)).sum()) for a, b in seams)
        np.testing.assert_array_equal(sum(b.n_documents for b in got), expected.n_documents)
        for b in got:
            assert np.array_equal(b.source, expected.source)
    assert cut_spans > 10


def by_token(batch, slots, payload):
    """``[B, S, ...]``: what each token's slot holds, zeros where it has none."""
    index, values = getattr(batch, slots), getattr(batch, payload)
    found = np.take_along_axis(values, np.maximum(index, 0)[:, :, None], axis=1)
    return np.where(index[:, :, None] >= 0, found, 0)


def test_a_slice_reads_its_own_documents_only(stores, monkeypatch):
    p = make(stores, phases=COURSE, context=(1, 4))
    read = []
    monkeypatch.setattr(pipeline.collate.Reader, "report", lambda *_: None)
    for reader in p._readers:
        original = reader.store.read_pieces
        monkeypatch.setattr(reader.store, "read_pieces", lambda pieces, *, out, f=original: (read.append(pieces), f(pieces, out=out))[1])
    b = p.batch(0)
    assert sum(int((pieces.stops - pieces.starts).sum()) for pieces in read) == (b.segment_ids > 0).sum() <= 200 * 8


def test_the_state_survives_orbax_at_every_step(stores, tmp_path):
    """One integer and a history, from step 0 on, over a change of weights and one of shape; read back by another number of hosts."""
    course = ({"from_step": 2, "weights": {"single": 3.0}}, {"from_step": 4, "sequence_length": 64, "batch_rows": 4})
    p = make(stores, batch_rows=8, phases=course)
    keep = checkpoint_config.CheckpointConfig.model_validate({"every_steps": 1, "keep": {"kind": "latest", "count": 99}})
    with manager.Manager(tmp_path, config=keep) as saver:
        for step in range(7):
            saver.save(
                step, {"step": jax.device_put(np.int32(step))}, metadata={"history": p.history(step), "data": p.fingerprint_before(step)}
            )
            saver.wait()
    template = {"step": jax.ShapeDtypeStruct((), "int32", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    for step in range(7):
        found = restore.restore(tmp_path, template=template, step=step)
        resumed = [make(stores, batch_rows=8, phases=course, hosts=(i, 2)) for i in range(2)]
        assert {q.fingerprint_before(step) for q in resumed} == {found.metadata["data"]}
        assert history.differences(found.metadata["history"], resumed[0].history(step)) == []
        position = int(found.state["step"])
        for i, b in zip(range(position, 7), *[resumed[0].iterate(position)], strict=False):
            assert digest(b) == digest(batch_lib.rows(p.batch(i), 0, b.tokens.shape[0]))
        assert digest(batch_lib.concatenate([q.batch(position) for q in resumed])) == digest(p.batch(position))


def test_the_past_does_not_know_the_future(stores):
    """Histories and batches before a step are the same whatever phases, sources of weight 0 or order of these come after."""
    short, long = make(stores, phases=COURSE[:1]), make(stores, phases=COURSE)
    for step in (0, 31, 50, 57):
        assert short.fingerprint_before(step) == long.fingerprint_before(step)
        assert history.differences(short.history(step), long.history(step)) == []
    assert digest(short.batch(56)) == digest(long.batch(56))
    assert short.fingerprint_before(58) != long.fingerprint_before(58)
    assert short.fingerprint != long.fingerprint
    noted = make(stores, phases=({"from_step": 20}, *COURSE))  # a phase that changes nothing
    assert noted.fingerprint == long.fingerprint


@pytest.mark.parametrize(
    "phases, message",
    [
        (({"from_step": 30}, {"from_step": 30}), r"data.phases\[1\] begins at step 30, but the phase before it begins, .* at step 30"),
        (({"from_tokens": 6400}, {"from_tokens": 6401}), None),
        (({"from_tokens": 6401}, {"from_tokens": 6402}), r"data.phases\[1\] begins at step 2"),
        (({"from_step": 3, "weights": {"proze": 1.0}},), r"weights names 'proze', but the sources are prose, code"),
        (({"from_step": 3, "max_patches": 3},), r"`max_patches` is 3"),
        (({"from_step": 3, "sequence_length": 9},), r"`sequence_length` is 9"),
    ],
)
def test_phases_that_cannot_be(stores, phases, message):
    if message is None:
        assert [phase.first_step for phase in make(stores, phases=phases).phases.phases] == [0, 1, 2]
    else:
        with pytest.raises(ValueError, match=message):
            make(stores, phases=phases)


def test_rows_that_cannot_be_divided(stores):
    with pytest.raises(ValueError, match=r"a batch of 30 rows .* make it a multiple of 4"):
        make(stores, phases=({"from_step": 3, "batch_rows": 30},), hosts=(0, 4))
    with pytest.raises(ValueError, match=r"rows of 34 tokens cannot be divided into 4 slices"):
        make(stores, phases=({"from_step": 3, "sequence_length": 34},), context=(0, 4))


def test_rows_climb_in_stairs_by_tokens(stores):
    """4 stairs from 8 to 24 rows over 3,000 tokens: the closed form, and the arithmetic by hand. Rows of 32 tokens."""
    ramp = {"from_tokens": 1024, "batch_rows": 24, "rows_stairs": 4, "rows_ramp_tokens": 3000}
    p = make(stores, batch_rows=8, phases=(ramp, {"from_step": 20, "batch_rows": 8}))
    # From token 1024 on 12 rows = 384 a step, until 1000 tokens are through (3 steps: 1152), then 16 rows = 512 until 2000 (2 steps:
    # 2176), 20 rows = 640 until 3000 (2 steps: 3456), then 24.
    assert [(phase.first_step, phase.shape.rows) for phase in p.phases.phases] == [(0, 8), (4, 12), (7, 16), (9, 20), (11, 24), (20, 8)]
    assert [p.phases.places_before(step) - 1024 for step in (4, 7, 9, 11)] == [0, 1152, 2176, 3456]
    steps = [next(step for step in range(99) if p.phases.places_before(step) >= tokens) for tokens in range(0, 12_000, 97)]
    assert [p.phases.first_step_after(tokens) for tokens in range(0, 12_000, 97)] == steps
    seen = 0
    for step in range(22):
        assert p.phases.places_before(step) == seen
        seen += p.batch(step).tokens.size
    down = make(stores, batch_rows=24, phases=({"from_step": 1, "batch_rows": 8, "rows_stairs": 2, "rows_ramp_tokens": 1},))
    assert [(phase.first_step, phase.shape.rows) for phase in down.phases.phases] == [(0, 24), (1, 16), (2, 8)]


def test_a_ramp_of_rows_changes_no_row_and_its_past_is_kept(stores):
    """The stream of rows is the one without a ramp, cut otherwise; what comes after a stair does not change the history before."""
    ramp = {"from_step": 2, "batch_rows": 24, "rows_stairs": 4, "rows_ramp_tokens": 3000}
    with_ramp, without = make(stores, batch_rows=8, phases=(ramp,)), make(stores, batch_rows=8)
    rows = [batch_lib.concatenate([p.batch(step) for step in range(n)]) for p, n in ((with_ramp, 6), (without, 9))]
    assert [len(one.tokens) for one in rows] == [68, 72]
    assert digest(rows[0]) == digest(batch_lib.rows(rows[1], 0, 68))
    longer = make(stores, batch_rows=8, phases=(ramp | {"rows_ramp_tokens": 6000},))
    assert with_ramp.history(5) == longer.history(5)
    named = history.differences(with_ramp.history(7), longer.history(7))
    assert named == ["steps 5 to 7: batch rows 16 in the checkpoint, 12 now"]


@pytest.mark.parametrize(
    "ramp, message",
    [
        ({"rows_stairs": 3, "batch_rows": 24}, "needs both rows_stairs, 2 or more, and rows_ramp_tokens"),
        ({"rows_ramp_tokens": 300, "batch_rows": 24}, "needs both rows_stairs, 2 or more, and rows_ramp_tokens"),
        ({"rows_stairs": 2, "rows_ramp_tokens": 300}, "needs batch_rows, where it ends"),
        ({"rows_stairs": 2, "rows_ramp_tokens": 300, "batch_rows": 24, "ramp_steps": 2}, "not both: write two phases"),
        ({"rows_stairs": 3, "rows_ramp_tokens": 3000, "batch_rows": 24}, r"phases\[0\]: 8 to 24 rows in 3 equal stairs .* is 5.33333 rows"),
        ({"rows_stairs": 4, "rows_ramp_tokens": 300, "batch_rows": 8}, r"phases\[0\]: a ramp from 8 to 8 rows is none"),
        ({"rows_stairs": 4, "rows_ramp_tokens": 6, "batch_rows": 24}, r"phases\[0\]: a stair of 2 tokens is shorter than a step of 512"),
    ],
)
def test_ramps_of_rows_that_cannot_be(stores, ramp, message):
    with pytest.raises(ValueError, match=message):
        make(stores, batch_rows=8, phases=({"from_step": 3} | ramp,))
