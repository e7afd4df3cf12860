"""With the released compression ratios and window, around their boundaries; and for long sequences."""

import numpy as np
import pytest

from tests.decode import sequences
from tests.model import small

EXACT = {"rtol": 0, "atol": 1e-4}
KINDS = [{"kind": "window"}, {"kind": "csa", "ratio": 4, "index_heads": 4, "index_head_dim": 8, "top_k": 16}, {"kind": "hca", "ratio": 128}]
MODEL = small.config(
    layers=[{"pattern": ["window"]}, {"pattern": ["csa", "hca"], "repeat": 2}],
    kinds=KINDS,
    attention={"window": 128, "chunk": 32},
    mtp=None,
)
SIZES = {"slots": 2, "max_length": 5120, "prefill_chunk": 64, "page_tokens": 256}


@pytest.fixture(scope="module")
def params():
    return small.parameters(MODEL)


@pytest.fixture(scope="module")
def decoder(params):
    return sequences.decoder(MODEL, params, **SIZES)


@pytest.fixture(scope="module")
def prompt():
    return sequences.text(261)


@pytest.fixture(scope="module")
def expected(params, prompt):
    return sequences.teacher(MODEL, params, prompt)[0]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 257])
def test_around_the_boundaries_of_window_block_and_page(decoder, prompt, expected, length):
    cache, first = sequences.prefill(decoder, decoder.empty(), prompt, slot=1, pieces=sequences.pieces(length, size=64))
    np.testing.assert_allclose(first, expected[:length], **EXACT)
    for at in range(length, length + 4):
        cache, logits, _ = sequences.step(decoder, cache, {1: int(prompt.tokens[at])})
        np.testing.assert_allclose(logits[1], expected[at], **EXACT)


def test_step_by_step_across_all_of_them(decoder, prompt, expected):
    np.testing.assert_allclose(sequences.walk(decoder, decoder.empty(), prompt, slot=0, start=0)[1], expected, **EXACT)


@pytest.mark.slow
def test_five_thousand_tokens(params):
    """Long: the training forward pass over a row of this length. 1,250 entries, of which 16 are selected, in blocks of less."""
    prompt = sequences.text(5_000 + 8)
    decoder = sequences.decoder(MODEL, params, **SIZES | {"prefill_chunk": 512})
    expected = sequences.teacher(MODEL, params, prompt)[0]
    cache, first = sequences.prefill(decoder, decoder.empty(), prompt, slot=1, pieces=sequences.pieces(5_000, size=512))
    _, rest = sequences.walk(decoder, cache, prompt, slot=1, start=5_000)
    np.testing.assert_allclose(np.concatenate([first, rest]), expected, **EXACT)
