"""Batches are a pure function of the step: for any order, host count and thread count, and around damage."""

import hashlib
import itertools
import json
import threading

import jax
import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import batch as batch_lib
from v4train.data import config, pipeline, plan, store


@pytest.fixture
def sources(tmp_path):
    synthetic.make_test_store(tmp_path / "media", kind="media", documents=80, seed=1)
    synthetic.make_test_store(tmp_path / "text", documents=50, seed=2)
    return (
        {"name": "media", "path": str(tmp_path / "media"), "weight": 1.0},
        {"name": "text", "path": str(tmp_path / "text"), "weight": 2.0},
    )


def make(sources, *, batch_rows=8, split="train", host_index=0, host_count=1, on_bad_record=None, **changes):
    defaults = {"sequence_length": 48, "image_patch": 2, "max_patches": 10, "max_audio_frames": 12, "holdout": 0.2, "seed": 3}
    c = config.DataConfig(sources=sources, **(defaults | changes))
    hosts = {"host_index": host_index, "host_count": host_count}
    return pipeline.Pipeline(c, batch_rows=batch_rows, split=split, on_bad_record=on_bad_record, **hosts)


def digest(batch) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()


def take(iterator, n):
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


def test_every_token_is_that_of_its_document(sources):
    """Everything in a batch is traced back to the stores by segment and position alone."""
    p = make(sources)
    stores = [store.TokenStore.open(source["path"]) for source in sources]
    documents = [[s.read(i) for i in range(len(s))] for s in stores]
    found = 0
    for step in range(12):
        b = p.batch(step)
        batch_lib.validate(b, vocab_size=272)
        for row in range(8):
            for segment in range(1, b.segment_ids[row].max() + 1):
                where = b.segment_ids[row] == segment
                start = int(b.positions[row][where][0])
                tokens = b.tokens[row][where].astype(np.uint32)
                same = [d for d in documents[b.source[row]] if np.array_equal(d.tokens[start : start + len(tokens)], tokens)]
                assert same
                if len(same) > 1:  # a few tokens at the end of a document may not tell which it was
                    continue
                d = same[0]
                modality = d.modality[start : start + len(tokens)]
                np.testing.assert_array_equal(b.modality[row][where], modality)
                expected = (modality == 0) & ~np.isin(tokens, [256, 258, 261, 262, 263, 264])
                np.testing.assert_array_equal(b.loss_weight[row][where], expected)
                for kind, slots, payload, stored in (
                    (1, b.patch_slot, b.patches, d.patches),
                    (1, b.patch_slot, b.patch_xy, d.patch_xy),
                    (2, b.audio_slot, b.audio, d.audio),
                ):
                    skipped = int((d.modality[:start] == kind).sum())
                    mine = slots[row][where][modality == kind]
                    if len(mine):
                        np.testing.assert_array_equal(payload[row][mine], stored[skipped : skipped + len(mine)])
                found += 1
    assert found > 100


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_iterating_from_any_step_is_random_access(sources, threads):
    p = make(sources, read_threads=threads, prefetch_rows=20)
    expected = [digest(p.batch(step)) for step in range(9)]
    assert len(set(expected)) == 9
    for start in (0, 1, 5):
        assert [digest(b) for b in take(p.iterate(start), 4)] == expected[start : start + 4]


@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split"])
def test_milestones_spare_planning_through_phases(sources, monkeypatch, policy):
    """Through JSON, over a change of shape; foreign ones are left aside; rows are the same with and without."""
    monkeypatch.setattr(plan, "_BLOCK_ROWS", 8)
    sources = [source | {"packing": policy} for source in sources]
    phases = [{"from_step": 60, "sequence_length": 96, "max_patches": 20}]
    first, other = make(sources, phases=phases), make(sources, phases=phases, seed=4)
    expected = {step: digest(first.batch(step)) for step in (10, 200)}
    found = json.loads(json.dumps(first.milestones(200)))
    assert len(found) == (2 if policy == "split_text_keep_spans" else 4)
    assert found.keys().isdisjoint(other.milestones(200))
    amounts = first.amounts(200)
    blocks = []
    for told in ({}, other.milestones(200), found):
        again = make(sources, phases=phases)
        again.remember(told)
        assert digest(again.batch(200)) == expected[200]
        assert again.amounts(200) == amounts
        assert again.milestones(200) == found
        blocks.append(sum(again._plan(i, "train", part)._block.cache_info().misses for i in range(2) for part in range(2)))
        assert digest(again.batch(10)) == expected[10]
    assert blocks[0] == blocks[1] > 2 * blocks[2]
    again = make(sources, phases=phases)
    assert set(again.planning(200)) == ({"media"} if policy == "split_text_keep_spans" else {"media", "text"})
    assert all(planning.rows > 400 for planning in again.planning(200).values())
    assert again.planning(0) == {}


def test_delimiters_are_known_from_the_counts_of_ids(sources):
    p = make(sources)
    assert [p._delimited(i) for i in range(2)] == [[1, 2], []]
    for step in range(40):
        b = p.batch(step)
        last = b.tokens[np.arange(8), np.maximum((b.segment_ids > 0).sum(axis=1) - 1, 0)]
        assert not np.isin(last, [p.tokenizer.image_start, p.tokenizer.audio_start]).any()


def test_reading_ahead_is_bounded_in_bytes(sources, monkeypatch):
    size = sum(array.nbytes for array in vars(make(sources).batch(0)).values())
    for limit, ahead in ((10 * size, 8), (3 * size, 3), (size - 1, 1)):
        monkeypatch.setattr(pipeline, "_AHEAD_BYTES", limit)
        assert make(sources, prefetch_rows=64)._batches_ahead(0) == ahead
    monkeypatch.setattr(pipeline, "_AHEAD_BYTES", 8 * size)
    later = [{"from_step": 9, "batch_rows": 32}]
    assert make(sources, prefetch_rows=64, phases=later)._batches_ahead(0) == 2
    assert make(sources, prefetch_rows=64, phases=later, host_count=2)._batches_ahead(0) == 4


def test_no_thread_is_left_behind(sources):
    p = make(sources, read_threads=2)
    take(p.iterate(0), 2)
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_make_up_the_same_global_batch(sources, hosts):
    whole = make(sources)
    parts = [make(sources, host_index=i, host_count=hosts) for i in range(hosts)]
    for step in (0, 7):
        assert digest(batch_lib.concatenate([p.batch(step) for p in parts])) == digest(whole.batch(step))
    evaluations = zip(*[p.holdout_batches("media", batches=3, batch_rows=4) for p in parts], strict=True)
    for together, alone in zip(evaluations, whole.holdout_batches("media", batches=3, batch_rows=4), strict=True):
        assert digest(batch_lib.concatenate(list(together))) == digest(alone)
    assert {p.fingerprint for p in parts} == {whole.fingerprint}


def test_accounting_is_what_is_seen(sources):
    p = make(sources)
    seen = np.zeros(2, int)
    tokens = np.zeros(2, int)
    for step in range(60):
        assert p.rows_by_source(step) == {"media": seen[0], "text": seen[1]}
        b = p.batch(step)
        seen += np.bincount(b.source, minlength=2)
        tokens += [int((b.segment_ids[b.source == i] > 0).sum()) for i in range(2)]
    assert seen.tolist() == [160, 320]
    np.testing.assert_allclose(tokens / (seen * 48), list(p.fill().values()), atol=0.02)
    trained = [keys_of(source["path"], holdout=0.2)[1] for source in sources]
    epochs = [tokens[i] / trained[i][1] for i in range(2)]
    np.testing.assert_allclose(list(p.epochs_by_source(60).values()), epochs, rtol=0.05)
    assert p.tokens_per_step == 8 * 48


def keys_of(path, *, holdout):
    """(documents, tokens) held out and trained on, decided from the hash."""
    s = store.TokenStore.open(path)
    held = s.documents["key"].astype(float) / 2.0**64 < holdout
    return [(int(which.sum()), int(s.documents["tokens"][which].sum())) for which in (held, ~held)]


def test_held_out_documents_are_never_trained_on(sources):
    train, held = make(sources), make(sources, split="holdout")
    texts = [set(), set()]
    for texts_of, p in zip(texts, (train, held), strict=True):
        for step in range(40):
            b = p.batch(step)
            for row in np.flatnonzero(b.source == 1):
                for segment in range(1, b.segment_ids[row].max() + 1):
                    where = b.segment_ids[row] == segment
                    texts_of.add((int(b.positions[row][where][0]), b.tokens[row][where][:12].tobytes()))
    starts = [{text for position, text in part if position == 0 and len(text) == 48} for part in texts]
    (held_documents, _), (trained_documents, _) = keys_of(sources[1]["path"], holdout=0.2)
    assert 0 < held_documents < trained_documents
    assert not starts[0] & starts[1]
    assert len(starts[1]) <= held_documents
    for b in train.holdout_batches("text", batches=3, batch_rows=4):
        batch_lib.validate(b, vocab_size=272)
        assert set(b.source.tolist()) == {1}
        first = {b.tokens[r][:12].tobytes() for r in range(4) if b.positions[r, 0] == 0}
        assert not first & starts[0]


def test_holdout_wraps_around_and_is_named_when_empty(sources):
    p = make(sources)
    assert len(list(p.holdout_batches("media", batches=200, batch_rows=1))) == 200
    with pytest.raises(ValueError, match="no data source is called 'mdeia'; the recipe has media, text"):
        p.holdout_batches("mdeia", batches=1, batch_rows=1)
    with pytest.raises(ValueError, match="no documents in this split; change `holdout`"):
        make(sources, holdout=0.0).holdout_batches("media", batches=1, batch_rows=1)


def flip_a_byte(path, *, document):
    """Flips one bit inside the stored record of a text document."""
    shard = path / "shard-00000.array_record"
    data = bytearray(shard.read_bytes())
    s = store.TokenStore.open(path)
    text = s.read(document).tokens[5:25].astype(np.uint8).tobytes()
    at = bytes(data).find(text)
    assert at > 0, "the test needs the record uncompressed"
    data[at + 3] ^= 1
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_flipped_byte_becomes_padding_in_place(tmp_path, threads):
    rng = np.random.default_rng(0)
    path, damaged = tmp_path / "s", 4
    options = {"licence": "-", "origin": "-", "compression": "uncompressed"}
    with store.TokenStoreWriter(path, tokenizer=synthetic.TOKENIZER, image_patch=2, **options) as writer:
        for i in range(20):
            writer.add(
                synthetic.text_document(rng, key=str(i), length=60) if i == damaged else synthetic.media_document(rng, key=str(i), patch=2)
            )
    source = ({"name": "only", "path": str(path), "weight": 1.0},)
    healthy = make(source, holdout=0.0)
    expected = [healthy.batch(step) for step in range(10)]
    signature = store.TokenStore.open(path).read(damaged).tokens

    flip_a_byte(path, document=damaged)
    reported = []
    p = make(source, holdout=0.0, read_threads=threads, prefetch_rows=16, on_bad_record=reported.append)
    got = take(p.iterate(0), 10)
    lost = 0
    for a, b in zip(expected, got, strict=True):
        batch_lib.validate(b, vocab_size=272)
        hole = (a.segment_ids > 0) & (b.segment_ids == 0)
        lost += int(hole.sum())
        np.testing.assert_array_equal(np.isin(a.tokens[hole], signature), True)
        for name in vars(a):
            x, y = getattr(a, name), getattr(b, name)
            if name == "n_bad":
                assert not x.any()
                assert y[:, 0].tolist() == [int((np.diff(mask.astype(int), prepend=0) == 1).sum()) for mask in hole]
            elif x.shape == hole.shape:
                np.testing.assert_array_equal(x[~hole], y[~hole], err_msg=name)
            else:
                np.testing.assert_array_equal(x, y, err_msg=name)
        assert not b.loss_weight[hole].any()
        assert (b.tokens[hole] == synthetic.TOKENIZER.pad).all()
    assert lost >= 60
    assert [record.document for record in p.quarantine.records] == [damaged]
    assert reported == p.quarantine.records
    assert p.quarantine.pieces >= 2
    with pytest.raises(ValueError, match="is damaged"):
        store.TokenStore.open(path).verify()


def test_fingerprint_follows_what_decides_a_batch(sources, tmp_path):
    base = make(sources).fingerprint
    assert make(sources, read_threads=0, prefetch_rows=3).fingerprint == base
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "text").rename(elsewhere)
    moved = (sources[0], sources[1] | {"path": str(elsewhere)})
    assert make(moved).fingerprint == base
    changed = [
        make(moved, seed=4),
        make(moved, holdout=0.3),
        make(moved, sequence_length=50),
        make(moved, batch_rows=4),
        make(moved, split="holdout"),
        make((moved[0], moved[1] | {"weight": 3.0})),
        make((moved[0] | {"packing": "no_split"}, moved[1])),
        make(moved[::-1]),
    ]
    assert len({p.fingerprint for p in changed} | {base}) == len(changed) + 1


def test_histogram_is_what_training_sees(sources):
    p = make(sources, holdout=0.0)
    seen = np.zeros(272)
    for step in range(150):
        b = p.batch(step)
        seen += np.bincount(b.tokens[(b.segment_ids > 0) & (b.modality == 0)], minlength=272)
    expected = p.token_histogram()
    assert expected.shape == (272,)
    assert expected.sum() == pytest.approx(1)
    assert expected[[259, 260]].tolist() == [0, 0]
    np.testing.assert_allclose(seen / seen.sum(), expected, atol=2e-3)


def test_errors_name_source_value_and_remedy(sources, tmp_path):
    with pytest.raises(ValueError, match=r"data source 'media': data store .*nowhere: no such directory"):
        make((sources[0] | {"path": str(tmp_path / "nowhere")},))
    with pytest.raises(ValueError, match=r"image patches of 2 pixels, but `image_patch` is 4: set it to 2"):
        make(sources, image_patch=4)
    with pytest.raises(ValueError, match="`max_patches` is 0"):
        make(sources, max_patches=0)
    with pytest.raises(ValueError, match=r"a batch of 6 rows .* make it a multiple of 4"):
        make(sources, batch_rows=6, host_count=4)
    with pytest.raises(ValueError, match="two sources are called 'text'"):
        make((sources[1], sources[1]))


def test_a_store_of_another_tokenizer_is_refused(sources, monkeypatch):
    monkeypatch.setattr(pipeline.tokenizer_lib.ByteTokenizer, "fingerprint", "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        make(sources)
