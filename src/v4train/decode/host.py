"""Entries in host memory, and those of them that do not fit in a file.

A *segment* is the entries of one page in one layer (64 of V4-Flash's CSA: 37,376 bytes), the unit of room. The pool has as many *frames*
as its limit allows, each holds one segment, and a table says which; so the memory is taken once, and what is gathered from many
segments is one indexed read. When all frames are taken, the segment that was read longest ago gives its frame up; unless the file has it
already it is written there first.

The file is scratch: it belongs to this process, nothing in it outlives it, so it is not synced; each segment's CRC32C is kept in memory.
A segment whose sum is wrong is *damaged*: readers get zeros for it, and `HostPool.damaged` names its page, so that whoever asked can
throw the result away. If the file cannot be written (full disk), that is said once, and the pool grows beyond its limit instead: what has
been promised to sequences that run is kept.

The rejected alternative to a table of frames, one numpy array a page, makes a gather of 512 entries a Python loop over up to 512 arrays.
"""

import logging
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

_log = logging.getLogger(__name__)

Rows = dict[str, np.ndarray]
"""Stored entries by the name of their arrays, ``[n, width]``."""


class SwapStatistics(NamedTuple):
    """Bytes in use and segments so far."""

    bytes: int
    written: int
    read: int
    damaged: int


class Swap:
    """A file of segments, each in a place of its own."""

    def __init__(self, path: pathlib.Path, *, segment_bytes: int, segments: int):
        """Opens an empty file.

        Raises:
            OSError: it cannot be made.
        """
        from v4train.decode import crc

        self._sum = crc.crc32c()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink(path)  # gone with the process, however that ends
        self._size, self._most = segment_bytes, segments
        self._places: dict[int, tuple[int, int]] = {}  # of a segment: where it lies, and its sum
        self._free: list[int] = []
        self._counts = [0, 0, 0]

    def __contains__(self, segment: int) -> bool:
        return segment in self._places

    def write(self, segment: int, data: bytes) -> None:
        """Keeps a segment.

        Raises:
            OSError: there is no room.
        """
        held = self._places.get(segment)
        if held is None and not self._free and len(self._places) >= self._most:
            raise OSError(f"the {self._most} segments that the limit allows are taken")
        place = held[0] if held else self._free.pop() if self._free else len(self._places)
        try:
            done = os.pwrite(self._file, data, place * self._size)
            if done != len(data):
                raise OSError(f"only {done} of {len(data)} bytes could be written")
        except OSError:
            self._places.pop(segment, None)
            self._free.append(place)
            raise
        self._places[segment] = place, self._sum(data)
        self._counts[0] += 1

    def read(self, segment: int) -> bytes | None:
        """A segment; None if it is not what was written, or cannot be read."""
        place, expected = self._places[segment]
        self._counts[1] += 1
        try:
            data = os.pread(self._file, self._size, place * self._size)
        except OSError as error:
            _log.warning("entries cannot be read from the disk (%s): they are computed again", error)
            data = b""
        if len(data) == self._size and self._sum(data) == expected:
            return data
        self._counts[2] += 1
        return None

    def forget(self, segment: int) -> None:
        """The segment's place is free."""
        held = self._places.pop(segment, None)
        if held is not None:
            self._free.append(held[0])

    def statistics(self) -> SwapStatistics:
        """Of now."""
        return SwapStatistics(len(self._places) * self._size, *self._counts)

    def close(self) -> None:
        """Gives the file up."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class HostPool:
    """Entries by page, layer and place in the page.

    Attributes:
        damaged: pages of which a segment was lost; for the caller to empty.
    """

    def __init__(self, structure: dict[str, Any], *, per_page: int, pages: int, layers: int, limit: int, swap: Swap | None = None):
        """An empty pool.

        Args:
            structure: the arrays of one entry, as `formats.Format.structure` gives them without leading axes.
            limit: bytes of all frames.
        """
        self._structure, self._per_page, self._layers, self.swap = structure, per_page, layers, swap
        self.segment_bytes = segment_bytes(structure, per_page=per_page)
        frames = min(pages * layers, limit // self.segment_bytes)
        self._frame: Int[np.ndarray, "p l"] = np.full((pages, layers), -1, np.int32)
        self._rows: dict[str, UInt8[np.ndarray, "n w"]] = {}
        self._owner, self._stamp, self._changed = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool)
        self._free: list[int] = []
        self._clock = 0
        self.damaged: set[int] = set()
        self._grow(frames)

    @property
    def resident_bytes(self) -> int:
        """Of segments in memory."""
        return (len(self._owner) - len(self._free)) * self.segment_bytes

    def write(self, layer: int, pages: Int[np.ndarray, "n"], offsets: Int[np.ndarray, "n"], rows: Rows) -> None:
        """Puts entries where they belong."""
        for part in self._parts(pages):
            self._bring(layer, pages[part])
            places = self._frame[pages[part], layer].astype(np.int64) * self._per_page + offsets[part]
            for name, own in self._rows.items():
                own[places] = rows[name][part].view(np.uint8)
            self._changed[self._frame[pages[part], layer]] = True

    def read(self, layer: int, pages: Int[np.ndarray, "n"], offsets: Int[np.ndarray, "n"]) -> Rows:
        """Entries, in the order asked for."""
        parts = self._parts(pages)
        if len(parts) == 1:
            return self._take(layer, pages, offsets)
        out = {name: np.empty((len(pages), *s.shape), s.dtype) for name, s in self._structure.items()}
        for part in parts:
            for name, rows in self._take(layer, pages[part], offsets[part]).items():
                out[name][part] = rows
        return out

    def page(self, page: int) -> dict[str, np.ndarray]:
        """All entries of a page, ``[layers, entries of a page, ...]``."""
        offsets = np.arange(self._per_page)
        each = [self.read(layer, np.full(self._per_page, page), offsets) for layer in range(self._layers)]
        return {name: np.stack([rows[name] for rows in each]) for name in self._structure}

    def put_page(self, page: int, rows: dict[str, np.ndarray]) -> None:
        """The inverse of `page`."""
        offsets = np.arange(self._per_page)
        for layer in range(self._layers):
            self.write(layer, np.full(self._per_page, page), offsets, {name: x[layer] for name, x in rows.items()})

    def forget(self, pages: list[int]) -> None:
        """Nobody will read these pages again before they are written anew."""
        frames = self._frame[pages]
        self._free += frames[frames >= 0].tolist()
        self._owner[frames[frames >= 0]] = -1
        self._frame[pages] = -1
        if self.swap is not None:
            for page in pages:
                for layer in range(self._layers):
                    self.swap.forget(page * self._layers + layer)

    def _parts(self, pages: np.ndarray) -> list[Any]:
        """Cuts a request into parts whose segments can be in memory together."""
        most = len(self._owner)
        if len(pages) <= most or len(distinct := np.unique(pages)) <= most:
            return [slice(None)]
        return [np.flatnonzero(np.isin(pages, distinct[i : i + most])) for i in range(0, len(distinct), most)]

    def _take(self, layer: int, pages: np.ndarray, offsets: np.ndarray) -> Rows:
        self._bring(layer, pages)
        places = self._frame[pages, layer].astype(np.int64) * self._per_page + offsets
        taken = {name: np.take(own, places, axis=0) for name, own in self._rows.items()}
        return {name: rows.view(self._structure[name].dtype) for name, rows in taken.items()}

    def _bring(self, layer: int, pages: np.ndarray) -> None:
        """Sees that these segments have frames, with what they held."""
        self._clock += 1
        frames = self._frame[pages, layer]
        absent = frames < 0
        self._stamp[frames[~absent]] = self._clock
        if not absent.any():
            return
        missing = np.unique(pages[absent])
        self._make_room(len(missing))
        for page in missing.tolist():
            frame, segment = self._free.pop(), page * self._layers + layer
            self._frame[page, layer], self._owner[frame] = frame, segment
            self._stamp[frame], self._changed[frame] = self._clock, False
            if self.swap is not None and segment in self.swap:
                self._load(page, frame, segment)

    def _load(self, page: int, frame: int, segment: int) -> None:
        assert self.swap is not None
        data = self.swap.read(segment)
        if data is None:
            self.damaged.add(page)
            data = bytes(self.segment_bytes)
        flat, at = np.frombuffer(data, np.uint8), 0
        for own in self._rows.values():
            size = self._per_page * own.shape[1]
            own[frame * self._per_page : (frame + 1) * self._per_page] = flat[at : at + size].reshape(self._per_page, -1)
            at += size

    def _make_room(self, count: int) -> None:
        lacking = count - len(self._free)
        if lacking <= 0:
            return
        old = np.flatnonzero((self._owner >= 0) & (self._stamp < self._clock))
        victims = old[np.argsort(self._stamp[old], kind="stable")[:lacking]].tolist()
        for frame in victims:
            if not self._give_up(frame):
                break
        if len(self._free) < count:
            self._grow(count - len(self._free))

    def _give_up(self, frame: int) -> bool:
        """Whether the frame is free: its segment lies in the file."""
        segment = int(self._owner[frame])
        if self.swap is None:
            return False
        if self._changed[frame] or segment not in self.swap:
            span = slice(frame * self._per_page, (frame + 1) * self._per_page)
            try:
                self.swap.write(segment, b"".join(own[span].tobytes() for own in self._rows.values()))
            except OSError as error:
                if not self._said:
                    self._said = True
                    _log.error("entries cannot be written to the disk (%s): host memory takes them, beyond its limit", error)
                return False
        self._frame[segment // self._layers, segment % self._layers] = -1
        self._owner[frame] = -1
        self._free.append(frame)
        return True

    _said = False

    def _grow(self, frames: int) -> None:
        """More frames: the first ones, or beyond the limit."""
        have = len(self._owner)
        frames = max(frames, have // 8)
        for name, s in self._structure.items():
            more = np.zeros((frames * self._per_page, int(np.prod(s.shape)) * s.dtype.itemsize), np.uint8)
            self._rows[name] = np.concatenate([self._rows[name], more]) if have else more
        self._owner = np.concatenate([self._owner, np.full(frames, -1)])
        self._stamp = np.concatenate([self._stamp, np.zeros(frames, np.int64)])
        self._changed = np.concatenate([self._changed, np.zeros(frames, bool)])
        self._free = list(range(have + frames - 1, have - 1, -1)) + self._free


def segment_bytes(structure: dict[str, Any], *, per_page: int) -> int:
    """Of the entries of one page in one layer."""
    return per_page * sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in structure.values())
