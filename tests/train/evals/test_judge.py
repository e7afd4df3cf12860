"""Verdicts against the logits of each document alone, packed or not, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import tiny
from v4train.core import param, tree
from v4train.data import tokenizer
from v4train.model import context, transformer
from v4train.sharding import rules
from v4train.train import build
from v4train.train.evals import choices, judge, needle

BYTES = tokenizer.ByteTokenizer()
TEXTS = ["", "a", "def f(x):", "naïve 你好 🙂", "The quick brown fox jumps over the lazy dog. " * 2, "x" * 120]


def documents():
    """Of different lengths and starts, one of them twice."""
    ids = [np.array([BYTES.bos, *BYTES.encode(f"{text}!")], np.int32) for text in TEXTS]
    asked = [judge.Asked(tokens, start) for tokens in ids for start in {1, max(len(tokens) // 2, 1), len(tokens) - 1}]
    return [*asked, asked[3]]


@pytest.fixture(scope="module")
def case(data):
    parts = build.parts(tiny.recipe(data))
    state = build.first_state(parts)
    params = tree.merge(state.params, state.buffers)
    # Scaled up, or all ids would be about as likely as each other.
    params["head"] = params["head"] * 40
    return parts, params


@pytest.fixture(scope="module")
def judged(case):
    parts, _ = case
    return judge.Judge(parts.recipe.model, numerics=parts.recipe.numerics, mesh=parts.mesh, rows=2, length=100)


@pytest.fixture(scope="module")
def verdicts(judged, case):
    return judged(case[1], documents())


@pytest.fixture(scope="module")
def logits(case):
    """A function from ids to the fp64 logits of that document alone in a row, media ids left out."""
    parts, params = case
    model = transformer.Transformer(parts.recipe.model.model_copy(update={"mtp": None}))
    params = {name: part for name, part in params.items() if name != "mtp"}

    @jax.jit
    def run(tokens, used):
        places = jnp.arange(tokens.shape[1])[None]
        inside = places < used
        zero = jnp.zeros_like(tokens)
        blank = {"patches": np.zeros((1, 1, 12), np.uint8), "patch_slot": zero - 1, "patch_xy": np.zeros((1, 1, 2), np.int16)}
        blank |= {"audio": np.zeros((1, 1, 80), np.uint8), "audio_slot": zero - 1}
        bound = param.bind(model, params)
        inputs = context.Inputs(tokens, inside.astype(jnp.int32), jnp.where(inside, places, 0), zero, **blank)
        return bound.logits(bound(inputs).hidden)[0]

    def alone(ids):
        row = np.zeros((1, 128), np.int32)
        row[0, : len(ids)] = ids
        scores = np.asarray(run(row, len(ids)), np.float64)[: len(ids)]
        scores[:, list(parts.recipe.model.media_tokens)] = -np.inf
        return scores

    return alone


def by_hand(scores, document):
    """Nats of the tokens asked for, and whether each of them is on top."""
    nats, right = 0.0, True
    for at in range(document.start, len(document.tokens)):
        line, target = scores[at - 1], document.tokens[at]
        nats += np.log(np.exp(line - line.max()).sum()) + line.max() - line[target]
        right &= bool(line[target] >= line.max())
    return nats, right


def test_verdicts_are_those_of_each_document_alone(verdicts, logits):
    wanted = [by_hand(logits(document.tokens), document) for document in documents()]
    np.testing.assert_allclose([v.nats for v in verdicts], [nats for nats, _ in wanted], rtol=2e-5)
    assert [v.right for v in verdicts] == [right for _, right in wanted]


def test_greedy_continuations_are_right_and_others_are_not(judged, case, logits):
    ids = [BYTES.bos, *BYTES.encode("so")]
    for _ in range(4):
        ids.append(int(logits(np.array(ids))[-1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 256]
    found = judged(case[1], [judge.Asked(np.array(tokens, np.int32), 3) for tokens in (ids, wrong)])
    assert [v.right for v in found] == [True, False]


def test_equal_documents_get_equal_verdicts(verdicts):
    assert verdicts[-1] == verdicts[3]


def test_one_program_serves_all(judged, case, monkeypatch):
    assert (judged.rows, judged.length) == (2, 128)
    monkeypatch.setattr(judged, "_compile", lambda *_: pytest.fail("compiled again"))
    judged(case[1], documents()[:2])


@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2, "context": 2}, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same(data, verdicts, case, axes, monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SPLIT", 64)
    parts = build.parts(tiny.recipe(data, mesh=axes))
    placed = tree.merge(parts.state.params, parts.state.buffers)
    params = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), case[1], placed)
    on_mesh = judge.Judge(parts.recipe.model, numerics=parts.recipe.numerics, mesh=parts.mesh, rows=3, length=100)
    assert (on_mesh.rows, on_mesh.length) == (4 if "expert" in axes else 2, 256 if "context" in axes else 128)
    found = on_mesh(params, documents())
    np.testing.assert_allclose([v.nats for v in found], [v.nats for v in verdicts], rtol=2e-5)
    assert [v.right for v in found] == [v.right for v in verdicts]


def test_rows_are_packed_and_no_longer_than_they_are():
    lengths = [5, 3, 8, 2, 2, 10, 1]
    rows = judge.pack(lengths, length=10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4


def test_questions_are_answered_as_the_logits_say(judged, case, logits, tmp_path):
    """The whole way from a file, with a tie of two equal choices."""
    path = tmp_path / "some.jsonl"
    path.write_text(
        '{"prompt": "né", "choices": ["ab", "你", "z"], "answer": 1}\n'
        '{"prompt": "1 + 1 =", "choices": ["2", "2", "three"], "answer": 0}\n'
        '{"question": "Who?", "choices": ["I", "you"], "answer": "B"}\n',
        encoding="utf-8",
    )
    questions = choices.read(path)
    found = choices.ask(choices.encode(questions, tokenizer=BYTES, length=128, cut=False), judged=judged, params=case[1])
    sums, credits = [], {"plain": [], "per byte": []}
    for question in questions:
        begin = np.array([BYTES.bos, *BYTES.encode(question.context)])
        of_question = []
        for text in question.continuations:
            whole = np.concatenate([begin, BYTES.encode(text)])
            of_question.append(-by_hand(logits(whole), judge.Asked(whole, len(begin)))[0])
        sums.append(of_question)
        sizes = np.array([len(text.encode()) for text in question.texts])
        for name, scores in (("plain", np.array(of_question)), ("per byte", np.array(of_question) / sizes)):
            best = np.isclose(scores, scores.max(), rtol=1e-7)
            credits[name].append(best[question.answer] / best.sum())
    for ours, theirs in zip(found.scores, sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert found.scores[1][0] == found.scores[1][1], "an exact tie"
    assert found.accuracy == pytest.approx(np.mean(credits["plain"]))
    assert found.accuracy_per_byte == pytest.approx(np.mean(credits["per byte"]))


def test_needles_are_judged_as_the_logits_say(judged, case, logits):
    hay = needle.haystack(needle.text(), tokenizer=BYTES, source="")
    grid = {"lengths": (110, 128), "depths": (0.0, 1.0), "samples": 2, "seed": 3}
    cells = needle.ask(hay, tokenizer=BYTES, judged=judged, params=case[1], **grid)
    assert [(cell.length, cell.depth) for cell in cells] == [(110, 0), (110, 1), (128, 0), (128, 1)]
    for cell in cells:
        seeds = [(3, cell.length, round(cell.depth * 1000), i) for i in range(2)]
        asked = [needle.document(hay, tokenizer=BYTES, length=cell.length, depth=cell.depth, seed=seed) for seed in seeds]
        wanted = [by_hand(logits(document.tokens), document) for document in asked]
        assert cell.nats == pytest.approx(np.mean([nats for nats, _ in wanted]), rel=2e-5)
        assert cell.right == np.mean([right for _, right in wanted])
