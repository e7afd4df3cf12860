"""Megatron's `.bin/.idx` as documents: against a writer made from the format's description, and with every damage that can be seen."""

import struct

import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import document, megatron, store

CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def write_pair(stem, documents, *, code=8, modes=False):
    """Documents are lists of sequences; the index is packed field by field."""
    sequences = [np.asarray(s, CODES[code]) for d in documents for s in d]
    stem.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    marks, pointer, pointers = [0], 0, []
    for d in documents:
        marks.append(marks[-1] + len(d))
    for s in sequences:
        pointers.append(pointer)
        pointer += s.nbytes
    parts = [b"MMIDIDX\x00\x00", struct.pack("<Q", 1), struct.pack("<B", code), struct.pack("<Q", len(sequences))]
    parts += [struct.pack("<Q", len(marks)), *(struct.pack("<i", len(s)) for s in sequences)]
    parts += [*(struct.pack("<q", p) for p in pointers), *(struct.pack("<q", m) for m in marks)]
    stem.with_suffix(".idx").write_bytes(b"".join(parts) + bytes(len(sequences) * modes))
    return stem


def some_documents(seed=0, n=30):
    """One to three sequences each, some of them empty, all ids of the byte tokenizer's text."""
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, 127, rng.integers(0, 90)) for _ in range(rng.integers(1, 4))] for _ in range(n)] + [[[]], [[], [7]]]


def pieces_of(s, chosen):
    return store.Pieces.of([(i, 0, int(s.documents["tokens"][i])) for i in chosen])


def read_all(s, chosen):
    pieces = pieces_of(s, chosen)
    out = np.full(int((pieces.stops - pieces.starts).sum()), -1, np.int32)
    return out, s.read_pieces(pieces, out=out)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_documents_are_those_that_were_written(tmp_path, code, suffix):
    documents = some_documents()
    stem = write_pair(tmp_path / "corpus", documents, code=code, modes=code == 4)
    s = megatron.MegatronStore(f"{stem}{suffix}", tokenizer=synthetic.TOKENIZER)
    joined = [np.concatenate(d) for d in documents if sum(map(len, d))]
    assert len(s) == len(joined)
    assert s.documents["tokens"].tolist() == [len(d) for d in joined]
    for i, expected in enumerate(joined):
        np.testing.assert_array_equal(s.read(i).tokens, expected)
    order = [5, 0, len(s) - 1, 5]
    out, bad = read_all(s, order)
    assert not bad
    np.testing.assert_array_equal(out, np.concatenate([joined[i] for i in order]))
    np.testing.assert_array_equal(s.histogram, np.bincount(np.concatenate(joined).astype(int), minlength=272))


def test_a_part_of_a_document_is_read_alone(tmp_path):
    s = megatron.MegatronStore(write_pair(tmp_path / "c", [[np.arange(100)], [np.arange(100, 250)]]), tokenizer=synthetic.TOKENIZER)
    out = np.empty(30, np.int32)
    assert not s.read_pieces(store.Pieces.of([(1, 40, 60), (0, 90, 100)]), out=out)
    assert out.tolist() == [*range(140, 160), *range(90, 100)]


def test_without_believable_marks_every_sequence_is_a_document(tmp_path):
    stem = write_pair(tmp_path / "c", [[[1, 2], [3]], [[4, 5, 6]]])
    idx = bytearray(stem.with_suffix(".idx").read_bytes())
    idx[-8:] = struct.pack("<q", 99)
    stem.with_suffix(".idx").write_bytes(bytes(idx))
    s = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    assert [s.read(i).tokens.tolist() for i in range(len(s))] == [[1, 2], [3], [4, 5, 6]]


def test_fingerprint_follows_documents_and_tokenizer(tmp_path):
    def fingerprint(name, documents, code=8):
        return megatron.MegatronStore(write_pair(tmp_path / name, documents, code=code), tokenizer=synthetic.TOKENIZER).fingerprint

    a = some_documents()
    first = fingerprint("a", a)
    assert fingerprint("b", a) == first
    assert len({first, fingerprint("c", a[::-1]), fingerprint("d", a, code=4), fingerprint("e", [*a[:-1], [[8]]])}) == 4


def patch_index(stem, *, sequences, size=None, pointer=None):
    """Overwrites the size or the pointer of one sequence."""
    idx = bytearray(stem.with_suffix(".idx").read_bytes())
    for field, value, width, code in (("size", size, 4, "<i"), ("pointer", pointer, 8, "<q")):
        if value is not None:
            number, new = value
            at = 34 + (0 if field == "size" else 4 * sequences) + number * width
            idx[at : at + width] = struct.pack(code, new)
    stem.with_suffix(".idx").write_bytes(bytes(idx))


@pytest.mark.parametrize(
    ("damage", "length", "message"),
    [
        ({"pointer": (3, 10**9)}, 40, "the file ends"),
        ({"pointer": (3, -2)}, 40, "its pointer in the .idx is -2"),
        ({"pointer": (3, 2**62)}, 40, "unreadable|the file ends"),
        ({"size": (3, -5)}, 1, "cannot be"),
        ({"size": (3, 2**31 - 1)}, 1, "cannot be"),
    ],
)
def test_a_bad_entry_of_the_index_is_one_bad_document(tmp_path, damage, length, message):
    documents = [[np.arange(40) + i] for i in range(8)]
    stem = write_pair(tmp_path / "c", documents)
    patch_index(stem, sequences=8, **damage)
    s = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    assert s.documents["tokens"].tolist() == [40, 40, 40, length, 40, 40, 40, 40]
    out, bad = read_all(s, range(8))
    assert list(bad) == [3]
    assert type(bad[3]) is document.DamagedRecordError
    with pytest.raises(document.DamagedRecordError, match=message):
        s.read(3)
    rest = np.delete(np.arange(len(out)), np.arange(120, 120 + length))
    np.testing.assert_array_equal(out[rest], np.concatenate([d[0] for i, d in enumerate(documents) if i != 3]))
    assert "c.bin, byte" in s.where(3)


def test_sequences_of_a_document_that_lie_apart_are_bad(tmp_path):
    stem = write_pair(tmp_path / "c", [[[1, 2], [3]], [[4, 5], [6]]])
    patch_index(stem, sequences=4, pointer=(3, 0))
    s = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    assert s.read(0).tokens.tolist() == [1, 2, 3]
    with pytest.raises(document.DamagedRecordError, match="cannot be"):
        s.read(1)


def test_what_lies_between_documents_is_nobody_s(tmp_path):
    """Only within a document must sequences follow each other."""
    stem = write_pair(tmp_path / "c", [[[1, 2], [3]], [[4, 5], [6]]])
    for sequence, token in ((2, 0), (3, 2)):
        patch_index(stem, sequences=4, pointer=(sequence, 2 * token))
    s = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    assert [s.read(i).tokens.tolist() for i in range(2)] == [[1, 2, 3], [1, 2, 3]]


def test_ids_that_cannot_be_are_bad(tmp_path):
    wrong = {1: 272, 3: -1, 4: synthetic.TOKENIZER.image, 6: synthetic.TOKENIZER.audio}
    documents = [[np.array([1, wrong.get(i, 2), 3])] for i in range(8)]
    s = megatron.MegatronStore(write_pair(tmp_path / "c", documents, code=4), tokenizer=synthetic.TOKENIZER)
    out, bad = read_all(s, range(8))
    assert sorted(bad) == sorted(wrong)
    assert str(bad[1]) == "id 272 of token 1 is outside the vocabulary of 272"
    assert str(bad[4]) == "id 259 of token 1 is a media placeholder"
    assert out[:3].tolist() == [1, 2, 3]
    for i in wrong:  # alone: one kind must not be found because of another
        with pytest.raises(document.DamagedRecordError, match=r"outside the vocabulary|placeholder"):
            s.read(i)
    wide = [[np.array([1, 2**32 + 5, 3])], [[4]]]
    s = megatron.MegatronStore(write_pair(tmp_path / "w", wide, code=5), tokenizer=synthetic.TOKENIZER)
    assert list(read_all(s, range(2))[1]) == [0]


def test_a_file_that_shrinks_or_goes_away_is_bad_records(tmp_path):
    stem = write_pair(tmp_path / "c", [[np.full(50, i)] for i in range(10)])
    s = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    assert not read_all(s, range(10))[1]
    with stem.with_suffix(".bin").open("r+b") as file:
        file.truncate(100 * 5 + 10)
    assert list(read_all(s, range(10))[1]) == [5, 6, 7, 8, 9]
    later = megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    stem.with_suffix(".bin").unlink()
    assert list(read_all(later, range(10))[1]) == list(range(10))


def test_what_is_not_the_format_is_refused(tmp_path):
    stem = write_pair(tmp_path / "c", some_documents())
    idx = stem.with_suffix(".idx")
    good = idx.read_bytes()
    cases = {
        "does not begin with MMIDIDX": b"x" + good[1:],
        "version 2, this program reads 1": good[:9] + struct.pack("<Q", 2) + good[17:],
        "dtype code 7; ids are integers": good[:17] + b"\x07" + good[18:],
        "sequences need": good[:-1],
    }
    for message, content in cases.items():
        idx.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    idx.unlink()
    with pytest.raises(ValueError, match=r"c\.idx is missing; a data set is the pair"):
        megatron.MegatronStore(stem, tokenizer=synthetic.TOKENIZER)
    with pytest.raises(ValueError, match="no documents"):
        megatron.MegatronStore(write_pair(tmp_path / "e", [[[]]]), tokenizer=synthetic.TOKENIZER)
