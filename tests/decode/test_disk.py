"""Blocks on disk: whole or not there, whatever happens to the process, the bytes or the room."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from v4train.decode import disk

RNG = np.random.default_rng(0)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in (path / "blocks").rglob("*") if file.is_file())


@pytest.fixture
def blocks(tmp_path):
    made = disk.Blocks(tmp_path, limit=10**6)
    yield made
    if made._writer.is_alive():
        made.close()


def fill(blocks: disk.Blocks, numbers) -> None:
    for number in numbers:
        blocks.put(key(number), lambda number=number: content(number))
    blocks.flush()


def test_what_is_put_is_found_now_and_after_a_restart(blocks, tmp_path):
    fill(blocks, range(20))
    assert [blocks.get(key(i)) for i in range(21)] == [content(i) for i in range(20)] + [None]
    assert blocks.used == 20 * 1064 == sum(file.stat().st_size for file in files(tmp_path))
    blocks.close()
    again = disk.Blocks(tmp_path, limit=10**6)
    assert (again.get(key(7)), again.used) == (content(7), 20 * 1064)
    again.close()


def test_every_flipped_bit_is_noticed(blocks, tmp_path):
    """In a hundred blocks, anywhere: header or content; the block is gone afterwards, and can be written anew."""
    fill(blocks, range(100))
    for number, file in enumerate(files(tmp_path)):
        data = bytearray(file.read_bytes())
        bit = int(RNG.integers(len(data) * 8)) if number else 20 * 8  # the field of the header that says nothing
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    assert [blocks.get(key(i)) for i in range(100)] == [None] * 100
    assert blocks.counts["crc_failures"] == 100
    assert (files(tmp_path), blocks.used) == ([], 0)
    fill(blocks, range(100))
    assert all(blocks.get(key(i)) == content(i) for i in range(100))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:30], lambda data: data[:-1], lambda data: data + b"x"])
def test_other_lengths_are_noticed(blocks, tmp_path, damage):
    fill(blocks, [1])
    (file,) = files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert blocks.get(key(1)) is None
    assert blocks.counts["crc_failures"] == 1


def test_a_block_under_another_name_is_noticed(blocks, tmp_path):
    fill(blocks, [1, 2])
    first, second = files(tmp_path)
    first.replace(second)
    assert (blocks.get(key(1)), blocks.get(key(2))) == (None, None)


def test_what_was_used_longest_ago_goes_first_also_after_a_restart(tmp_path):
    blocks = disk.Blocks(tmp_path, limit=10 * 1064)
    fill(blocks, range(10))
    assert blocks.get(key(0)) == content(0)
    blocks.touch([key(2)])
    fill(blocks, [10, 11])
    kept = {0, 2, *range(4, 12)} - {4} | {4}
    assert {i for i in range(12) if key(i) in blocks} == kept == {0, 2, 4, 5, 6, 7, 8, 9, 10, 11}
    assert blocks.used <= 10 * 1064
    blocks.close()
    now = time.time_ns()
    for order, number in enumerate([5, 4, 6, 7, 8, 9, 10, 11, 0, 2]):  # file systems tell times apart coarsely
        os.utime(blocks._file(key(number)), ns=(now + order * 10**9,) * 2)
    again = disk.Blocks(tmp_path, limit=10 * 1064)
    fill(again, [12, 13])
    assert {i for i in range(14) if key(i) in again} == {0, 2, 6, 7, 8, 9, 10, 11, 12, 13}
    assert again.counts["disk_evictions"] == 2
    again.close()


def test_a_block_larger_than_the_limit_is_not_kept(tmp_path):
    blocks = disk.Blocks(tmp_path, limit=500)
    fill(blocks, [1])
    assert (files(tmp_path), blocks.off) == ([], False)
    blocks.close()


def test_a_full_disk_ends_the_writing_with_one_message(blocks, tmp_path, monkeypatch, caplog):
    fill(blocks, [1])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    fill(blocks, [2, 3, 4])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be written (No space left on device): "
        "blocks that are there are still read, new ones are not kept until the next start"
    ]
    assert [blocks.get(key(i)) for i in (1, 2, 3)] == [content(1), None, None]
    assert len(files(tmp_path)) == 1, "nothing half-written stays"


def test_a_second_process_is_refused(blocks, tmp_path):
    with pytest.raises(ValueError, match="is in use by another process: give each its own directory"):
        disk.Blocks(tmp_path, limit=100)


def test_a_place_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"decode.tiers.disk.path .*file: it is a file: give a directory that can be written"):
        disk.Blocks(tmp_path / "file", limit=100)


WRITER = """
import pathlib, sys
from v4train.decode import disk
blocks = disk.Blocks(pathlib.Path(sys.argv[1]), limit=60_000_000)
print("ready", flush=True)
for number in range(10**9):
    at = number % 97
    blocks.put(at.to_bytes(32, "big"), lambda at=at: bytes([at]) * 4_000_000)
"""


def test_a_killed_writer_leaves_whole_blocks_only(tmp_path):
    """Killed twelve times at any moment, mostly within a write; each next process opens the directory, and all that it finds is right."""
    rng, seen = np.random.default_rng(1), 0
    for _ in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0.0, 0.1)))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        blocks = disk.Blocks(tmp_path, limit=60_000_000)
        assert not any(file.suffix == ".tmp" for file in files(tmp_path))
        held = [i for i in range(97) if key(i) in blocks]
        assert all(blocks.get(key(i)) == bytes([i]) * 4_000_000 for i in held)
        assert blocks.counts["crc_failures"] == 0
        assert blocks.used == sum(file.stat().st_size for file in files(tmp_path)) <= 60_000_000
        seen += len(held)
        blocks.close()
    assert seen > 10
