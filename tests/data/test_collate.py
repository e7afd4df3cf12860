"""Rows from pieces: against a walk over tokens, for whole rows and for slices that cut media."""

import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import batch as batch_lib
from v4train.data import collate, decoded, document, store


def make_store(path, documents, *, layout):
    options = {"licence": "-", "origin": "-", "compression": "zstd:1", "layout": layout}
    with store.TokenStoreWriter(path, tokenizer=synthetic.TOKENIZER, image_patch=2, **options) as writer:
        for d in documents:
            writer.add(d)
    return store.TokenStore.open(path)


def media_documents(n=12):
    rng = np.random.default_rng(7)
    return [synthetic.media_document(rng, key=str(i), patch=2) for i in range(n)]


def garbage(rows, *, length, patches, frames):
    """A batch whose every byte is wrong, so that one that is not written shows."""
    b = batch_lib.allocate(rows, sequence_length=length, max_patches=patches, max_audio_frames=frames, image_patch=2)
    for array in vars(b).values():
        array.view(np.uint8)[...] = 0x5A
    b.source[...] = 0
    return b


def by_walking(documents, pieces, *, length, patches, frames, segment, continued):
    """One row, token by token."""
    b = batch_lib.empty(1, sequence_length=length, max_patches=patches, max_audio_frames=frames, image_patch=2, pad=synthetic.TOKENIZER.pad)
    at = {1: 0, 2: 0}
    place = 0
    for number, (i, start, stop) in enumerate(pieces):
        d = documents[i]
        seen = {1: 0, 2: 0}
        for t in range(stop):
            kind = int(d.modality[t])
            if t >= start:
                b.tokens[0, place], b.segment_ids[0, place], b.positions[0, place] = d.tokens[t], segment + number, t
                b.modality[0, place] = kind
                b.loss_weight[0, place] = d.tokens[t] not in synthetic.TOKENIZER.never_targets
                if kind:
                    (b.patch_slot if kind == 1 else b.audio_slot)[0, place] = at[kind]
                    if kind == 1:
                        b.patches[0, at[1]], b.patch_xy[0, at[1]] = d.patches[seen[1]], d.patch_xy[seen[1]]
                    else:
                        b.audio[0, at[2]] = d.audio[seen[2]]
                    at[kind] += 1
                place += 1
            if kind:
                seen[kind] += 1
    b.n_documents[...] = len(pieces) - continued
    return b


@pytest.mark.parametrize("layout", ["records", "flat"])
def test_rows_are_those_of_the_walk(tmp_path, layout):
    documents = media_documents()
    s = make_store(tmp_path / "s", documents, layout=layout)
    reader = collate.Reader(s, name="a", quarantine=collate.Quarantine())
    rng = np.random.default_rng(0)
    shape = {"length": 400, "patches": 90, "frames": 90}
    rows = []
    for k in range(20):
        pieces, room = [], 400
        for i in rng.permutation(len(documents)).tolist():
            n = len(documents[i].tokens)
            start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
            if start < stop <= start + room and len(pieces) < 5:
                pieces.append((i, start, stop))
                room -= stop - start
        rows.append(collate.RowPieces(reader, pieces, segment=1 + k % 3, continued=bool(k % 2)))
    b = garbage(len(rows), **shape)
    collate.fill(b, rows, tokenizer=synthetic.TOKENIZER)
    for k, row in enumerate(rows):
        expected = by_walking(documents, row.pieces, segment=row.segment, continued=row.continued, **shape)
        for name, array in vars(expected).items():
            got = getattr(b, name)[k : k + 1]
            np.testing.assert_array_equal(got, 0 if name in ("n_bad", "source") else array, err_msg=name)


def test_a_bad_document_counts_in_the_slice_in_which_it_begins(tmp_path):
    """Or hosts that share a row would count it once each, and stop a run too early."""
    rng = np.random.default_rng(0)
    s = make_store(tmp_path / "s", [synthetic.text_document(rng, key=str(i), length=30) for i in range(3)], layout="flat")
    (tmp_path / "s" / "shard-00000.tokens").write_bytes(b"")
    reader = collate.Reader(s, name="a", quarantine=collate.Quarantine())
    b = garbage(2, length=70, patches=0, frames=0)
    rows = [collate.RowPieces(reader, [(0, 0, 30), (1, 0, 20)]), collate.RowPieces(reader, [(1, 20, 30), (2, 0, 30)], continued=True)]
    collate.fill(b, rows, tokenizer=synthetic.TOKENIZER)
    assert b.n_documents.tolist() == [[2], [1]]
    assert b.n_bad.tolist() == [[2], [1]]


def test_long_documents_are_read_in_chunks(tmp_path):
    """Pieces of a document of several checksums, on, before and behind the edges of a chunk."""
    rng = np.random.default_rng(1)
    ids = rng.integers(97, 123, 40_000).astype(np.uint32)
    s = make_store(tmp_path / "s", [document.Document(key="a", tokens=ids)], layout="flat")
    for start, stop in ((0, 1), (8191, 8193), (8192, 16384), (100, 39_999), (39_999, 40_000), (0, 40_000)):
        out = np.empty(stop - start, np.int32)
        assert not s.read_pieces(store.Pieces.of([(0, start, stop)]), out=out)
        np.testing.assert_array_equal(out, ids[start:stop])
    shard = tmp_path / "s" / "shard-00000.tokens"
    data = bytearray(shard.read_bytes())
    data[2 * 20_000] ^= 1
    shard.write_bytes(bytes(data))
    bad = s.read_pieces(
        store.Pieces.of([(0, 0, 16384), (0, 16383, 16385), (0, 24575, 24577), (0, 24576, 40_000)]), out=np.empty(31_812, np.int32)
    )
    assert sorted(bad) == [1, 2], "only pieces that touch the chunk 16384:24576 are lost"
    with pytest.raises(document.DamagedRecordError, match="wrong checksum"):
        s.read(0)


def test_documents_of_a_batch_are_loaded_together(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    documents = [synthetic.text_document(rng, key=str(i), length=30) for i in range(50)]
    s = make_store(tmp_path / "s", documents, layout="records")
    calls = []
    monkeypatch.setattr(s._records, "read", lambda i: calls.append(i))
    reader = collate.Reader(s, name="a", quarantine=collate.Quarantine())
    b = garbage(10, length=150, patches=0, frames=0)
    rows = [collate.RowPieces(reader, [(5 * k + i, 0, 30) for i in range(5)]) for k in range(10)]
    collate.fill(b, rows, tokenizer=synthetic.TOKENIZER)
    assert not calls
    np.testing.assert_array_equal(b.tokens.reshape(50, 30), np.stack([d.tokens for d in documents]))


def test_the_memory_of_decoded_documents_is_bounded():
    latest = decoded.Latest(20_000)
    for i in range(100):
        latest.put(i, document.Document(key="", tokens=np.zeros(1000, np.uint32)))
        assert latest.get(i) is not None
    assert [i for i in range(100) if latest.get(i) is not None] == [96, 97, 98, 99]
    latest.put(100, document.Document(key="", tokens=np.zeros(10**6, np.uint32)))
    assert [i for i in range(101) if latest.get(i) is not None] == [100], "the latest is held whatever its size"


def test_the_threads_of_a_quarantine_report_a_document_once():
    reported = []
    quarantine = collate.Quarantine(reported.append)
    for _ in range(3):
        quarantine.add(collate.BadRecord("a", 1, "shard, record 1", "why"))
    assert len(reported) == len(quarantine.records) == 1
    assert quarantine.pieces == 3
