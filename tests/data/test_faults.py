"""Damage while a stream runs: the hole is padding of exactly the lost pieces, everything else is what it was, and a replay is identical."""

import pathlib

import jax
import numpy as np
import pytest
from array_record.python import array_record_module

from tests.data import synthetic
from tests.data.test_megatron import patch_index, write_pair
from v4train.data import batch as batch_lib
from v4train.data import config, document, pipeline, sources, store, tokenizer

STEPS = 12
FINGERPRINT = synthetic.TOKENIZER.fingerprint


def text(n=24):
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, int(length)).astype(np.uint32) for length in rng.integers(30, 90, n)]


def write_store(path, documents, *, layout, shard_tokens=400):
    options = {"licence": "-", "origin": "-", "compression": "uncompressed", "layout": layout, "shard_tokens": shard_tokens}
    with store.TokenStoreWriter(path, tokenizer=synthetic.TOKENIZER, image_patch=2, **options) as writer:
        for i, d in enumerate(documents):
            writer.add(d if isinstance(d, document.Document) else document.Document(key=str(i), tokens=d))
    return {"name": "only", "path": str(path), "weight": 1.0}


def write_megatron(path, documents):
    write_pair(path, [[d] for d in documents], code=4)
    return {"name": "only", "path": str(path), "weight": 1.0, "kind": "megatron", "tokenizer_fingerprint": FINGERPRINT}


def write_array_record(path, documents):
    path.mkdir()
    for part in range(2):
        writer = array_record_module.ArrayRecordWriter(str(path / f"{part}.array_record"), "group_size:1,uncompressed")
        for d in documents[part::2]:
            writer.write(d.astype("<u2").tobytes())
        writer.close()
    stated = {"dtype": "uint16", "tokenizer_fingerprint": FINGERPRINT, "index_directory": str(path / "index")}
    return {"name": "only", "path": str(path), "weight": 1.0, "kind": "array_record", **stated}


def open_pipeline(source, **changes):
    defaults = {"sequence_length": 48, "image_patch": 2, "max_patches": 12, "max_audio_frames": 12, "read_threads": 0}
    return pipeline.Pipeline(config.DataConfig.model_validate({"sources": [source], **(defaults | changes)}), batch_rows=4)


def batches_of(p):
    iterator = p.iterate(0)
    batches = [next(iterator) for _ in range(STEPS)]
    iterator.close()
    return batches


def check_hole(healthy, got, *, lost):
    """``got`` is ``healthy`` with padding where tokens of ``lost`` (arrays of ids) were; returns how many tokens went."""
    count = 0
    for a, b in zip(healthy, got, strict=True):
        batch_lib.validate(b, vocab_size=272)
        hole = (a.segment_ids > 0) & (b.segment_ids == 0)
        count += int(hole.sum())
        for name, x in vars(a).items():
            y = getattr(b, name)
            if x.shape == hole.shape:
                np.testing.assert_array_equal(x[~hole], y[~hole], err_msg=name)
        assert not b.loss_weight[hole].any()
        assert (b.tokens[hole] == synthetic.TOKENIZER.pad).all()
        for row in range(len(hole)):
            for segment in np.unique(a.segment_ids[row][hole[row]]):
                where = a.segment_ids[row] == segment
                assert hole[row][where].all(), "a piece is padding as a whole or not at all"
                ids, at = a.tokens[row][where].astype(np.uint32), int(a.positions[row][where][0])
                assert any(np.array_equal(d[at : at + len(ids)], ids) for d in lost)
    return count


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def flip(directory, content):
    for path in sorted(directory.glob("*.*")):
        data = bytearray(path.read_bytes())
        at = bytes(data).find(content)
        if at >= 0:
            data[at + len(content) // 2] ^= 4
            path.write_bytes(bytes(data))
            return
    raise AssertionError("not found")


WIDTHS = {"records": "u1", "flat": "<u2", "array_record": "<u2"}


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_flipped_byte_costs_the_record_that_it_hits(tmp_path, kind):
    documents = text()
    path = tmp_path / "s"
    source = write_array_record(path, documents) if kind == "array_record" else write_store(path, documents, layout=kind)
    healthy = batches_of(open_pipeline(source))
    p = open_pipeline(source)
    flip(path, documents[5].astype(WIDTHS[kind]).tobytes())
    got = batches_of(p)
    assert check_hole(healthy, got, lost=[documents[5]]) >= len(documents[5])
    number = len(documents[0::2]) + 2 if kind == "array_record" else 5
    assert [(r.source, r.document) for r in p.quarantine.records] == [("only", number)]
    if kind != "array_record":  # whose lengths are counted anew where the files have changed
        same(got, batches_of(open_pipeline(source)))


@pytest.mark.parametrize("kind", ["records", "flat", "megatron", "array_record"])
@pytest.mark.parametrize("fault", ["truncated", "gone"])
def test_a_file_that_shrinks_or_disappears_while_running(tmp_path, kind, fault):
    documents = text()
    path = tmp_path / "s"
    write = {"megatron": write_megatron, "array_record": write_array_record}.get(kind)
    source = write(path, documents) if write else write_store(path, documents, layout=kind)
    healthy = batches_of(open_pipeline(source))
    p = open_pipeline(source)  # nothing has been read yet: files are opened when they are needed
    pattern = {"records": "shard-00001.*", "flat": "shard-00001.*", "megatron": "s.bin", "array_record": "1.*"}[kind]
    (victim,) = (path.parent if kind == "megatron" else path).glob(pattern)
    if fault == "gone":
        victim.unlink()
    else:
        with victim.open("r+b") as file:
            file.truncate(victim.stat().st_size // 2)
    got = batches_of(p)
    assert check_hole(healthy, got, lost=documents) > 100
    assert p.quarantine.records
    same(got, batches_of(p))


@pytest.mark.parametrize("damage", [{"pointer": (7, 10**8)}, {"pointer": (7, -1)}])
def test_a_bad_pointer_of_megatron(tmp_path, damage):
    documents = text()
    source = write_megatron(tmp_path / "s", documents)
    healthy = batches_of(open_pipeline(source))
    patch_index(tmp_path / "s", sequences=len(documents), **damage)
    p = open_pipeline(source)
    got = batches_of(p)
    assert check_hole(healthy, got, lost=[documents[7]]) >= len(documents[7])
    assert [r.document for r in p.quarantine.records] == [7]
    same(got, batches_of(open_pipeline(source)))


def test_a_negative_size_of_megatron_is_padding_and_reported(tmp_path):
    documents = text()
    source = write_megatron(tmp_path / "s", documents)
    patch_index(tmp_path / "s", sequences=len(documents), size=(7, -3))
    p = open_pipeline(source)
    got = batches_of(p)
    for b in got:
        batch_lib.validate(b, vocab_size=272)
    assert [r.document for r in p.quarantine.records] == [7]
    assert any(((b.segment_ids == 0).sum(axis=1) == 1).any() for b in got), "the document counts as one token"
    same(got, batches_of(open_pipeline(source)))


@pytest.mark.parametrize("kind", [document.IMAGE, document.AUDIO])
def test_a_flipped_byte_of_media_costs_its_document(tmp_path, kind):
    rng = np.random.default_rng(4)
    documents = [synthetic.media_document(rng, key=str(i), patch=2) for i in range(40)]
    path = tmp_path / "s"
    source = write_store(path, documents, layout="flat")
    healthy = batches_of(open_pipeline(source))
    victim = next(d for d in documents if len(d.patches if kind == document.IMAGE else d.audio) > 3)
    span = next(s for s in victim.spans.tolist() if s[0] == kind)
    flip(path, (victim.patches if kind == document.IMAGE else victim.audio)[: span[2]].tobytes())
    p = open_pipeline(source)
    got = batches_of(p)
    assert check_hole(healthy, got, lost=[victim.tokens]) > 0
    assert [r.document for r in p.quarantine.records] == [next(i for i, d in enumerate(documents) if d is victim)]
    for a, b in zip(healthy, got, strict=True):
        for slots, payload in ((b.patch_slot, "patches"), (b.patch_slot, "patch_xy"), (b.audio_slot, "audio")):
            for row in range(4):
                used = slots[row][slots[row] >= 0]
                np.testing.assert_array_equal(getattr(a, payload)[row][used], getattr(b, payload)[row][used])
                rest = np.setdiff1d(np.arange(getattr(b, payload).shape[1]), used)
                assert not getattr(b, payload)[row][rest].any(), "what no slot points at is blank"
    same(got, batches_of(open_pipeline(source)))


def test_wrong_counts_are_refused(tmp_path):
    source = write_store(tmp_path / "s", text(), layout="flat")
    manifest = tmp_path / "s" / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good.replace('"documents": 24,', '"documents": 23,', 1))
    with pytest.raises(ValueError, match=r"data source 'only': .* its index and its manifest disagree"):
        open_pipeline(source)
    manifest.write_text(good)
    (tmp_path / "s" / "shard-00000.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00000\.tokens has 0 bytes instead of"):
        open_pipeline(source)


def test_a_wrong_tokenizer_is_refused(tmp_path, monkeypatch):
    documents = text()
    (tmp_path / "m").mkdir()
    every = [
        write_store(tmp_path / "s", documents, layout="flat"),
        write_megatron(tmp_path / "m" / "m", documents),
        write_array_record(tmp_path / "a", documents),
    ]
    for source in every:
        open_pipeline(source)
    stated = {**every[1], "tokenizer_fingerprint": "0" * 12}
    with pytest.raises(ValueError, match=f"data source 'only': `tokenizer_fingerprint` is 000000000000, but .* has {FINGERPRINT[:16]}"):
        open_pipeline(stated)
    monkeypatch.setattr(tokenizer.ByteTokenizer, "fingerprint", "f" * 64)
    for source in every:
        with pytest.raises(ValueError, match=r"another tokenizer|change `tokenizer`"):
            open_pipeline(source)


def test_all_kinds_give_the_same_rows(tmp_path):
    """Packing depends on lengths and order alone; only the order of the two ArrayRecord files differs."""
    documents = text()
    a = batches_of(open_pipeline(write_store(tmp_path / "r", documents, layout="records")))
    same(a, batches_of(open_pipeline(write_store(tmp_path / "f", documents, layout="flat"))))
    same(a, batches_of(open_pipeline(write_megatron(tmp_path / "m", documents))))
    mixed = documents[0::2] + documents[1::2]
    b = batches_of(open_pipeline(write_store(tmp_path / "x", mixed, layout="flat")))
    same(b, batches_of(open_pipeline(write_array_record(tmp_path / "a", documents))))


def test_every_kind_of_source_opens(tmp_path):
    """A kind that is added to the union without a reader is noticed here."""
    members = {model.model_fields["kind"].default for model in config.SourceConfig.__subclasses__()}
    assert members == {"store", "megatron", "array_record"}
    documents = text()
    made = [write_store(tmp_path / "s", documents, layout="flat"), write_megatron(tmp_path / "m", documents)]
    made.append(write_array_record(tmp_path / "a", documents))
    for source in config.DataConfig.model_validate(
        {"sources": [m | {"name": f"n{i}"} for i, m in enumerate(made)], "sequence_length": 9}
    ).sources:
        opened = sources.open_store(source, tokenizer=synthetic.TOKENIZER, image_patch=4)
        assert int(opened.documents["tokens"].sum()) == sum(map(len, documents))
        assert isinstance(opened.path, pathlib.Path)
