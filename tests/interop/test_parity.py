"""The golden cases in full, and that each bound of the comparison can fail."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from tests.model import golden
from v4train.interop import parity, score

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def _compared(name: str) -> parity.Parity:
    return parity.compare(golden.FOLDER / name)


@pytest.mark.parametrize("name", ["mixed", pytest.param("yarn", marks=pytest.mark.slow), pytest.param("untied", marks=pytest.mark.slow)])
def test_a_golden_case_agrees_in_full(name):
    """Logits of every position, tied index scores or not, loss, the gradient norm of every tensor, greedy tokens."""
    found = _compared(name)
    assert not found.failures()
    assert found.logits <= parity.LOGITS
    assert found.loss <= parity.LOSS
    assert found.gradient_norm <= parity.GRADIENT_NORM
    assert found.gradient_norms.keys() >= parity.read(golden.FOLDER / name).gradient_norms.keys()
    assert max(found.gradient_norms.values()) <= parity.GRADIENT_NORM
    assert found.greedy is True


def test_no_golden_tensor_is_excused_as_noise():
    for name in ("mixed", "yarn", "untied"):
        norms = np.array(list(parity.read(golden.FOLDER / name).gradient_norms.values()))
        assert norms.min() > parity.NOISE * math.sqrt(np.sum(norms**2))


@pytest.fixture
def stand_in(monkeypatch):
    """A reference, and scores that agree with it except for what the test changes."""
    checkpoint = score.Checkpoint(golden.config("mixed"), {}, {}, None)
    names = {"embedding/table": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    gradients = {"embedding": {"table": np.full((3, 4), 2.0, np.float32)}, "norm": np.full(4, 1.0, np.float32)}
    norms = {names["embedding/table"]: math.sqrt(48), names["norm"]: 2.0}
    logits = np.arange(60, dtype=np.float32).reshape(2, 5, 6)
    reference = parity.Reference(np.zeros((2, 5), np.int32), logits, 3.0, norms, np.array([4, 5], np.int32))

    whole = math.sqrt(52)

    def run(*, logits=logits, loss=3.0, grad_norm=whole, gradients=gradients, greedy=(4, 5), reference=reference):
        def evaluate(checkpoint, *, tokens, on_logits):
            for block in np.split(logits.reshape(10, 6), [3, 6]):
                on_logits(block)
            return score.Evaluation(loss, grad_norm, gradients)

        monkeypatch.setattr(score, "evaluate", evaluate)
        monkeypatch.setattr(score, "greedy", lambda *_, **__: np.array(greedy, np.int32))
        return parity.measure(checkpoint, reference=reference)

    run.logits, run.gradients, run.reference = logits, gradients, reference
    return run


def test_what_agrees_passes(stand_in):
    found = stand_in()
    assert found == parity.Parity(0.0, 0.0, 0.0, dict.fromkeys(stand_in.reference.gradient_norms, 0.0), True)
    assert not found.failures()


@pytest.mark.parametrize("where", [0, 29, 59])
def test_one_wrong_logit_is_found_in_any_block(stand_in, where):
    wrong = stand_in.logits.copy()
    wrong.flat[where] += 3e-3
    assert stand_in(logits=wrong).failures() == ["logits differ by up to 0.003, allowed 0.0002"]


def test_nan_fails(stand_in):
    wrong = stand_in.logits.copy()
    wrong[0, 1, 1] = np.nan
    assert len(stand_in(logits=wrong, loss=math.nan, grad_norm=math.nan).failures()) == 3


def test_loss_and_norms_are_bounded(stand_in):
    assert stand_in(loss=3.00002).failures() == ["losses differ by 2e-05 nats, allowed 1e-05"]
    assert "gradient norms differ by 0.0002" in stand_in(grad_norm=math.sqrt(52) * 1.0002).failures()[0]
    wrong = stand_in.gradients | {"norm": np.full(4, 1.001, np.float32)}
    assert stand_in(gradients=wrong).failures() == ["model.norm.weight: gradient norms differ by 0.001, allowed 0.0001"]


def test_a_gradient_that_only_one_side_has_fails(stand_in):
    norms = stand_in.reference.gradient_norms
    more = dataclasses.replace(stand_in.reference, gradient_norms=norms | {"model.extra": 1.0})
    assert "model.extra: gradient norms differ by inf, allowed 0.0001" in stand_in(reference=more).failures()
    fewer = dataclasses.replace(stand_in.reference, gradient_norms={"model.norm.weight": 2.0})
    assert any(
        failure.startswith("model.embed_tokens.weight: gradient norms differ by inf") for failure in stand_in(reference=fewer).failures()
    )


def test_greedy_tokens_must_be_identical_and_may_be_absent(stand_in):
    assert stand_in(greedy=(4, 6)).failures() == ["greedy tokens differ"]
    assert stand_in(reference=dataclasses.replace(stand_in.reference, greedy=None)).greedy is None


def test_tiny_gradients_are_measured_against_the_whole(stand_in):
    small = stand_in.gradients | {"norm": np.full(4, 2e-9, np.float32)}
    norms = stand_in.reference.gradient_norms | {"model.norm.weight": 3e-9}
    found = stand_in(gradients=small, reference=dataclasses.replace(stand_in.reference, gradient_norms=norms))
    assert 0 < found.gradient_norms["model.norm.weight"] < parity.GRADIENT_NORM


def test_a_directory_that_is_no_golden_case_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"golden\.npz does not exist: a golden case has config\.json"):
        parity.read(tmp_path)
    np.savez(tmp_path / "golden.npz", tokens=np.zeros((1, 2), np.int32), loss=1.0, grad_names=[], grad_norms=[])
    with pytest.raises(ValueError, match=r"golden\.npz lacks greedy, logits"):
        parity.read(tmp_path)


def test_the_stored_tokens_need_the_padding_that_they_were_made_with():
    """With nothing hidden, the continuation of `yarn` is what the class generates under a mask of ones."""
    ones = [44, 165, 153, 122, 44, 50, 10, 44, 79, 15, 140, 129, 118, 222, 81, 124, 149, 128, 137, 0, 149, 217, 49, 117]
    reference = parity.read(golden.FOLDER / "yarn")
    prompt = reference.tokens[0, : reference.tokens.shape[1] // 2]
    loaded = score.load(golden.FOLDER / "yarn")
    assert score.greedy(loaded, prompt=prompt, count=24, pad_token=None).tolist() == ones
    assert score.greedy(loaded, prompt=prompt, count=24, pad_token=0).tolist() == reference.greedy.tolist()
