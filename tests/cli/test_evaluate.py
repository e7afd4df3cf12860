"""``v4train evaluate`` on a saved step: what it prints is what the functions of training say."""

import json
import math

import jax
import numpy as np
import pytest

from tests.data import synthetic
from tests.interop import steps
from v4train.cli import main
from v4train.data import pipeline
from v4train.data import tokenizer as tokenizer_lib
from v4train.interop import score

BYTES = tokenizer_lib.ByteTokenizer()
QUESTIONS = (
    {"prompt": "Python is", "choices": ["a language", "a snake 🐍"], "answer": 0},
    {"question": "Which?", "choices": ["A", "Bb", "ccc"], "answer": "B"},
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """One layer, on documents that no row cuts: `score` counts positions from the beginning of what it is given."""
    path = synthetic.make_test_store(tmp_path_factory.mktemp("stores") / "text", lengths=tuple(range(20, 120)), patch=4)
    small = ("model.layers=[{pattern: [csa]}]", "model.moe.hash_layers=1", "model.audio=null", "data.max_audio_frames=0")
    data = (f"data.sources=[{{name: text, path: {path}, weight: 1, packing: no_split}}]", "data.holdout=0.3")
    return steps.recipe("configs/tiny.yaml", *small, *data, "train.batch_rows=4", "mesh.expert=1", "mesh.fsdp=1")


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "mine"
    steps.write(directory, recipe, steps.values(recipe.model))
    return directory


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "few.jsonl"
    path.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), encoding="utf-8")
    return path


def nats_of(run, tokens: np.ndarray) -> np.ndarray:
    """Nats of each token but the first, in fp64, from the logits that `v4train score` writes."""
    blocks: list[np.ndarray] = []
    score.evaluate(score.load(run), tokens=tokens[None].astype(np.int32), on_logits=lambda block: blocks.append(np.array(block)))
    logits = np.concatenate(blocks).astype(np.float64)[:-1]
    top = logits.max(axis=1)
    return np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(logits)), tokens[1:]]


def said(capsys, *words) -> dict:
    assert main.main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_questions_agree_with_scored_logits(run, file, capsys):
    found = said(capsys, run, "--choices", file)
    assert (found["name"], found["step"], found["attention"], found["heldout"]) == ("tiny", steps.STEP, "sparse", {})
    scores = []
    for context, choices in (("Python is", ("a language", "a snake 🐍")), ("Question: Which?\nAnswer:", ("A", "Bb", "ccc"))):
        begin = 1 + len(BYTES.encode(context))
        wholes = [np.concatenate([[BYTES.bos], BYTES.encode(f"{context} {choice}")]) for choice in choices]
        scores.append([-nats_of(run, whole)[begin - 1 :].sum() for whole in wholes])
    few = found["evaluations"]["few"]
    for ours, theirs in zip(few["scores"], scores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    right = [np.argmax(s) == answer for s, answer in zip(scores, (0, 1), strict=True)]
    assert few["accuracy"] == np.mean(right)
    assert few["questions"] == 2


def test_held_out_loss_agrees_with_scored_logits(run, recipe, capsys):
    found = said(capsys, run)["heldout"]
    (batch,) = pipeline.Pipeline(recipe.data, batch_rows=4).holdout_batches("text", batches=1, batch_rows=4)
    nats, spelt, count = 0.0, 0, 0
    # Of one length, so that one program scores them all: what follows a document changes nothing before it.
    documents = [batch.tokens[row][batch.segment_ids[row] == n] for row in range(4) for n in range(1, batch.segment_ids[row].max() + 1)]
    assert len(documents) > 4
    for tokens in documents:
        assert (tokens[0], tokens[-1]) == (BYTES.bos, BYTES.eos)
        padded = np.concatenate([tokens, np.zeros(128 - len(tokens), np.int32)])
        nats += nats_of(run, padded)[: len(tokens) - 1].sum()
        spelt += len(tokens) - 2
        count += len(tokens) - 1
    assert found["loss/text"] == pytest.approx(nats / count, rel=1e-4)
    assert found["bpb/text"] == pytest.approx(nats / math.log(2) / spelt, rel=1e-4)
    assert found["modality_bpb/text"] == found["bpb/text"]


def test_what_a_person_reads(run, file, capsys):
    words = ["evaluate", str(run), "--choices", str(file), "--needle", "--lengths", "128,100", "--depths", "0,0.5", "--samples", "1"]
    assert main.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tiny step {steps.STEP}, sparse attention"
    assert lines[1].startswith("few: ")
    assert lines[1].endswith("of 2 questions")
    assert lines[2:4] == ["needle, 1 samples a cell: share found, nats of the answer", f"length  {0:>14g}{0.5:>14g}"]
    assert [line.split()[0] for line in lines[4:]] == ["128", "100"]
    assert len(jax.devices()) >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--choices", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["--needle", "--lengths", "100000"], "--lengths 100000: the model was made for 65536 positions"),
        (["--needle", "--lengths", "20"], "a length of 20 tokens has no room"),
        (["--needle", "--depths", "2"], "depths from 0 to 1"),
        (["--samples", "0"], "--samples 0: give at least 1"),
    ],
)
def test_what_cannot_be_asked(run, words, message, capsys):
    assert main.main(["evaluate", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_no_checkpoint(tmp_path, capsys):
    assert main.main(["evaluate", str(tmp_path)]) == 2
    assert "or a directory in the released layout (with config.json)" in capsys.readouterr().err
