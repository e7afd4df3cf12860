"""`v4train bench data` and `bench versus data` on a corpus of a few documents: complete results, the contract, and refusals."""

import json
import pathlib
import sys

import numpy as np
import pytest

from v4train.bench import corpus as corpus_lib
from v4train.bench import data, one_reader
from v4train.bench.versus import data as versus
from v4train.bench.versus import peers
from v4train.cli import main
from v4train.data import batch as batch_lib
from v4train.data import pipeline


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_lib.make(tmp_path_factory.mktemp("bench") / "corpus", text_tokens=60_000, image_patches=600)


def test_every_source_of_the_corpus_is_read_and_all_text_is_the_same(corpus):
    digests = []
    for name in ("flat", "records", "megatron", "images"):
        config = one_reader.config_of(corpus, name, length=2048, batch_rows=2, read_threads=0, ahead=2)
        p = pipeline.Pipeline(config, batch_rows=2)
        batch = p.batch(3)
        batch_lib.validate(batch, vocab_size=corpus_lib.VOCABULARY)
        digests.append(batch.tokens.tobytes())
        if name == "images":
            assert (batch.modality > 0).mean() == pytest.approx(corpus_lib.PATCH_SHARE, abs=0.1)
            assert batch.patches.shape == (2, 640, 3072)
    assert digests[0] == digests[1] == digests[2]


def test_a_corpus_is_found_again_and_nothing_is_overwritten(corpus, tmp_path):
    before = (corpus.root / "finished").stat().st_mtime_ns
    corpus_lib.make(corpus.root, text_tokens=60_000, image_patches=600)
    assert (corpus.root / "finished").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds something else"):
        corpus_lib.make(tmp_path, text_tokens=10, image_patches=10)


@pytest.mark.slow  # a fresh process with JAX for each case
def test_a_case_is_measured_in_its_own_process(corpus, capsys):
    cases = (data.Case("flat", 2048, 2, 30e6), data.Case("images", 2048, 2))
    options = {"text_tokens": 60_000, "image_patches": 600, "seconds": 0.05, "repeats": 2, "say": lambda text: None}
    result = json.loads(json.dumps(data.measure(corpus.root, cases=cases, **options)))
    assert (result["bench"], result["cpu_cores"] > 0, len(result["versions"])) == ("data", True, 4)
    text, images = result["cases"]
    for case in (text, images):
        assert case["tokens_per_second"]["min"] <= case["tokens_per_second"]["median"] <= case["tokens_per_second"]["max"]
        assert 0 < case["first_batch_seconds"] < 60
        assert case["resident_before_bytes"] <= case["peak_resident_bytes"] < 2e9
        assert case["bad_documents"] == 0
    assert list(text["restore_seconds"]) == ["1e+08", "1e+12"]
    assert list(images["restore_seconds"]) == ["1e+08", "1e+09"]
    assert images["restore_seconds"]["1e+09"] < images["counting_seconds"]["1e+09"], "a restore counted again"
    assert (text["media_share"], text["batch_bytes"]) < (images["media_share"], images["batch_bytes"])
    shown = data.table(result)
    assert f"{text['tokens_per_second']['median'] / 1e6:.1f}" in shown
    with pytest.raises(ValueError, match="--repeats 0"):
        data.measure(corpus.root, repeats=0)


def test_the_peers_packer_does_the_same_work(corpus):
    documents = list(corpus_lib.text_documents(60_000))
    batches = list(peers.pack(documents, 512, 4))
    tokens = np.concatenate([b["tokens"].ravel() for b in batches])
    np.testing.assert_array_equal(tokens, np.concatenate(documents)[: len(tokens)])
    assert len(tokens) > 50_000
    where = np.concatenate([np.arange(len(d)) for d in documents])[: len(tokens)]
    np.testing.assert_array_equal(np.concatenate([b["positions"].ravel() for b in batches]), where)
    assert all((b["segments"][:, 0] == 1).all() and (np.diff(b["segments"]) >= 0).all() for b in batches)


@pytest.mark.slow  # fresh processes, and four formats to write
def test_grain_is_compared_where_it_is_installed(tmp_path, monkeypatch):
    """grain is ours too, so its part of the comparison runs without the other peers."""
    run = versus._run
    monkeypatch.setattr(versus, "_run", lambda python, what, **o: {} if what == "versions" else run(python, what, **o))
    options = {"text_tokens": 40_000, "rounds": 1, "seconds": 0.05, "length": 512, "batch_rows": 2, "say": lambda text: None}
    result = versus.measure(pathlib.Path(sys.executable), peers=("grain",), **options)
    assert set(result["readers"]) == {"v4train flat", "v4train records", "v4train megatron", "grain"}
    ours, theirs = result["readers"]["v4train flat"], result["readers"]["grain"]
    assert ours["ratio"] == 1.0
    assert theirs["ratio"] == pytest.approx(ours["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"], abs=0.02)
    assert "grain" in versus.table(result)


def test_missing_peers_are_named(tmp_path, capsys):
    assert main.main(["bench", "versus", "data", "--python", str(tmp_path / "python")]) == 2
    assert "run `v4train bench versus data --install` once" in capsys.readouterr().err
