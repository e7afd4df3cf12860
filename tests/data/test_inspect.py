"""Taking a batch apart: against batches written by hand, the loss's own shift, and the stores behind a pipeline."""

import io
import pathlib
import wave

import jax
import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import batch as batch_lib
from v4train.data import config, media, pipeline, store, tokenizer
from v4train.data.inspection import look, rows, sound
from v4train.train import loss

TOKENIZER = tokenizer.ByteTokenizer()
SOURCES = ("one", "two")


def _write(batch, row, at, ids, *, segment, position):
    """Puts text ids into a row as a document would lie there."""
    stop = at + len(ids)
    batch.tokens[row, at:stop] = ids
    batch.segment_ids[row, at:stop] = segment
    batch.positions[row, at:stop] = np.arange(position, position + len(ids))
    batch.loss_weight[row, at:stop] = [0.0 if i in TOKENIZER.never_targets else 1.0 for i in ids]
    return stop


def _empty(rows=1, length=40, patches=8, frames=8, patch=2):
    pad = TOKENIZER.pad
    return batch_lib.empty(rows, sequence_length=length, max_patches=patches, max_audio_frames=frames, image_patch=patch, pad=pad)


def _describe(batch, row=0, **options):
    return rows.describe(batch, row=row, tokenizer=TOKENIZER, sources=SOURCES, **options)


@pytest.fixture
def by_hand():
    """One row: a continued text, a hole, then a document with an image of 3 x 2 patches and a sound, then padding."""
    batch = _empty()
    batch.source[0], batch.n_documents[0], batch.n_bad[0] = 1, 3, 1
    _write(batch, 0, 0, [*b"ab", TOKENIZER.eos], segment=1, position=100)
    head = [TOKENIZER.bos, TOKENIZER.image_start, *[TOKENIZER.image] * 6, TOKENIZER.image_end]
    body = [TOKENIZER.audio_start, *[TOKENIZER.audio] * 2, TOKENIZER.audio_end, *b"xyz"]
    stop = _write(batch, 0, 10, head + body, segment=3, position=0)
    assert stop == 26
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    cut = media.image_to_patches(image, patch=2)
    batch.patches[0, :6], batch.patch_xy[0, :6] = cut.values, cut.xy
    batch.patch_slot[0, 12:18] = range(6)
    batch.audio[0, :2] = np.random.default_rng(1).integers(0, 16, (2, 80), np.uint8)
    batch.audio_slot[0, 20:22] = range(2)
    batch.modality[0, 12:18], batch.modality[0, 20:22] = 1, 2
    batch_lib.validate(batch, vocab_size=272)
    return batch, image


def test_a_row_is_taken_apart(by_hand):
    batch, image = by_hand
    row = _describe(batch)
    assert (row.source, row.length, row.segment_count, row.bad) == ("two", 40, 2, 1)
    assert row.tokens == {"text": 11, "image": 6, "audio": 2}
    assert row.fill == 19 / 40
    assert row.gaps == ((3, 10), (26, 40))
    first, second = row.segments
    assert [(s.number, s.start, s.stop, s.position, s.ends, s.whole) for s in row.segments] == [
        (1, 0, 3, 100, True, False),
        (3, 10, 26, 0, False, False),
    ]
    assert [(p.place, p.text, p.special, p.asked) for p in first.parts] == [
        (0, "a", False, 0.0),  # the token before it is in another row
        (1, "b", False, 1.0),
        (2, "<eos>", True, 1.0),
    ]
    kinds = [type(part).__name__ for part in second.parts]
    assert kinds == ["Text"] * 2 + ["Image"] + ["Text"] * 2 + ["Sound"] + ["Text"] * 4
    picture, speech = second.parts[2], second.parts[5]
    np.testing.assert_array_equal(picture.pixels, image)
    assert (picture.place, picture.n, picture.columns, picture.rows) == (12, 6, 3, 2)
    np.testing.assert_array_equal(speech.frames, batch.audio[0, :2])
    assert (speech.place, speech.n) == (20, 2)
    assert (row.targets, row.weight) == (2 + 3, 5.0)


def test_touching_images_and_a_cut_one_are_told_apart(by_hand):
    """Two images without a token between them, the second one missing its first patch as in a slice of a row."""
    batch, _ = by_hand
    batch.patch_xy[0, :6] = [(0, 0), (1, 0), (0, 1), (1, 1), (1, 0), (0, 1)]
    pictures = [part for part in _describe(batch).segments[1].parts if isinstance(part, rows.Image)]
    assert [(p.place, p.n, p.columns, p.rows) for p in pictures] == [(12, 4, 2, 2), (16, 2, 2, 2)]
    assert not pictures[1].pixels[:2, :2].any()
    np.testing.assert_array_equal(pictures[1].pixels[2:, :2].reshape(-1), batch.patches[0, 5])


def test_tokens_are_joined_to_characters():
    batch = _empty()
    text = "é€😀\ufffd".encode()
    ids = [*text[:2], *text[2:5], *text[5:9], *text[9:], 0xFF, *b"z", *"€".encode()[:2]]
    _write(batch, 0, 0, ids, segment=1, position=0)
    batch.loss_weight[0, 3] = 0.25
    batch.loss_weight[0, 2], batch.loss_weight[0, 4] = 0, 0
    parts = _describe(batch).segments[0].parts
    lone = [(place, 1, "\ufffd") for place in (9, 10, 11, 12)]  # a replacement character that is meant looks like one that is not
    cut = [(13, 1, "z"), (14, 1, "\ufffd"), (15, 1, "\ufffd")]
    assert [(p.place, len(p.ids), p.text) for p in parts] == [(0, 2, "é"), (2, 3, "€"), (5, 4, "😀"), *lone, *cut]
    assert [i for part in parts for i in part.ids] == ids
    assert parts[1].asked == 0.25


def test_nothing_is_asked_for_across_a_segment_boundary():
    """Also where a segment begins in the middle of a row with text that has a weight, as the rest of a split document does."""
    batch = _empty()
    stop = _write(batch, 0, 0, list(b"abc"), segment=1, position=0)
    _write(batch, 0, stop, list(b"xyz"), segment=2, position=50)
    assert rows.asked(batch)[0, :7].tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert _describe(batch).targets == 4


def test_a_window_is_widened_around_media_and_leaves_the_counts_alone(by_hand):
    batch, _ = by_hand
    whole, part = _describe(batch), _describe(batch, window=(14, 21))
    (segment,) = part.segments
    assert segment.shown == (12, 22)
    assert [type(p).__name__ for p in segment.parts] == ["Image", "Text", "Text", "Sound"]
    assert (segment.start, segment.stop, segment.position) == (10, 26, 0)
    for field in ("tokens", "targets", "weight", "segment_count", "gaps", "fill"):
        assert getattr(part, field) == getattr(whole, field)
    assert _describe(batch, window=(30, 40)).segments == ()


def _pipeline(tmp_path, **changes):
    synthetic.make_test_store(tmp_path / "media", kind="media", documents=60, seed=1)
    synthetic.make_test_store(tmp_path / "text", documents=40, seed=2)
    sources = [{"name": name, "path": str(tmp_path / name), "weight": weight} for name, weight in (("media", 1.0), ("text", 2.0))]
    shape = {"sequence_length": 48, "image_patch": 2, "max_patches": 10, "max_audio_frames": 12, "holdout": 0.2}
    return pipeline.Pipeline(config.DataConfig(sources=sources, **(shape | changes)), batch_rows=6)


def test_what_is_asked_for_is_what_the_loss_counts(tmp_path):
    data = _pipeline(tmp_path)
    for step in range(4):
        batch = data.batch(step)
        _, weight = loss.targets(batch, ahead=1)
        np.testing.assert_array_equal(rows.asked(batch)[:, 1:], np.asarray(weight)[:, :-1])
        seen = [rows.describe(batch, row=i, tokenizer=data.tokenizer, sources=data.sources) for i in range(6)]
        assert sum(row.weight for row in seen) == float(loss.count(batch).text)


def test_rows_read_as_their_documents(tmp_path):
    """Text, pixels and frames of every segment, against the store, by key of the text."""
    data = _pipeline(tmp_path, sequence_length=200, max_patches=40, max_audio_frames=60)
    documents = [s.read(i) for s in map(store.TokenStore.open, (tmp_path / "media", tmp_path / "text")) for i in range(len(s))]
    texts = [TOKENIZER.decode(d.tokens) for d in documents]
    whole = 0
    for step in range(5):
        for row in look.look(data, step=step, rows=6).rows:
            for segment in (s for s in row.segments if s.whole):
                marks = {rows.Image: "<image>", rows.Sound: "<audio>"}
                text = "".join(p.text if isinstance(p, rows.Text) else marks[type(p)] * p.n for p in segment.parts)
                document = documents[texts.index(text)]
                pictures = [p for p in segment.parts if isinstance(p, rows.Image)]
                patches = [media.image_to_patches(p.pixels, patch=2).values for p in pictures]
                np.testing.assert_array_equal(np.concatenate(patches) if patches else document.patches, document.patches)
                speech = [p.frames for p in segment.parts if isinstance(p, rows.Sound)]
                np.testing.assert_array_equal(np.concatenate(speech) if speech else document.audio, document.audio)
                whole += 1
    assert whole > 20


def test_a_look_shows_the_batch_that_the_pipeline_gives(tmp_path, monkeypatch):
    data = _pipeline(tmp_path)
    original = data.batch

    def altered(step):
        batch = jax.tree.map(np.copy, original(step))
        batch.tokens[2, 5] = ord("#")
        return batch

    monkeypatch.setattr(data, "batch", altered)
    row = look.look(data, step=1, rows=6).rows[2]
    assert next(p.text for s in row.segments for p in s.parts if isinstance(p, rows.Text) and p.place == 5) == "#"


def test_sources_are_chosen_by_name(tmp_path):
    data = _pipeline(tmp_path)
    shown = look.look(data, step=0, rows=3, source="text")
    assert [row.source for row in shown.rows] == ["text"] * 3
    assert [row.number for row in shown.rows] == [i for i, s in enumerate(data.batch(0).source) if data.sources[s] == "text"][:3]
    with pytest.raises(ValueError, match="no data source is called so; the recipe has media, text"):
        look.look(data, step=0, rows=1, source="web")
    single = pipeline.Pipeline(data._config, batch_rows=1)
    absent = "media" if single.sources[int(single.batch(0).source[0])] == "text" else "text"
    with pytest.raises(ValueError, match="step 0 has no row of it"):
        look.look(single, step=0, rows=1, source=absent)


def test_unreadable_documents_are_named(tmp_path, monkeypatch):
    data = _pipeline(tmp_path)
    shard = next((tmp_path / "text").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    shard.write_bytes(content)
    shown = [look.look(data, step=step, rows=6) for step in range(8)]
    assert shown[-1].bad
    assert {bad.source for bad in shown[-1].bad} == {"text"}
    assert sum(row.bad for one in shown for row in one.rows) > 0


def _tone(hertz):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(sound.RATE) / sound.RATE)


@pytest.mark.parametrize("hertz", [220, 700, 2000, 5000])
def test_a_tone_comes_back_at_its_pitch_and_loudness(hertz):
    frames = media.dmel(_tone(hertz))
    samples = sound.pcm(frames)
    assert len(samples) == (len(frames) + 1) * sound.RATE // 20
    middle = samples[len(samples) // 4 : -len(samples) // 4] / 32767
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    peak = np.argmax(spectrum) * sound.RATE / len(middle)
    assert abs(peak - hertz) < 0.08 * hertz + 10  # a mel band is about so wide
    assert 1 / 3 < np.sqrt((middle**2).mean() / (_tone(hertz) ** 2).mean()) < 3  # a level is a factor of 4


def test_speech_keeps_its_levels():
    """Analysed again, the demo's spoken digits have the levels that they were made from, far nearer than any other digit has."""
    demo = store.TokenStore.open(pathlib.Path(__file__).parents[2] / "data" / "demo" / "audio")
    spoken = [demo.read(i).audio for i in range(8)]
    heard = [media.dmel(sound.pcm(frames)) for frames in spoken]

    def apart(a, b):
        n = min(len(a), len(b))
        return np.abs(a[:n].astype(int) - b[:n]).mean()

    for i, again in enumerate(heard):
        assert again.shape == spoken[i].shape
        assert apart(again, spoken[i]) < 0.2
        assert min(apart(again, other) for j, other in enumerate(spoken) if j != i) > 2 * apart(again, spoken[i])


def test_silence_is_silent_and_the_file_is_a_wave_file():
    assert not sound.pcm(np.zeros((3, 80), np.uint8)).any()
    samples = sound.pcm(media.dmel(_tone(440)))
    np.testing.assert_array_equal(samples, sound.pcm(media.dmel(_tone(440))))
    with wave.open(io.BytesIO(sound.wav(samples))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(file.getnframes()), "<i2"), samples)
    assert np.abs(sound.pcm(np.full((4, 80), 15, np.uint8))).max() <= 32767 * 0.981
