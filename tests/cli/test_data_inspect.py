"""`v4train data inspect`: the page and the terminal show the batch, and nothing that a document holds acts on either."""

import argparse
import base64
import contextlib
import hashlib
import html.parser
import io
import json
import pathlib
import re
import shutil
import wave
import zlib

import numpy as np
import pytest
import rich.console

from tests.data import synthetic
from v4train import recipe
from v4train.cli import data_inspect
from v4train.cli.data_view import inspect_page, inspect_terminal, media_uri, words
from v4train.config import dump
from v4train.data import document, media, pipeline, store, tokenizer
from v4train.data.inspection import look as look_lib

PROJECT = pathlib.Path(__file__).parents[2]
TOKENIZER = tokenizer.ByteTokenizer()
EVIL = '</b><script>alert(1)</script> & "quotes" \x1b[31mred\x1b[0m \u202egnp.exe'


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of hostile text and one of images and sounds; returns the recipe's sources."""
    root = tmp_path_factory.mktemp("stores")
    options = {"licence": "CC0-1.0", "origin": "made up", "compression": "zstd:1"}
    with store.TokenStoreWriter(root / "evil", tokenizer=TOKENIZER, image_patch=4, **options) as writer:
        for i in range(12):
            writer.add(document.compose([EVIL + " " + "x" * i], key=str(i), tokenizer=TOKENIZER))
    synthetic.make_test_store(root / "media", kind="media", patch=4, documents=40, seed=3)
    return [{"name": name, "path": str(root / name), "weight": 1.0} for name in ("evil", "media")]


def _overrides(sources):
    return ["--set", f"data.sources={json.dumps(sources)}", "--set", "data.sequence_length=160", "--set", "data.holdout=0.0"]


@pytest.fixture(scope="module")
def overrides(stores):
    return _overrides(stores)


def _run(*arguments):
    parser = argparse.ArgumentParser()
    data_inspect.configure(parser)
    return data_inspect.run(parser.parse_args([str(argument) for argument in arguments]))


class _Page(html.parser.HTMLParser):
    """Checks that tags nest; collects elements, and the text of each token."""

    VOID = frozenset({"meta", "link", "input", "img", "path", "rect", "circle"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tokens = [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "b":
            self.tokens.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "b":
            self.tokens[-1] += data

    def of(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and all(found.get(k) == v for k, v in attributes.items())]


def _content(address, kind):
    head, _, content = address.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content)


def _pixels(png):
    """A reader of 8-bit PNG of its own, for what `media_uri` writes: no filters, one block of data."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        name, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert int.from_bytes(png[at + 8 + size : at + 12 + size], "big") == zlib.crc32(name + content)
        chunks[name] = content
        at += 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    channels = {0: 1, 2: 3}[chunks[b"IHDR"][9]]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape((height, width, 3) if channels == 3 else (height, width))


@pytest.fixture(scope="module")
def written(overrides, tmp_path_factory):
    """The page of 8 rows. Made once: turning frames into sound takes its time."""
    path = tmp_path_factory.mktemp("page") / "deep" / "page.html"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert _run(PROJECT / "configs/tiny.yaml", *overrides, "--rows", 8, "--html", path) == 0
    assert out.getvalue() == f"{path}\n"
    return path.read_text(encoding="utf-8")


def _look(overrides, **options):
    loaded = recipe.resolve(str(PROJECT / "configs/tiny.yaml"), overrides=overrides[1::2]).config
    data = pipeline.Pipeline(loaded.data, batch_rows=loaded.train.batch_rows, host_count=2)
    return data, look_lib.look(data, step=0, rows=8, **options)


def test_the_page_shows_every_token_picture_and_sound_of_the_batch(written, overrides):
    page, (data, _) = _Page(written), _look(overrides)
    batch = data.batch(0)
    shown = [int(i) for b in page.of("b") if "data-i" in b for i in b["data-i"].split()]
    rows = range(8)
    assert shown == [int(t) for row in rows for t in batch.tokens[row][(batch.segment_ids[row] > 0) & (batch.modality[row] == 0)]]
    pictures = [_pixels(_content(f["src"], "image/png")) for f in page.of("img")]
    patches = sum(p.size // (3 * 16) for p in pictures if p.ndim == 3)
    assert patches == int((batch.patch_slot[:8] >= 0).sum()) > 0
    first = next(row for row in rows if (batch.patch_slot[row] >= 0).any())
    colour = [p for p in pictures if p.ndim == 3]
    np.testing.assert_array_equal(media.image_to_patches(colour[0], patch=4).values, batch.patches[first, : colour[0].size // 48])
    frames = np.concatenate([p.T[:, ::-1] // 17 for p in pictures if p.ndim == 2])
    expected = [batch.audio[row][batch.audio_slot[row][batch.audio_slot[row] >= 0]] for row in rows]
    np.testing.assert_array_equal(frames, np.concatenate(expected))
    for player in page.of("audio"):
        with wave.open(io.BytesIO(_content(player["src"], "audio/wav"))) as file:
            assert file.getnframes() > 0
    assert len(page.of("audio")) == len(pictures) - len(colour) > 0


def test_what_is_not_asked_for_is_marked(written, overrides):
    page, (_, look) = _Page(written), _look(overrides)
    marked = [("n" in b.get("class", "").split(), b.get("data-w", "1")) for b in page.of("b") if "data-i" in b]
    asked = [part.asked for row in look.rows for segment in row.segments for part in segment.parts if hasattr(part, "asked")]
    assert marked == [(weight == 0, f"{weight:g}") for weight in asked]
    assert {0.0, 1.0} == set(asked)


def test_places_and_positions_are_those_of_the_segments(written, overrides):
    page, (_, look) = _Page(written), _look(overrides)
    articles = [(int(a["data-segment"]), int(a["data-start"]), int(a["data-position"])) for a in page.of("article")]
    assert articles == [(s.number, s.start, s.position) for row in look.rows for s in row.segments]
    assert any(position > 0 for *_, position in articles)


def test_documents_stay_text(written):
    """Nothing of a document becomes an element, a control character or a change of direction."""
    page = _Page(written)
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [{}]
    assert "alert(1)</script>" not in written
    assert not set(written) & {"\x1b", "\u202e"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    joined = "".join(page.tokens)
    assert '</b><script>alert(1)</script> & "quotes" ␛[31mred␛[0m ‹U+202E›gnp.exe' in joined


def test_the_page_can_load_nothing_and_runs_its_own_script_only(written):
    page = _Page(written)
    addresses = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "action", "data", "poster")]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttp", re.sub(r"<b [^>]*>[^<]*</b>", "", written))
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_the_page_can_be_read_without_a_mouse(written):
    page = _Page(written)
    texts = [d for d in page.of("div") if d.get("class", "").startswith("tokens")]
    assert texts
    assert all(d["tabindex"] == "0" and d["aria-label"] for d in texts)
    assert all(image["alt"] for image in page.of("img"))
    assert all("controls" in player and player["aria-label"] for player in page.of("audio"))
    assert page.of("p", **{"aria-live": "polite"})


def _console(colour):
    return rich.console.Console(file=io.StringIO(), force_terminal=colour, color_system="truecolor" if colour else None, width=100)


def test_the_terminal_obeys_no_document(overrides):
    _, look = _look(overrides)
    for colour in (False, True):
        console = _console(colour)
        inspect_terminal.show(look, console=console, heading="tiny", window=(0, 160))
        text = console.file.getvalue()
        assert "\u202e" not in text
        assert "\x1b[31mred" not in text
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "\x1b" not in plain
        assert "␛[31mred␛[0m" in plain.replace("\n", "")
        assert ("\x1b" in text) == colour
        assert ("▀" in text) == colour
        assert ("⟦<bos>⟧" in plain) == (not colour)


def test_the_terminal_shows_rows_with_their_figures(overrides, capsys):
    assert _run(PROJECT / "configs/tiny.yaml", *overrides, "--rows", 2, "--source", "media") == 0
    out = capsys.readouterr().out
    _, look = _look(overrides, source="media")
    for row in look.rows[:2]:
        assert f"row {row.number} · media" in out
        assert words.row(row)[:60] in out.replace("\n", " ")
    assert "row 0 · evil" not in out
    assert "patches" in out
    assert "sound of" in out


def test_a_window_leaves_out_and_says_so(overrides, capsys):
    assert _run(PROJECT / "configs/tiny.yaml", *overrides, "--rows", 1, "--source", "evil", "--from", 30, "--tokens", 20) == 0
    out = capsys.readouterr().out
    assert "places 0–29 of 160 are not shown" in out
    assert "places 50–159 of 160 are not shown" in out


def test_holes_and_padding_are_told_apart(overrides):
    """A document in the middle that cannot be read is a hole; the end of the row is padding."""
    _, look = _look(overrides)
    row = next(row for row in look.rows if row.gaps)
    assert words.gap(row, 3, 10).startswith("hole of 7 places (3–9)")
    assert words.gap(row, 150, 160) == "padding, 10 places"


def test_unreadable_documents_are_in_both_views(stores, tmp_path):
    copies = [source | {"path": shutil.copytree(source["path"], tmp_path / source["name"]).as_posix()} for source in stores]
    shard = next((tmp_path / "evil").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - len(content) // 3)
    shard.write_bytes(content)
    _, look = _look(_overrides(copies), source="evil")
    assert look.bad
    page = inspect_page.page(look, name="tiny", heading="tiny", window=(0, 160), batch_rows=16)
    _Page(page)
    console = _console(False)
    inspect_terminal.show(look, console=console, heading="tiny", window=(0, 160))
    for text in (page, console.file.getvalue()):
        assert f"unreadable: evil, document {look.bad[0].document}" in text
    assert "Unreadable" in page


@pytest.fixture
def run_directory(tmp_path, stores):
    loaded = recipe.resolve(str(PROJECT / "configs/tiny.yaml"), overrides=[f"data.sources={json.dumps(stores)}"])
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(dump.yaml_text(loaded.config), encoding="utf-8")
    return path


def test_a_run_is_shown_at_its_current_step(run_directory, capsys):
    def heading():
        assert _run(run_directory, "--rows", 1) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert "step 0 of 100" in heading()
    lines = [{"kind": "train", "step": 10}, {"kind": "train", "step": 20}]
    (run_directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ki', encoding="utf-8")
    assert "step 20 of 100" in heading()
    assert "20 of 100 steps done" in heading()
    (run_directory / "checkpoints" / "step_00000030").mkdir(parents=True)
    assert "step 30 of 100" in heading()
    (run_directory / "checkpoints" / "step_00000100").mkdir()
    assert "step 99 of 100" in heading(), "after the end, the last batch that was trained on"
    assert _run(run_directory, "--rows", 1, "--step", 7) == 0
    assert "step 7 of 100" in capsys.readouterr().out


def test_mistakes_are_named(run_directory, tmp_path, overrides):
    tiny = PROJECT / "configs/tiny.yaml"
    for arguments, message in (
        ((tmp_path / "no.yaml",), "no such file or directory"),
        ((tmp_path,), "not a run directory, it has no recipe.yaml"),
        ((run_directory, "--set", "seed=1"), "is a run, whose recipe is what it is"),
        ((tiny, "--step", -1, "--rows", 0), r"(?s)--step -1: must be at least 0.*--rows 0: must be at least 1"),
        ((tiny, *overrides, "--source", "web"), "no data source is called so; the recipe has evil, media"),
        ((tiny, *overrides, "--html", tmp_path), "is a directory; give a file"),
        ((tiny, *overrides, "--html", run_directory / "recipe.yaml" / "x.html"), "cannot write the page"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(*arguments)


def test_pictures_keep_every_byte():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(_pixels(media_uri.png(pixels)), pixels)
    np.testing.assert_array_equal(_pixels(media_uri.png(pixels[:, :, 0])), pixels[:, :, 0])
    imaging = pytest.importorskip("PIL.Image")
    np.testing.assert_array_equal(np.asarray(imaging.open(io.BytesIO(media_uri.png(pixels)))), pixels)
