"""Pages have the owners that a plain list of sets says, through random use."""

import collections

import numpy as np

from v4train.decode import config as config_lib
from v4train.decode import pages as pages_lib


def pool(pages: int = 10, slots: int = 4) -> pages_lib.Pages:
    return pages_lib.Pages(config_lib.DecodeConfig(slots=slots, max_length=100, page_tokens=16), pages=pages)


def test_a_sequence_gets_pages_as_it_grows_and_gives_them_back():
    pages = pool()
    assert pages.reserve(1, tokens=16)
    assert pages.reserve(1, tokens=17)
    assert (len(pages.of(1)), pages.free, pages.needed(1, tokens=33)) == (2, 8, 1)
    assert not pages.reserve(1, tokens=8 * 16), "more than the longest sequence"
    assert pages.reserve(0, tokens=100)
    assert not pages.reserve(2, tokens=32)
    assert pages.of(2) == []
    pages.release(0)
    assert pages.free == 8
    assert pages.table[0].tolist() == [-1] * 7


def test_random_use_loses_and_doubles_no_page():
    rng, pages, held = np.random.default_rng(0), pool(pages=17), []
    for _ in range(3000):
        slot = int(rng.integers(4))
        match rng.integers(5):
            case 0:
                pages.release(slot)
            case 1 if not pages.of(slot):
                pages.share(slot, pages=pages.of(int(rng.integers(4)))[:2])
            case 2 if len(held) < 2:
                held.append(pages.of(slot)[:1])
                pages.hold(held[-1])
            case 3 if held:
                pages.drop(held.pop())
            case _:
                pages.reserve(slot, tokens=int(rng.integers(1, 101)))
        owners = collections.Counter(page for each in [*map(pages.of, range(4)), *held] for page in each)
        assert len(owners) + pages.free == 17
        assert all(len(set(pages.of(s))) == len(pages.of(s)) for s in range(4))
