"""Pieces of text are whole characters, add up to the text of all tokens, and end before a stop text however it is cut."""

import numpy as np
import pytest

from v4train.data import tokenizer as tokenizer_lib
from v4train.decode import text

BYTES = tokenizer_lib.ByteTokenizer()
WORDS = "naïve € 𝄞 日本語 – end"


def pieces(ids, *, stop=()) -> tuple[list[str], bool]:
    answer, found = text.Answer(BYTES, stop=stop), []
    for token in ids:
        found.append(answer.push(int(token)))
        if answer.stopped:
            return found, True
    return [*found, answer.flush()], False


def test_characters_of_several_bytes_come_whole():
    found, stopped = pieces(BYTES.encode(WORDS))
    assert [piece for piece in found if piece] == list(WORDS)
    assert not stopped


@pytest.mark.parametrize("seed", range(30))
def test_pieces_of_any_bytes_add_up(seed):
    rng = np.random.default_rng(seed)
    ids = rng.choice([*b"ab", 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 257, 270], 60)
    assert "".join(pieces(ids)[0]) == BYTES.decode(ids)


@pytest.mark.parametrize("seed", range(30))
def test_an_answer_ends_before_its_first_stop_text(seed):
    rng = np.random.default_rng(seed)
    whole = "".join(rng.choice(list("abé"), 40))
    stop = tuple("".join(rng.choice(list("abé"), int(rng.integers(1, 5)))) for _ in range(3))
    found, stopped = pieces(BYTES.encode(whole), stop=stop)
    # The stop text that is complete first decides, and of several the one that begins first.
    ends = [end for end in range(1, len(whole) + 1) if any(one in whole[:end] for one in stop)]
    expected = whole if not ends else whole[: min(place for one in stop if (place := whole[: ends[0]].find(one)) >= 0)]
    assert ("".join(found), stopped) == (expected, bool(ends))


def test_what_cannot_begin_a_stop_text_is_not_held_back():
    found, _ = pieces(BYTES.encode("the END, or E"), stop=("END.",))
    assert found[:4] == list("the ")
    assert found[4:8] == ["", "", "", "END,"]
    assert found[-2:] == ["", "E"]
