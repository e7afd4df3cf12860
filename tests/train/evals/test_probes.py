"""When a run asks what, in which shape of batch and of which text. The judge is a stand-in: its verdicts are `test_judge`'s."""

import types

import numpy as np
import pytest

from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.train import build, stages
from v4train.train import run as run_lib
from v4train.train import state as state_lib
from v4train.train.evals import config, heldout, judge, probes
from v4train.train.hooks import evaluation

QUESTIONS = '{"prompt": "1 + 1 =", "choices": ["2", "three"], "answer": 0}\n' * 3


class Stub:
    """Finds whatever is asked, at a cost of 1 nat a token; remembers its models and shapes."""

    made: list  # of (model, rows, length)

    def __init__(self, model, *, numerics, mesh, rows, length):
        self.made.append((model, rows, length))

    def __call__(self, params, documents):
        return [judge.Verdict(float(len(document.tokens) - document.start), True) for document in documents]


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(judge, "Judge", Stub)
    Stub.made = []
    return Stub.made


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(QUESTIONS, encoding="utf-8")
    return path


def parts_with(stores, evals, **changes):
    recipe = tiny.recipe(stores, train={**tiny.values(stores, stores)["train"], "evals": evals, **changes.pop("train", {})}, **changes)
    return build.parts(recipe)


def records(parts, steps, *, asked=None):
    """What is written at some steps; held-out sums are made up."""
    program = types.SimpleNamespace(evaluate=lambda state, batch, stage: heldout.Sums(*[np.ones(2)] * 3, *[np.ones(4)] * 3))
    written = []
    hook = evaluation.Evaluation(parts, program, written.append, asked=asked or evaluation.prepare(parts), done=lambda seconds: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "add_evaluation", lambda *_: None)
        for step in steps:
            hook.before(step, state_lib.State(None, {}, {}, None, None))
    return written


def test_what_is_due_at_a_step_is_one_record(data, file, made):
    evals = [
        {"kind": "multiple_choice", "path": str(file), "every": 2},
        {"kind": "needle", "lengths": [100, 120], "depths": [0, 1], "samples": 2},
    ]
    found = records(parts_with(data, evals), range(7))
    assert [r["step"] for r in found] == [0, 2, 3, 4, 6]  # eval_every is 3, and holds for the needle
    by_step = {r["step"]: {name.partition("/")[0] for name in r} - {"kind", "step", "tokens"} for r in found}
    losses = {"loss", "bpb", "modality_bpb"}
    assert by_step == {0: losses | {"sums", "needle"}, 2: {"sums"}, 3: losses | {"needle"}, 4: {"sums"}, 6: losses | {"sums", "needle"}}
    assert found[0]["sums/accuracy"] == 1.0
    assert found[0]["sums/questions"] == 3
    assert found[0]["sums/nats_per_byte"] == 2.0  # " 2" is two tokens, and one byte of the choice
    assert found[0]["needle/right"] == 1.0
    assert found[0]["needle/100/1/nats"] == 6.0
    assert all(r["tokens"] == 512 * r["step"] for r in found)
    # Rows of 64 for questions; of 120 for needles, as many as fit into the places of a batch; made once, not at each step.
    assert [(rows, length) for _, rows, length in made] == [(2, 64), (4, 120)]


def test_nothing_is_held_out_but_something_is_asked(data, file, made):
    parts = parts_with(data, [{"kind": "multiple_choice", "path": str(file)}], data={"holdout": 0.0})
    found = records(parts, [0, 6])
    assert [r["step"] for r in found] == [0, 6]
    assert not any(name.startswith("loss/") for r in found for name in r)


def test_the_model_of_the_stage_is_asked(data, file, made):
    change = {"stages": [{"from_step": 2, "attention": "dense"}, {"from_step": 4, "attention": "sparse"}]}
    found = records(parts_with(data, [{"kind": "multiple_choice", "path": str(file), "every": 1}], train=change), range(7))
    phases = [[kind.phase for kind in model.kinds if kind.kind == "csa"] for model, *_ in made]
    assert phases == [["sparse"], ["dense"]]
    asked = [(r["step"], r["attention"]) for r in found if "sums/accuracy" in r]
    assert asked == [(0, "sparse"), (1, "sparse"), (2, "dense"), (3, "dense"), (4, "sparse"), (5, "sparse"), (6, "sparse")]
    losses = [(r["step"], r["attention"]) for r in found if "loss/text" in r]
    assert [(step, how) for step, how in losses if step in (2, 4)] == [(2, "sparse"), (2, "dense"), (4, "dense"), (4, "sparse")]
    assert stages.Stage.of(made[0][0]).mtp_weight == 0, "predictions do not depend on it"


def test_a_file_is_wrong_before_anything_is_compiled(data, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "compile_program", lambda *_, **__: pytest.fail("compiled"))
    path = tiny.write(tmp_path / "run.yaml", data, tmp_path / "run")
    wrong = "train.evals=[{kind: multiple_choice, path: nowhere.jsonl}]"
    with pytest.raises(ValueError, match=r"nowhere.jsonl: No such file or directory"):
        run_lib.run(recipe_lib.resolve(str(path), overrides=[wrong]), program_started=0.0)


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        ("[{kind: needle, lengths: [2048]}]", r"train.evals\[0\].lengths has 2048, but model.max_positions is 1024"),
        ("[{kind: needle, lengths: [64]}, {kind: needle, lengths: [128]}]", r"train.evals: 2 are called 'needle'; give each a name"),
        ("[{kind: needle, lengths: [64], name: loss}]", r"train.evals: 'loss' is a field of every record"),
        ("[{kind: needle, lengths: []}]", "lengths"),
        ("[{kind: needle, lengths: [64], depths: [1.5]}]", "depths"),
        ("[{kind: multiple_choice}]", "path"),
    ],
)
def test_recipes_that_cannot_be_asked(data, tmp_path, evals, message):
    path = tiny.write(tmp_path / "run.yaml", data, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        recipe_lib.resolve(str(path), overrides=[f"train.evals={evals}"])


def test_haystacks_are_held_out_text(data):
    parts = build.parts(tiny.recipe(data, data={"holdout": 0.5}))
    found = probes.held_out(parts.data, tokens=100_000)
    store, documents = parts.data.stores[0], parts.data.documents(0, "holdout")
    text = np.concatenate([store.read(int(i)).tokens for i in documents])
    text = text[text < 256]  # bytes: no begin, no end
    np.testing.assert_array_equal(found[: len(text)], text)
    assert len(probes.held_out(parts.data, tokens=10)) < len(text), "no more is read than is asked for"
    assert probes.held_out(build.parts(tiny.recipe(data, data={"holdout": 0.0})).data, tokens=10) is None


def test_a_text_of_ones_own(data, tmp_path, made):
    (tmp_path / "book.txt").write_text("all work and no play " * 9, encoding="utf-8")
    asked = config.NeedleConfig(lengths=(200,), text=str(tmp_path / "book.txt"))
    common = {"tokenizer": parts_with(data, []).data.tokenizer, "numerics": None, "mesh": None, "rows": 8, "length": 64}
    found = probes.Probes([asked], **common, hay=lambda tokens: pytest.fail("held-out text was asked for"))
    assert (found.probes[0].rows, found.probes[0].length) == (2, 200)
    with pytest.raises(ValueError, match=r"none.txt: No such file"):
        probes.Probes([asked.model_copy(update={"text": "none.txt"})], **common, hay=lambda _: None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 \(byte 3\)"):
        probes.Probes([asked.model_copy(update={"text": str(tmp_path / "latin.txt")})], **common, hay=lambda _: None)
