"""Every input format gives the records that were written into it."""

import gzip
import importlib.util
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest

from tests.data.prepare import corpus
from v4train.data import document, media, tokenizer
from v4train.data.prepare import config, decode, inputs, jsonl, preparation, record

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("PIL", "soundfile", "soxr")), reason="the extra `prepare` is not installed"
)
TOKENIZER = tokenizer.ByteTokenizer()


def records(source: dict, **settings) -> list[record.Record | record.Bad]:
    spec = corpus.spec(pathlib.Path("unused"), source, **settings)
    return [found for task in inputs.tasks(spec) for found in inputs.read(spec, task)]


def text_of(found: document.Document) -> str:
    return TOKENIZER.decode(found.tokens[found.modality == 0])


@pytest.mark.parametrize("task_bytes", [1, 7, 100, 1000, 10**6])
def test_byte_ranges_of_json_lines_have_every_line_once(tmp_path, task_bytes):
    path = corpus.text_lines(tmp_path / "a.jsonl", lines=40)
    path.write_text(path.read_text() + "\n\n" + json.dumps({"text": "no line end"}))
    expected = [json.loads(line)["text"] for line in path.read_text().splitlines() if line]
    found = records({"kind": "jsonl", "name": "a", "path": str(path)}, task_bytes=task_bytes)
    assert [one.parts for one in found] == [(text,) for text in expected]
    offsets = [int(one.key.rpartition("#")[2]) for one in found]
    content = path.read_bytes()
    assert all(json.loads(content[at:].splitlines()[0])["text"] == text for at, text in zip(offsets, expected, strict=True))


def test_compressed_json_lines_are_the_plain_ones(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = corpus.text_lines(tmp_path / "a.jsonl", lines=300)
    content = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:9000]) + gzip.compress(content[9000:]))
    frames = [zstandard.ZstdCompressor().compress(part) for part in (content[:5000], content[5000:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    expected = [one.parts for one in records({"kind": "jsonl", "name": "a", "path": str(plain)})]
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        assert [one.parts for one in records({"kind": "jsonl", "name": "a", "path": str(tmp_path / name)})] == expected


def test_broken_lines_are_bad_and_cost_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1000)
    lines = [
        b'{"text": "one"}',
        b'{"text": "tw',
        b"[1]",
        b'{"other": 1}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b"x" * 5000,
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    for task_bytes in (10, 300, 10**6):
        found = records({"kind": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl")}, task_bytes=task_bytes)
        good = [one.parts for one in found if isinstance(one, record.Record)]
        assert good == [("one",), ("last",)]
        reasons = [one.reason for one in found if isinstance(one, record.Bad)]
        assert [reason.split(":")[0] for reason in reasons] == [
            "not JSON",
            "JSON, but list instead of an object",
            "field 'text' is missing",
            "field 'text' is int, not a text",
            "not UTF-8",
            "a line of more than 1000 bytes",
        ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_file_gives_what_is_left_and_one_bad_record(tmp_path, ending):
    content = corpus.text_lines(tmp_path / "a.jsonl", lines=3000).read_bytes()
    if ending == ".zst":
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    else:
        packed = gzip.compress(content)
    path = tmp_path / f"b.jsonl{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    *good, last = records({"kind": "jsonl", "name": "a", "path": str(path)})
    assert isinstance(last, record.Bad)
    assert "unreadable from here on" in last.reason
    assert good, "what was packed before the cut can be read"
    assert all(isinstance(one, record.Record) or "not JSON" in one.reason for one in good)


def test_interleaved_parts_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "x.png").write_bytes(corpus.png(rng))
    (tmp_path / "y.wav").write_bytes(corpus.wav(rng))
    parts = [{"text": "see "}, {"image": "x.png"}, {"text": " hear "}, {"audio": "y.wav"}, {"image": "x.png"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"parts": parts, "key": "k"}) + "\n" + json.dumps({"parts": [{"video": "z"}]}) + "\n")
    source = {"kind": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl"), "parts": "parts", "key": "key"}
    found, bad = records(source)
    assert found.key == "a/k"
    assert [part if isinstance(part, str) else part.kind for part in found.parts] == ["see ", "image", " hear ", "audio", "image"]
    assert "'parts[0]' is not one of" in bad.reason
    preparation.prepare(corpus.spec(tmp_path / "out", source, quarantine={"max_share": 0.5}))
    (made,) = corpus.documents(tmp_path / "out")
    assert [kind for kind, _, _ in made.spans.tolist()] == [1, 2, 1]


def test_parquet_rows_by_row_group(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rng = np.random.default_rng(0)
    texts = [corpus.sentence(rng, 5) for _ in range(200)]
    images = [{"bytes": corpus.png(rng), "path": "x.png"} for _ in texts]
    table = pyarrow.table({"caption": [*texts[:-1], None], "image": images, "unused": list(range(200))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    source = {"kind": "parquet", "name": "p", "path": str(tmp_path / "*.parquet"), "text": "caption", "image": "image"}
    for task_bytes in (1, 10**9):
        *found, bad = records(source, task_bytes=task_bytes)
        assert [one.parts[1] for one in found] == texts[:-1]
        assert [one.parts[0].source for one in found] == [image["bytes"] for image in images[:-1]]
        assert [one.key for one in found][::50] == [f"p/a.parquet#{i}" for i in range(0, 199, 50)]
        assert bad.reason == "field 'caption' is missing"
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    assert "unreadable" in records(source | {"path": str(tmp_path / "b.parquet")})[0].reason
    assert "there is no column nothing" in records(source | {"path": str(tmp_path / "a.parquet"), "text": "nothing"})[0].reason


def tar(path: pathlib.Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_webdataset_samples(tmp_path, name):
    rng = np.random.default_rng(0)
    members = {"0/a.png": corpus.png(rng), "0/a.txt": b"first", "0/b.json": b'{"caption": "second"}', "0/b.PNG": corpus.png(rng)}
    members |= {"0/c.txt": b"no image", "1/a.png": corpus.png(rng), "1/a.txt": b"third"}
    tar(tmp_path / name, members)
    found = records({"kind": "webdataset", "name": "w", "path": str(tmp_path / name)})
    assert [(one.key, one.parts[1]) for one in found if isinstance(one, record.Record)] == [
        (f"w/{name}/0/a", "first"),
        (f"w/{name}/0/b", "second"),
        (f"w/{name}/1/a", "third"),
    ]
    assert [one.reason for one in found if isinstance(one, record.Bad)] == ["it has no image, only .txt"]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert "unreadable from here on" in records({"kind": "webdataset", "name": "w", "path": str(tmp_path / name)})[-1].reason


def test_text_files_are_cut_at_line_ends_and_share_a_key(tmp_path):
    lines = [f"line {i} ünïcödé" for i in range(500)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    (tmp_path / "one-line.txt").write_text("ü" * 5000)
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "wrong.txt").write_bytes(b"abc\xff")
    found = records({"kind": "text", "name": "t", "path": str(tmp_path / "*.txt"), "document_bytes": 1000})
    pieces: dict[str, list[str]] = {"long": [], "one-line": [], "small": []}
    for one in found:
        if isinstance(one, record.Record):
            pieces[one.key.removeprefix("t/").removesuffix(".txt")].append(one.parts[0])
    assert "".join(pieces["long"]) == "\n".join(lines)
    assert all(piece.endswith("\n") for piece in pieces["long"][:-1])
    assert max(len(piece.encode()) for piece in pieces["long"] + pieces["one-line"]) < 2000
    assert "".join(pieces["one-line"]) == "ü" * 5000
    assert pieces["small"] == ["small"]
    assert [one.reason for one in found if isinstance(one, record.Bad)] == ["not UTF-8: byte 3 of the piece is 0xff"]


@pytest.mark.parametrize(("kind", "order"), [("images", [1]), ("audio", [2]), ("triples", [1, 2])])
def test_folders_of_media_with_captions(tmp_path, kind, order):
    corpus.pairs(tmp_path / "in", count=5, sound=kind != "images", image=kind != "audio")
    (tmp_path / "in/odd/item-003.txt").unlink()
    source = {"kind": kind, "name": "m", "path": str(tmp_path / "in")}
    found = records(source)
    assert [one.key for one in found if isinstance(one, record.Record)] == ["m/even/item-000." + ("wav" if kind == "audio" else "png")] + [
        one.key for one in found[1:] if isinstance(one, record.Record)
    ]
    (bad,) = (one for one in found if isinstance(one, record.Bad))
    assert "No such file or directory" in bad.reason
    assert "item-003.txt" in bad.reason
    preparation.prepare(corpus.spec(tmp_path / "out", source, quarantine={"max_share": 0.2}))
    made = corpus.documents(tmp_path / "out")
    assert len(made) == 4
    assert all([span[0] for span in one.spans.tolist()] == order for one in made)
    assert all("." in text_of(one) for one in made)


def test_images_are_upright_opaque_and_within_their_budget(tmp_path):
    import PIL.Image

    settings = config.ImageConfig(patch=8, max_patches=12)
    left_red = np.zeros((160, 320, 3), np.uint8)
    left_red[:, :160, 0] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored turned: a viewer shows it turned clockwise, so red comes to the top
    made = decode.image(corpus.encoded(PIL.Image.fromarray(left_red), "JPEG", exif=exif, quality=95), config=settings)
    shown = media.patches_to_image(made)
    assert shown.shape[0] > shown.shape[1]
    assert len(made.values) <= 12
    assert shown[2, :, 0].min() > 200
    assert shown[-3, :, 0].max() < 50
    clear = PIL.Image.fromarray(np.zeros((16, 16, 4), np.uint8), "RGBA")
    assert media.patches_to_image(decode.image(corpus.encoded(clear, "PNG"), config=settings)).min() == 255
    deep = PIL.Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    assert set(np.unique(decode.image(corpus.encoded(deep, "PNG"), config=settings).values)) == {0x80}
    with pytest.raises(decode.OverLimitError, match=r"image.max_pixels"):
        decode.image(corpus.encoded(clear, "PNG"), config=config.ImageConfig(max_pixels=255))
    for wide in (np.float32, np.int32):
        with pytest.raises(decode.BadMediaError, match="32-bit numbers"):
            decode.image(corpus.encoded(PIL.Image.fromarray(np.ones((16, 16), wide)), "TIFF"), config=settings)
    with pytest.raises(decode.BadMediaError, match="unreadable image"):
        decode.image(corpus.png(np.random.default_rng(0))[:500], config=settings)
    with pytest.raises(decode.BadMediaError, match="there is no file"):
        decode.image(tmp_path / "x.png", config=settings)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
def test_sound_of_any_rate_has_nearly_the_same_frames(rate):
    """A tone is the same tone: its loudest band must not move with the sample rate."""
    import soundfile

    t = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 1000 * t)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone, tone], axis=1), rate, format="WAV", subtype="FLOAT")
    frames = decode.sound(buffer.getvalue(), config=config.SoundConfig())
    assert frames.shape == (19, 80)
    reference = media.dmel(0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000))
    inside = slice(2, 17)  # the resampler rings at the ends
    loud = reference[inside] >= 8
    assert loud.sum() == 15 * 2
    assert np.abs(frames[inside][loud].astype(int) - reference[inside][loud]).max() <= 1
    assert frames[inside][~loud].max() < 4
    with pytest.raises(decode.OverLimitError, match=r"audio.max_seconds"):
        decode.sound(buffer.getvalue(), config=config.SoundConfig(max_seconds=0.5))
    with pytest.raises(decode.BadMediaError, match="unreadable sound"):
        decode.sound(b"RIFF" + buffer.getvalue()[20:60], config=config.SoundConfig())


def test_missing_libraries_are_named_with_their_inputs(tmp_path, monkeypatch):
    corpus.pairs(tmp_path / "in", count=1)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("PIL", "soxr") else find(name, *rest))
    spec = corpus.spec(tmp_path / "out", {"kind": "triples", "name": "m", "path": str(tmp_path / "in")})
    reason = r"inputs.0 \(m\): audio and image need PIL, soxr, not installed here: run `pip install 'v4train\[prepare\]'`"
    with pytest.raises(ValueError, match=reason):
        inputs.tasks(spec)


def test_inputs_that_name_nothing_are_told_together(tmp_path):
    spec = corpus.spec(tmp_path, *({"kind": "text", "name": name, "path": f"{tmp_path}/{name}/*.txt"} for name in ("a", "b")))
    both = r"2 input\(s\) cannot be prepared:\n.*inputs.0 \(a\): path .* names no file[^\n]*\n.*inputs.1 \(b\)"
    with pytest.raises(ValueError, match=both):
        inputs.tasks(spec)


def test_a_jpeg_decoded_at_a_reduced_scale_looks_like_the_png():
    import PIL.Image

    rng = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).resize((768, 768), PIL.Image.Resampling.BICUBIC)
    settings = config.ImageConfig(patch=8, max_patches=400)
    jpeg, png = (decode.image(corpus.encoded(smooth, kind, quality=95), config=settings).values for kind in ("JPEG", "PNG"))
    assert len(jpeg) == 400
    assert np.abs(jpeg.astype(int) - png).mean() < 4


def test_the_limit_of_pixels_is_the_spec_s_and_not_the_library_s(monkeypatch):
    import PIL.Image

    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)  # from twice as many on it raises
    image = corpus.png(np.random.default_rng(0), width=40, height=30)
    with pytest.raises(decode.OverLimitError):
        decode.image(image, config=config.ImageConfig(patch=8, max_pixels=1000))
    assert len(decode.image(image, config=config.ImageConfig(patch=8, max_pixels=1200)).values) == 20
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def test_a_mark_of_the_encoding_is_no_text(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_bytes(mark + b"one\n" + mark + b"two\n")
    corpus.pairs(tmp_path / "pairs", count=1, sound=False)
    (caption,) = (tmp_path / "pairs").rglob("*.txt")
    caption.write_bytes(mark + b"one")
    assert [one.parts for one in records({"kind": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl")})] == [("one",), ("two",)]
    text = {"kind": "text", "name": "a", "path": str(tmp_path / "a.txt"), "document_bytes": 6}
    assert [one.parts for one in records(text)] == [("one\n",), ("\ufefftwo\n",)]
    (pair,) = records({"kind": "images", "name": "a", "path": str(tmp_path / "pairs")})
    assert pair.parts[1] == "one"


def test_a_deeply_nested_sample_is_one_bad_record(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.json", b"[" * 100_000), ("1.json", b'{"caption": "one"}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    bad, good = records({"kind": "webdataset", "name": "a", "path": str(tmp_path / "a.tar"), "layout": ["text"]})
    assert isinstance(bad, record.Bad)
    assert isinstance(good, record.Record)
