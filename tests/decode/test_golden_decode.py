"""Decoding the golden cases: logits and greedy tokens of the public PyTorch class. `tests.model.test_golden` tells of ties."""

import numpy as np
import pytest

from tests.decode import sequences
from tests.model import golden, test_golden
from v4train.decode import prompt as prompt_lib


def decoder(name: str):
    model = golden.config(name)
    return sequences.decoder(model, golden.parameters(name, model), slots=2, max_length=512, prefill_chunk=32, page_tokens=128)


@pytest.mark.parametrize("name", ["untied", "mixed", "yarn"])
def test_logits_and_greedy_tokens_are_those_of_the_reference(name):
    reference = dict(np.load(golden.FOLDER / name / "golden.npz"))
    run, tokens = decoder(name), reference["tokens"]
    half, cache = tokens.shape[1] // 2, run.empty()
    for row in range(2):
        prompt = prompt_lib.Prompt.of_tokens(tokens[row])
        until = test_golden.FIRST_TIE[name][row] if name in test_golden.FIRST_TIE else len(prompt)
        first = min(half, until)
        cache, logits = sequences.prefill(run, cache, prompt, slot=row, pieces=sequences.pieces(first, size=32))
        rest = prompt_lib.Prompt.of_tokens(tokens[row, :until])
        cache, steps = sequences.walk(run, cache, rest, slot=row, start=first)
        found = np.concatenate([logits, steps.reshape(-1, logits.shape[1])])
        np.testing.assert_allclose(found, reference["logits"][row, :until], rtol=0, atol=test_golden.LOGITS, err_msg=f"row {row}")
    if name in test_golden.GREEDY:
        greedy = test_golden.GREEDY[name] or reference["greedy"].tolist()
        assert generate(run, prompt_lib.Prompt.of_tokens(tokens[0, :half]), tokens=len(greedy)) == list(greedy)


def generate(run, prompt: prompt_lib.Prompt, *, tokens: int) -> list[int]:
    cache, logits = sequences.prefill(run, run.empty(), prompt, slot=1, pieces=sequences.pieces(len(prompt), size=32))
    chosen = [int(logits[-1].argmax())]
    while len(chosen) < tokens:
        cache, logits, _ = sequences.step(run, cache, {1: chosen[-1]})
        chosen.append(int(logits[1].argmax()))
    return chosen
