"""`v4train data stats`: its figures against the documents and the batches themselves, and the three ways of showing them."""

import argparse
import fractions
import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from tests.data import synthetic
from v4train.cli import data_stats
from v4train.cli.data_view import histogram, stats_page, stats_table
from v4train.data import config, pipeline, store
from v4train.data.inspection import statistics

PROJECT = pathlib.Path(__file__).parents[2]
STEPS = 30
PHASES = [
    {"from_step": 10, "weights": {"text": 0.5}, "ramp_steps": 5},
    {"from_step": 20, "sequence_length": 96, "batch_rows": 4, "weights": {"late": 1.0}},
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    synthetic.make_test_store(root / "media", kind="media", documents=70, seed=1)
    synthetic.make_test_store(root / "text", documents=50, seed=2)
    synthetic.make_test_store(root / "late", lengths=(8, 15, 16, 31, 32, 63, 64, 1000), seed=3)
    return [{"name": n, "path": str(root / n), "weight": w} for n, w in (("media", 1.0), ("text", 2.0), ("late", 0.0))]


def _config(stores, **changes):
    shape = {"sequence_length": 48, "image_patch": 2, "max_patches": 10, "max_audio_frames": 12, "holdout": 0.2}
    return config.DataConfig(sources=stores, **(shape | changes))


def _measure(stores, **changes):
    chosen = _config(stores, **changes)
    return statistics.measure(pipeline.Pipeline(chosen, batch_rows=8), config=chosen, steps=STEPS)


@pytest.fixture(scope="module")
def measured(stores):
    return _measure(stores, phases=PHASES)


def test_what_is_stored_is_counted_from_the_documents(measured, stores):
    for source, given in zip(measured.sources, stores, strict=True):
        opened = store.TokenStore.open(given["path"])
        documents = [opened.read(i) for i in range(len(opened))]
        out = [store.key_hash(d.key) < 0.2 * 2**64 for d in documents]
        kept = [d for d, held in zip(documents, out, strict=True) if not held]
        assert (source.documents, source.held_out_documents) == (len(kept), sum(out))
        modality = np.concatenate([d.modality for d in kept])
        assert source.tokens == {name: int((modality == i).sum()) for i, name in enumerate(("text", "image", "audio"))}
        sizes = [len(d.tokens) for d in kept]
        assert (source.lengths.longest, source.lengths.mean, source.lengths.median) == (max(sizes), np.mean(sizes), np.median(sizes))
        all_tokens = sum(len(d.tokens) for d in documents)
        assert source.held_out_share == pytest.approx(1 - sum(sizes) / all_tokens)
        assert source.fingerprint == opened.fingerprint


def test_what_is_drawn_is_counted_from_the_batches(measured, stores):
    data = pipeline.Pipeline(_config(stores, phases=PHASES), batch_rows=8)
    rows, tokens, places = np.zeros(3, int), np.zeros(3, int), 0
    for step in range(STEPS):
        batch = data.batch(step)
        np.add.at(rows, batch.source, 1)
        np.add.at(tokens, batch.source, (batch.segment_ids > 0).sum(axis=1))
        places += batch.tokens.size
    assert [source.rows for source in measured.sources] == rows.tolist()
    assert [source.drawn for source in measured.sources] == tokens.tolist()
    assert (measured.rows, measured.places) == (rows.sum(), places)
    for source in measured.sources:
        assert source.epochs == pytest.approx(source.drawn / sum(source.tokens.values()))


def test_the_share_asked_for_is_that_of_the_phases(measured):
    """By hand: 10 steps of 8 rows at 1:2:0, a ramp of 5 steps to 1:0.5, 5 more, then 10 steps of 4 rows at 1:0.5:1."""
    half = fractions.Fraction(1, 2)
    before, after = np.array([1, 2, 0]) * fractions.Fraction(1, 3), np.array([1, half, 0]) / (1 + half)
    due = 80 * before + 40 * after + 40 * np.array([1, half, 1]) / (2 + half)
    for j in range(5):
        due = due + 8 * (before + (after - before) * fractions.Fraction(2 * j + 1, 10))
    assert [source.asked for source in measured.sources] == pytest.approx([float(x / 200) for x in due])
    assert measured.rows == 200
    assert all(abs(source.rows - 200 * source.asked) < 3 for source in measured.sources)


def test_lengths_are_counted_between_powers_of_two():
    found = statistics.lengths(np.array([1, 2, 3, 4, 7, 8, 2**31 - 1, 2**31]))
    assert found.documents[:4] == (1, 2, 2, 1)
    assert found.tokens[:4] == (1, 5, 11, 8)
    assert (found.documents[30], found.documents[31], len(found.documents)) == (1, 1, 32)
    assert sum(found.documents) == 8


def test_a_source_that_is_never_drawn_says_so(stores):
    found = _measure(stores).sources[2]
    assert (found.asked, found.rows, found.drawn, found.epochs) == (0.0, 0, 0, 0.0)


class _Page(html.parser.HTMLParser):
    """Checks that tags nest and collects words."""

    VOID = frozenset({"meta", "link", "input", "img", "path", "rect", "circle"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def test_the_page_says_all_of_it_and_loads_nothing(measured):
    text = stats_page.page(measured, name="<script>x", heading="a & b")
    page = _Page(text)
    words = " ".join(page.texts)
    for source in measured.sources:
        for cell in stats_table.cells(source, measured=measured).values():
            assert cell in words
    assert "Phases" in words
    assert "<script" not in text
    assert [v for _, a in page.elements for k, v in a.items() if k in ("src", "href")] == ["data:,"]
    assert "script-src 'none'" in text
    assert "Phases" not in " ".join(_Page(stats_page.page(_one_phase(measured), name="n", heading="h")).texts)


def _one_phase(measured):
    return statistics.Statistics(
        measured.sources, measured.steps, measured.rows, measured.places, measured.phases[:1], measured.fingerprint
    )


def test_bars_are_as_high_as_the_shares_that_they_name(measured):
    source = measured.sources[2]
    drawn = histogram.lengths(source, bins=stats_page.histogram_bins(measured.sources), rows=(48, 96))
    bars = re.findall(r'<rect class="documents"[^>]*height="([\d.]+)"><title>([\d,]+)–[^:]*: ([\d.]+)%', drawn)
    sizes = {int(low.replace(",", "")): float(share) / 100 for _, low, share in bars}
    assert sizes == {2**i: pytest.approx(n / source.documents, abs=6e-4) for i, n in enumerate(source.lengths.documents) if 2**i in sizes}
    assert sum(sizes.values()) == pytest.approx(1, abs=5e-3)
    heights = [float(height) for height, *_ in bars]
    assert np.corrcoef(heights, list(sizes.values()))[0, 1] > 0.999
    assert [drawn.count(f"row of {n}") for n in (48, 96)] == [1, 1]


def test_fill_and_padding_make_up_a_row(measured):
    drawn = histogram.places(measured.sources)
    for source in measured.sources:
        shares = [float(x) for x in re.findall(rf"<title>{source.name}: \w+ ([\d.]+)% of the places", drawn)]
        assert sum(shares) == pytest.approx(100, abs=0.2)
        assert f">{source.fill:.1%}</text>" in drawn


def _run(*arguments):
    parser = argparse.ArgumentParser()
    data_stats.configure(parser)
    return data_stats.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_a_table_json_or_a_page(stores, tmp_path, capsys):
    given = [source | {"weight": source["weight"] or 1.0} for source in stores]
    overrides = ["--set", f"data.sources={json.dumps(given)}", "--set", "data.image_patch=2", "--set", "model.image.patch=2"]
    tiny = PROJECT / "configs/tiny.yaml"
    assert _run(tiny, *overrides) == 0
    printed = capsys.readouterr().out
    assert _run(tiny, *overrides, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [source["name"] for source in found["sources"]] == ["media", "text", "late"]
    assert found["rows"] == sum(source["rows"] for source in found["sources"]) == 1600
    for source in found["sources"]:
        assert re.search(rf"^{source['name']} .*{source['documents']:,}", printed, re.MULTILINE)
        assert source["fingerprint"][:8] in printed
    page = tmp_path / "stats.html"
    assert _run(tiny, *overrides, "--html", page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    _Page(page.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="is a directory"):
        _run(tiny, *overrides, "--html", tmp_path)
