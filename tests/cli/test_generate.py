"""The answer on the terminal is the greedy continuation of the training forward pass; what is wrong is one message."""

import functools

import numpy as np
import pytest

from tests.decode import sequences
from tests.interop import steps
from v4train.cli import main
from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import decoder as decoder_lib
from v4train.interop import score

BYTES = tokenizer_lib.ByteTokenizer()
PROMPT = "Où est 日本?"
COUNT = 24


@pytest.fixture(autouse=True)
def _compiled_fast(monkeypatch):
    """Few tokens are decoded here, and what takes the time is to compile for them."""
    monkeypatch.setattr(decoder_lib, "Decoder", functools.partial(decoder_lib.Decoder, compiler_options=sequences.FAST))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    small = ("model.layers=[{pattern: [csa]}]", "model.moe.hash_layers=1", "model.audio=null", "data.max_audio_frames=0")
    made = steps.recipe("configs/tiny.yaml", *small)
    directory = tmp_path_factory.mktemp("runs") / "mine"
    steps.write(directory, made, steps.values(made.model))
    return directory


def generate(run, *words: str) -> int:
    return main.main(["generate", str(run), "--temperature", "0", "--compute", "float32", "--cache", "fp32", *words])


@pytest.fixture(scope="module")
def expected(run):
    prompt = np.concatenate([[BYTES.bos], BYTES.encode(PROMPT)]).astype(np.int32)
    tokens = score.greedy(score.load(run), prompt=prompt, count=COUNT)
    end = np.flatnonzero(tokens == BYTES.eos)
    return tokens[: end[0]] if len(end) else tokens


def test_the_answer_is_that_of_the_training_forward_pass(run, expected, capsys):
    assert generate(run, "--prompt", PROMPT, "--max-tokens", str(COUNT)) == 0
    said = capsys.readouterr()
    text = BYTES.decode(expected)
    assert said.out == text + "\n" * (not text.endswith("\n"))
    assert f"tiny step {steps.STEP}: {1 + len(PROMPT.encode())} prompt tokens" in said.err
    assert "bytes (fp32)" in said.err


def test_a_prompt_from_a_file_and_a_stop_text(run, expected, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    text = BYTES.decode(expected)
    stop = text[4:6]
    assert generate(run, "--prompt-file", str(file), "--max-tokens", str(COUNT), "--stop", stop) == 0
    said = capsys.readouterr()
    assert said.out == text[: text.index(stop)] + "\n"
    assert "ended by stop" in said.err


def test_drafts_and_a_cache_on_disk_change_no_answer(run, expected, tmp_path, capsys):
    pytest.importorskip("google_crc32c")
    text, long = BYTES.decode(expected), "x" * 300
    assert generate(run, "--prompt", PROMPT, "--max-tokens", str(COUNT), "--speculate") == 0
    said = capsys.readouterr()
    assert said.out == text + "\n" * (not text.endswith("\n"))
    assert "drafts right" in said.err
    answers = []
    for words in ((), *[("--disk-cache", str(tmp_path), "--disk-cache-bytes", "1GiB", "--host-cache", "8MiB", "--hot-entries", "32")] * 2):
        assert generate(run, "--prompt", long, "--max-tokens", "6", "--chunk", "32", "--speculate", *words) == 0
        said = capsys.readouterr()
        answers.append((said.out, said.err.partition(" prompt tokens taken up")[0].rpartition(" ")[2]))
    assert len({out for out, _ in answers}) == 1
    assert [taken for _, taken in answers[1:]] == ["0", "256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--prompt-file", "{latin}"], "is not UTF-8 (byte 0)"),
        (["--prompt-file", "{absent}"], "No such file"),
        (["--audio", "{absent}"], "was not made for audio"),
        (["--image", "{absent}"], "there is no file"),
        (["--max-tokens", "100000000"], "was made for"),
        (["--top-p", "2", "--temperature", "-1"], "temperature -1.0: it must be 0 (greedy) or above; top_p 2.0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_done_is_one_message(run, tmp_path, capsys, words, message):
    pytest.importorskip("PIL.Image")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    names = {"latin": tmp_path / "latin", "absent": tmp_path / "absent"}
    assert generate(run, *(word.format(**names) for word in words)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_a_path_that_is_no_checkpoint_is_named(tmp_path, capsys):
    assert generate(tmp_path / "absent") == 2
    assert "absent does not exist" in capsys.readouterr().err
