"""ArrayRecord files of raw ids as documents, their kept lengths, and their damage."""

import numpy as np
import pytest
from array_record.python import array_record_module

from tests.data import synthetic
from v4train.data import array_record_tokens, document, foreign, store


def write_files(root, documents, *, dtype, per_file=7, options="group_size:1,uncompressed"):
    root.mkdir()
    for k in range(0, len(documents), per_file):
        writer = array_record_module.ArrayRecordWriter(str(root / f"part-{k:04d}.array_record"), options)
        for d in documents[k : k + per_file]:
            writer.write(np.asarray(d).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        writer.close()
    return root


def some_documents(n=30):
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, rng.integers(1, 90)) for _ in range(n)]


def open_tokens(root, *, dtype="uint16", cache=None):
    directory = cache or root.parent / "cache"
    return array_record_tokens.ArrayRecordTokens(root, dtype=dtype, tokenizer=synthetic.TOKENIZER, index_directory=directory)


def read_all(s):
    pieces = store.Pieces.of([(i, 0, int(n)) for i, n in enumerate(s.documents["tokens"])])
    out = np.full(int(pieces.stops.sum()), -1, np.int32)
    s.load(range(len(s)))
    return out, s.read_pieces(pieces, out=out)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_documents_are_those_that_were_written(tmp_path, dtype):
    documents = some_documents()
    s = open_tokens(write_files(tmp_path / "a", documents, dtype=dtype), dtype=dtype)
    assert s.documents["tokens"].tolist() == [len(d) for d in documents]
    for i, expected in enumerate(documents):
        np.testing.assert_array_equal(s.read(i).tokens, expected)
    out, bad = read_all(s)
    assert not bad
    np.testing.assert_array_equal(out, np.concatenate(documents))
    np.testing.assert_array_equal(s.histogram, np.bincount(np.concatenate(documents), minlength=272))
    assert s.where(8) == "part-0007.array_record, record 1"


def test_tokens_are_counted_once(tmp_path, monkeypatch):
    root = write_files(tmp_path / "a", some_documents(), dtype="uint16")
    first = open_tokens(root)
    monkeypatch.setattr(array_record_tokens.ArrayRecordTokens, "_count", None)
    root.rename(tmp_path / "moved")
    again = open_tokens(tmp_path / "moved")
    np.testing.assert_array_equal(again.documents, first.documents)
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("length", [0, 60, 150])
def test_kept_lengths_that_were_cut_short_are_counted_again(tmp_path, length):
    root = write_files(tmp_path / "a", some_documents(), dtype="uint16")
    first = open_tokens(root)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    np.testing.assert_array_equal(open_tokens(root).documents, first.documents)
    assert kept.read_bytes() == whole


def test_a_directory_that_cannot_be_written_costs_time_only(tmp_path, caplog):
    root = write_files(tmp_path / "a", some_documents(), dtype="uint16")
    (tmp_path / "file").write_text("not a directory")
    s = open_tokens(root, cache=tmp_path / "file" / "below")
    assert len(s) == 30
    assert "could not be kept" in caplog.text


def test_fingerprint_follows_files_dtype_and_order(tmp_path):
    documents = some_documents()
    prints = {
        open_tokens(write_files(tmp_path / str(i), d, dtype=dtype), dtype=dtype).fingerprint
        for i, (d, dtype) in enumerate(
            [(documents, "uint16"), (documents[::-1], "uint16"), (documents, "int32"), (documents[:-1], "uint16")]
        )
    }
    assert len(prints) == 4
    assert open_tokens(write_files(tmp_path / "same", documents, dtype="uint16")).fingerprint in prints


def flip(root, content):
    for path in root.iterdir():
        data = bytearray(path.read_bytes())
        at = bytes(data).find(content)
        if at >= 0:
            data[at + 2] ^= 1
            path.write_bytes(bytes(data))
            return
    raise AssertionError("not found")


def test_damage_is_one_bad_document(tmp_path):
    documents = some_documents()
    documents[9] = np.arange(97, 122)
    root = write_files(tmp_path / "a", documents, dtype="uint16")
    before = open_tokens(root)
    flip(root, documents[9].astype("<u2").tobytes())
    fresh = array_record_tokens.ArrayRecordTokens(root, dtype="uint16", tokenizer=synthetic.TOKENIZER, index_directory=tmp_path / "other")
    for s, length in ((before, 25), (fresh, 1)):
        assert int(s.documents["tokens"][9]) == length
        out, bad = read_all(s)
        assert list(bad) == [9]
        expected = [d if i != 9 else np.zeros(length) for i, d in enumerate(documents)]
        mask = np.concatenate([np.full(len(d), i != 9) for i, d in enumerate(expected)])
        np.testing.assert_array_equal(out[mask], np.concatenate(expected)[mask])
        with pytest.raises(document.DamagedRecordError):
            s.read(9)


def test_files_that_go_away_are_bad_records(tmp_path):
    root = write_files(tmp_path / "a", some_documents(), dtype="uint16")
    s = open_tokens(root)
    s._records._reader.cache_clear()
    (root / "part-0007.array_record").unlink()
    assert sorted(read_all(s)[1]) == list(range(7, 14))


def test_a_wrong_dtype_is_bad_records(tmp_path):
    """Ids of two bytes read as four are outside of the vocabulary or no whole number of ids."""
    s = open_tokens(write_files(tmp_path / "a", some_documents(), dtype="uint16"), dtype="uint32")
    assert len(read_all(s)[1]) == 30


def test_what_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_tokens(tmp_path / "nowhere")
    root = write_files(tmp_path / "a", some_documents(), dtype="uint16")
    path = next(root.iterdir())
    path.write_bytes(path.read_bytes()[:-70000] + b"\0" * 1000)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_tokens(root)


def test_keys_are_spread_evenly():
    keys = foreign.hash_of_numbers(100_000)
    assert len(np.unique(keys)) == 100_000
    counts = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert abs(counts - 6250).max() < 350
