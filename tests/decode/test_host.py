"""Host memory and its file give back what was written, whatever the room; what the file lost is named."""

import logging
import os

import jax
import numpy as np
import pytest

from v4train.decode import host

STRUCTURE = {"data": jax.ShapeDtypeStruct((12,), np.uint8), "scale": jax.ShapeDtypeStruct((2,), np.float32)}
PER_PAGE, PAGES, LAYERS = 4, 20, 3
SEGMENT = 4 * (12 + 8)


def pool(tmp_path=None, *, segments: int, swap: int = 1000) -> host.HostPool:
    file = None if tmp_path is None else host.Swap(tmp_path / "swap", segment_bytes=SEGMENT, segments=swap)
    return host.HostPool(STRUCTURE, per_page=PER_PAGE, pages=PAGES, layers=LAYERS, limit=segments * SEGMENT + 7, swap=file)


def rows(rng, count: int) -> dict[str, np.ndarray]:
    return {"data": rng.integers(0, 256, (count, 12)).astype(np.uint8), "scale": rng.normal(size=(count, 2)).astype(np.float32)}


def play(made: host.HostPool, *, turns: int = 400) -> None:
    """Random writes, reads and ends of pages, beside a plain dictionary."""
    rng, known = np.random.default_rng(0), {}
    for _ in range(turns):
        layer, count = int(rng.integers(LAYERS)), int(rng.integers(1, 30))
        places = np.unravel_index(rng.choice(PAGES * PER_PAGE, count, replace=False), (PAGES, PER_PAGE))
        match rng.integers(5):
            case 0 | 1:
                new = rows(rng, count)
                made.write(layer, *places, new)
                known |= {(layer, *each): {k: v[i] for k, v in new.items()} for i, each in enumerate(zip(*places, strict=True))}
            case 2:
                gone = rng.choice(PAGES, 2, replace=False).tolist()
                made.forget(gone)
                known = {place: value for place, value in known.items() if place[1] not in gone}
            case _:
                held = [place for place in known if place[0] == layer]
                if not held:
                    continue
                wanted = [held[i] for i in rng.integers(len(held), size=count)]
                found = made.read(layer, np.array([p for _, p, _ in wanted]), np.array([o for *_, o in wanted]))
                for name, x in found.items():
                    np.testing.assert_array_equal(x, np.stack([known[place][name] for place in wanted]))
                    assert x.dtype == STRUCTURE[name].dtype


def test_all_in_memory():
    made = pool(segments=PAGES * LAYERS)
    play(made)
    assert made.resident_bytes <= PAGES * LAYERS * SEGMENT


@pytest.mark.parametrize("segments", [1, 3, 25])
def test_the_file_takes_what_memory_cannot_hold(tmp_path, segments):
    made = pool(tmp_path, segments=segments)
    play(made)
    assert made.resident_bytes <= segments * SEGMENT
    assert (made.swap.statistics().read > 50, made.swap.statistics().damaged) == (True, 0)
    assert list(tmp_path.iterdir()) == [], "the file has no name: it is gone with the process"


def test_what_was_read_longest_ago_leaves_first(tmp_path):
    made = pool(tmp_path, segments=3)
    rng = np.random.default_rng(0)
    for page in (0, 1, 2):
        made.write(0, np.array([page]), np.array([0]), rows(rng, 1))
    made.read(0, np.array([0]), np.array([0]))
    made.write(0, np.array([3]), np.array([0]), rows(rng, 1))
    assert [page for page in range(4) if made._frame[page, 0] >= 0] == [0, 2, 3]
    assert made.swap.statistics().written == 1
    for page in (1, 2):
        made.read(0, np.array([page]), np.array([0]))
    assert [page for page in range(4) if made._frame[page, 0] >= 0] == [1, 2, 3]
    assert made.swap.statistics().written == 3
    made.write(0, np.array([3]), np.array([1]), rows(rng, 1))
    made.read(0, np.array([0]), np.array([0]))
    assert [page for page in range(4) if made._frame[page, 0] >= 0] == [0, 2, 3]
    assert made.swap.statistics().written == 3, "what the file has already and nobody changed is not written again"


def test_damage_in_the_file_is_named(tmp_path):
    made = pool(tmp_path, segments=1)
    rng = np.random.default_rng(0)
    for page in range(PAGES):
        made.write(1, np.full(4, page), np.arange(4), rows(rng, 4))
    for place in range(PAGES - 1):
        byte = place * SEGMENT + int(rng.integers(SEGMENT))
        value = os.pread(made.swap._file, 1, byte)[0]
        os.pwrite(made.swap._file, bytes([value ^ 1 << int(rng.integers(8))]), byte)
    for page in range(PAGES - 1):
        found = made.read(1, np.full(4, page), np.arange(4))
        assert not any(x.any() for x in found.values())
    assert made.damaged == set(range(PAGES - 1))
    assert made.swap.statistics().damaged == PAGES - 1


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    made = pool(tmp_path, segments=1)
    rng = np.random.default_rng(0)
    for page in range(2):
        made.write(1, np.full(4, page), np.arange(4), rows(rng, 4))
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert not any(x.any() for x in made.read(1, np.full(4, 0), np.arange(4)).values())
    assert (made.damaged, made.swap.statistics().damaged) == ({0}, 1)


@pytest.mark.parametrize("reason", ["limit", "error"])
def test_without_room_on_the_disk_memory_takes_all(tmp_path, reason, monkeypatch, caplog):
    made = pool(tmp_path, segments=5, swap=3 if reason == "limit" else 1000)
    if reason == "error":
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with caplog.at_level(logging.ERROR):
        play(made)
    assert made.resident_bytes > 5 * SEGMENT
    assert len(caplog.records) == 1
    assert "host memory takes them, beyond its limit" in caplog.text
