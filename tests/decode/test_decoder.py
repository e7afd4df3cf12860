"""Decoding gives the logits of the training forward pass at every position, however the tokens come."""

import jax
import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small

EXACT = {"rtol": 0, "atol": 1e-4}
MODEL = small.config(layers=[{"pattern": ["window"], "repeat": 2}, {"pattern": ["csa", "hca"], "repeat": 2}], moe={"hash_layers": 3})


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def prompt():
    return sequences.text(75)


@pytest.fixture(scope="module")
def expected(params, prompt):
    return sequences.teacher(MODEL, params, prompt)[0]


@pytest.fixture(scope="module")
def decoder(params):
    return sequences.decoder(MODEL, params)


def test_prefill_and_steps_give_the_logits_of_training(decoder, prompt, expected):
    cache, first = sequences.prefill(decoder, decoder.empty(), prompt, slot=1, pieces=sequences.pieces(40, size=16))
    cache, rest = sequences.walk(decoder, cache, prompt, slot=1, start=40)
    np.testing.assert_allclose(np.concatenate([first, rest]), expected, **EXACT)
    assert cache.lengths.tolist() == [0, 75, 0]
