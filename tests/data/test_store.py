"""A store gives back what was put in, and says what is wrong when it cannot."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import document, media, store

FIELDS = [field.name for field in dataclasses.fields(document.Document)]


def write(path, documents, **options):
    defaults = {"tokenizer": synthetic.TOKENIZER, "image_patch": 2, "licence": "CC0-1.0", "origin": "test", "compression": "zstd:1"}
    with store.TokenStoreWriter(path, **(defaults | options)) as writer:
        for d in documents:
            writer.add(d)
    return store.TokenStore.open(path)


def some_documents(n=12):
    rng = np.random.default_rng(3)
    media_documents = [synthetic.media_document(rng, key=f"m{i}", patch=2) for i in range(n)]
    return media_documents + [synthetic.text_document(rng, key=f"t{i}", length=5 + 7 * i) for i in range(n)]


@pytest.mark.parametrize("layout", ["records", "flat"])
def test_documents_come_back_exactly(tmp_path, layout):
    documents = some_documents()
    s = write(tmp_path / "s", documents, shard_tokens=300, layout=layout)
    s.verify()
    assert len(s) == len(documents)
    assert len(s.manifest["shards"]) > 2
    for i, expected in enumerate(documents):
        got = s.read(i)
        for name in FIELDS:
            if name == "patches" and not expected.patches.size:
                assert not got.patches.size
            elif name == "key" and layout == "flat":
                assert got.key == ""
            else:
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert s.documents[i]["key"] == store.key_hash(expected.key)


def test_index_and_manifest_count_what_is_there(tmp_path):
    documents = some_documents()
    s = write(tmp_path / "s", documents)
    text = np.concatenate([d.tokens[d.modality == 0] for d in documents])
    np.testing.assert_array_equal(s.histogram, np.bincount(text, minlength=272))
    patches, frames = sum(len(d.patches) for d in documents), sum(len(d.audio) for d in documents)
    assert s.manifest["tokens"] == {"text": len(text), "image": patches, "audio": frames}
    assert s.manifest["licence"] == "CC0-1.0"
    assert int(s.documents["patches"].sum()) == patches
    for i, d in enumerate(documents):
        np.testing.assert_array_equal(s.spans_of(i), d.spans)


def test_large_ids_survive_the_byte_planes():
    d = document.Document(key="k", tokens=np.array([0, 255, 256, 65_535, 65_536, 129_279, 2**32 - 1], np.uint32))
    np.testing.assert_array_equal(document.decode(document.encode(d)).tokens, d.tokens)


@pytest.mark.parametrize(("vocabulary", "width"), [(2**16, 2), (2**16 + 1, 4)])
def test_the_flat_layout_takes_two_bytes_a_token_or_four(tmp_path, monkeypatch, vocabulary, width):
    monkeypatch.setattr(type(synthetic.TOKENIZER), "vocab_size", vocabulary)
    d = document.Document(key="k", tokens=np.array([0, 255, 256, vocabulary - 1], np.uint32))
    s = write(tmp_path / "s", [d], layout="flat")
    assert (tmp_path / "s" / "shard-00000.tokens").stat().st_size == 4 * width
    assert not (tmp_path / "s" / "shard-00000.media").exists()
    np.testing.assert_array_equal(s.read(0).tokens, d.tokens)


def test_fingerprint_follows_the_content(tmp_path):
    documents = some_documents()
    first = write(tmp_path / "a", documents).fingerprint
    assert write(tmp_path / "b", documents).fingerprint == first
    documents[0] = dataclasses.replace(documents[0], key="other")
    assert write(tmp_path / "c", documents).fingerprint != first


def broken_documents():
    image = media.Patches(np.zeros((3, 12), np.uint8), np.zeros((3, 2), np.int16))
    good = document.compose(["ab", image, "c"], key="bad one", tokenizer=synthetic.TOKENIZER)
    moved = good.spans.copy()
    moved["at"] -= 1
    stray = good.tokens.copy()
    stray[1] = synthetic.TOKENIZER.audio
    foreign = good.tokens.copy()
    foreign[1] = 272
    loud = document.compose([np.full((2, 80), 16, np.uint8)], key="bad one", tokenizer=synthetic.TOKENIZER)
    return {
        "3 placeholders for 2 image patches": dataclasses.replace(good, patches=good.patches[:2]),
        "a span is not all placeholders": dataclasses.replace(good, spans=moved),
        "a placeholder of audio frames outside": dataclasses.replace(good, tokens=stray),
        "id 272 is outside the vocabulary": dataclasses.replace(good, tokens=foreign),
        "patches have 27 bytes instead of 12": dataclasses.replace(good, patches=np.zeros((3, 27), np.uint8)),
        "overlap or leave": dataclasses.replace(good, spans=np.repeat(good.spans, 2)),
        "coordinates differ": dataclasses.replace(good, patch_xy=good.patch_xy[:1]),
        "an audio level": loud,
        "no tokens": dataclasses.replace(good, tokens=good.tokens[:0]),
    }


@pytest.mark.parametrize("message", broken_documents())
def test_contradictions_are_refused(tmp_path, message):
    with pytest.raises(ValueError, match=f"document 'bad one' was refused: .*{message}"):
        write(tmp_path / "s", [broken_documents()[message]])
    with pytest.raises(ValueError, match="unfinished"):
        store.TokenStore.open(tmp_path / "s")


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such directory .* correct the path"):
        store.TokenStore.open(tmp_path / "nowhere")
    path = synthetic.make_test_store(tmp_path / "s")
    manifest = path / "manifest.json"
    original = manifest.read_text()

    manifest.write_text(json.dumps(json.loads(original) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99, this program reads 1; build the store again"):
        store.TokenStore.open(path)
    manifest.write_text(original[:50])
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        store.TokenStore.open(path)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match="version None"):
        store.TokenStore.open(path)
    for key in ("documents", "files", "image_patch", "shards", "tokenizer"):
        for other in ({}, {key: []}):
            manifest.write_text(json.dumps({name: value for name, value in json.loads(original).items() if name != key} | other))
            with pytest.raises(ValueError, match=r"build the store again"):
                store.TokenStore.open(path)
    manifest.write_text(original)

    spans = (path / "spans.npy").read_bytes()
    (path / "spans.npy").unlink()
    with pytest.raises(ValueError, match=r"spans\.npy is missing"):
        store.TokenStore.open(path)
    (path / "spans.npy").write_bytes(spans + b"x")
    with pytest.raises(ValueError, match=rf"spans\.npy has {len(spans) + 1} bytes instead of {len(spans)}"):
        store.TokenStore.open(path)
    (path / "spans.npy").write_bytes(spans)
    histogram = (path / "histogram.npy").read_bytes()
    (path / "histogram.npy").write_bytes(histogram[:-1] + b"x")
    with pytest.raises(ValueError, match=r"histogram\.npy is damaged \(sha256"):
        store.TokenStore.open(path)


def test_a_flipped_byte_of_a_record_is_found_by_verify(tmp_path):
    """Opening does not read the documents; each carries its own checksum."""
    path = synthetic.make_test_store(tmp_path / "s")
    shard = next(path.glob("*.array_record"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"array_record is damaged \(sha256"):
        store.TokenStore.open(path).verify()


def test_a_store_is_not_overwritten(tmp_path):
    path = synthetic.make_test_store(tmp_path / "s")
    with pytest.raises(ValueError, match="the directory is not empty"):
        synthetic.make_test_store(path)


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no document was added"):
        write(tmp_path / "s", [])


def test_an_unreadable_record_is_one_clear_error(tmp_path):
    path = synthetic.make_test_store(tmp_path / "s")
    for shard in path.glob("*.array_record"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(document.DamagedRecordError, match="unreadable"):
        store.TokenStore.open(path).read(0)
