"""Where a store keeps its documents: two layouts of a shard.

* **records**: one ArrayRecord record a document (`document.encode`), zstd. Small (1.5 to 2 bytes a token), one file a shard, and
  whole documents are decoded; those of a batch are read in one call, which the reader spreads over the cores.
* **flat**: tokens and media as they will stand in a batch, one document after another: ``shard-00000.tokens`` (``u16`` or ``u32``) and,
  where there are any, ``shard-00000.media`` (for each span its patches and their coordinates, or its frames). Four bytes a token, but a
  piece of a document is one read of its own bytes into place, which makes it several times faster and lets images come in at the
  speed of memory. Every `CHUNK` tokens and every media span has a 32-bit checksum (the low half of XXH3), in an index that is mapped,
  so a flipped byte is noticed by the pieces that contain it and by nothing else.

Files are read with ``pread``, not mapped: where a file shrinks, or a network disk goes away, a mapped page kills the process with a
signal, and a read returns an error that can become padding. Mapped pages would also count as memory of the process.
"""

import bisect
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

from v4train.data import document as document_lib

CHUNK = 8192
"""Tokens under one checksum of the flat layout: a piece of a long document is read with the rest of its first and last chunk."""

PLACE = np.dtype([("at", "<u8"), ("chunk", "<u8")])
"""Of a document in the flat layout: its first token within the shard, its first checksum within the store."""
MEDIA_PLACE = np.dtype([("at", "<u8"), ("checksum", "<u4")])
"""Of a media span in the flat layout: its first byte within the shard, its checksum."""
_OPEN_FILES = 256


class ShardWriter(Protocol):
    """Adds checked documents to shards, one after another."""

    def open(self, stem: str) -> None: ...
    def add(self, document: document_lib.Document) -> None: ...
    def close(self) -> None: ...
    def indexes(self) -> dict[str, np.ndarray]: ...


class RecordWriter:
    """Writes the layout ``records``."""

    suffixes = (".array_record",)

    def __init__(self, root: pathlib.Path, *, compression: str):
        self._root, self._options = root, f"group_size:1,{compression}"
        self._writer: Any = None

    def open(self, stem: str) -> None:
        """Begins a shard."""
        self._writer = array_record_module.ArrayRecordWriter(str(self._root / (stem + self.suffixes[0])), self._options)

    def add(self, document: document_lib.Document) -> None:
        """Appends to the shard that is open."""
        self._writer.write(document_lib.encode(document))

    def close(self) -> None:
        """Ends a shard."""
        self._writer.close()

    def indexes(self) -> dict[str, np.ndarray]:
        """Nothing: an ArrayRecord finds its records itself."""
        return {}


class FlatWriter:
    """Writes the layout ``flat``."""

    suffixes = (".tokens", ".media")

    def __init__(self, root: pathlib.Path, *, dtype: np.dtype):
        self._root, self._dtype = root, dtype
        self._files: list[Any] = []
        self._places: list[tuple[int, int]] = []
        self._media: list[tuple[int, int]] = []
        self._checksums: list[int] = []

    def open(self, stem: str) -> None:
        """Begins a shard."""
        self._files = [(self._root / (stem + suffix)).open("wb") for suffix in self.suffixes]

    def add(self, document: document_lib.Document) -> None:
        """Appends to the shard that is open."""
        tokens, media = self._files
        self._places.append((tokens.tell() // self._dtype.itemsize, len(self._checksums)))
        stored = document.tokens.astype(self._dtype)
        self._checksums += [checksum(stored[at : at + CHUNK]) for at in range(0, len(stored), CHUNK)]
        tokens.write(stored.tobytes())
        done = {document_lib.IMAGE: 0, document_lib.AUDIO: 0}
        for kind, _, n in document.spans.tolist():
            first, done[kind] = done[kind], done[kind] + n
            if kind == document_lib.IMAGE:
                payload = document.patches[first : first + n].tobytes() + document.patch_xy[first : first + n].astype("<i2").tobytes()
            else:
                payload = document.audio[first : first + n].tobytes()
            self._media.append((media.tell(), checksum(payload)))
            media.write(payload)

    def close(self) -> None:
        """Ends a shard; a file without content is removed."""
        for file in self._files:
            empty = not file.tell()
            file.close()
            if empty:
                os.unlink(file.name)

    def indexes(self) -> dict[str, np.ndarray]:
        """File name -> array: places and checksums."""
        return {
            "places.npy": np.array(self._places, PLACE),
            "media_places.npy": np.array(self._media, MEDIA_PLACE),
            "checksums.npy": np.array(self._checksums, "<u4"),
        }


def checksum(content: Any) -> int:
    """32 bits of anything contiguous."""
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF


class OpenFile:
    """A file for `os.preadv` from any thread; closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, buffers: Sequence[Any], *, at: int, size: int) -> None:
        """Fills buffers of together ``size`` bytes.

        Raises:
            DamagedRecordError: the file ends before.
            OSError: the disk's own.
        """
        got = os.preadv(self.descriptor, buffers, at)
        if got != size:
            raise document_lib.DamagedRecordError(f"the file ends: {got} of {size} bytes at {at}")


def unreadable(error: Exception) -> document_lib.DamagedRecordError:
    """Whatever went wrong with one document on disk, as what becomes padding."""
    if isinstance(error, document_lib.DamagedRecordError):
        return error
    lines = str(error).splitlines() or [type(error).__name__]
    return document_lib.DamagedRecordError(f"unreadable: {lines[0][:160]}")


class Files:
    """Files opened when first needed, the latest `_OPEN_FILES` kept."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        self._open = functools.lru_cache(_OPEN_FILES)(lambda i: OpenFile(str(paths[i])))

    def __getitem__(self, i: int) -> OpenFile:
        return self._open(i)


class FlatShards:
    """Reads the layout ``flat``; thread-safe.

    Raises from its methods, besides `DamagedRecordError`, whatever `OSError` the disk gives; `unreadable` turns both into one.
    """

    def __init__(self, root: pathlib.Path, *, shards: Sequence[dict], indexes: dict[str, np.ndarray], dtype: np.dtype, patch_bytes: int):
        self._tokens, self._media = (
            Files([root / (pathlib.Path(shard["name"]).stem + suffix) for shard in shards]) for suffix in FlatWriter.suffixes
        )
        self._places, self._media_places = indexes["places.npy"], indexes["media_places.npy"]
        self._checksums, self._dtype, self._patch_bytes = indexes["checksums.npy"], dtype, patch_bytes

    def read_pieces(
        self, documents: np.ndarray, *, shards: np.ndarray, starts: np.ndarray, stops: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> dict[int, document_lib.DamagedRecordError]:
        """Tokens ``starts:stops`` of each document, one piece after another, into ``out``; which pieces failed, and why."""
        begin = starts // CHUNK * CHUNK
        end = np.minimum(-(-stops // CHUNK) * CHUNK, lengths)
        place = self._places[documents]
        first = place["chunk"].astype(np.int64) + begin // CHUNK
        at = (place["at"].astype(np.int64) + begin) * self._dtype.itemsize
        expected = self._checksums[first]
        buffer, bad, done = np.empty(int((end - begin).max(initial=0)), self._dtype), {}, 0
        columns = (shards, at, end - begin, starts - begin, stops - begin, first, expected)
        for i, (shard, byte, n, start, stop, chunk, digest) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            try:
                part = buffer[:n]
                self._tokens[shard].read((part,), at=byte, size=n * self._dtype.itemsize)
                if checksum(part if n <= CHUNK else part[:CHUNK]) != digest or (n > CHUNK and not self._rest_is_whole(part, chunk)):
                    raise document_lib.DamagedRecordError(f"wrong checksum of tokens between bytes {byte} and {byte + part.nbytes}")
                out[done : done + stop - start] = part[start:stop]
            except (document_lib.DamagedRecordError, OSError) as error:
                bad[i] = unreadable(error)
            done += stop - start
        return bad

    def _rest_is_whole(self, part: np.ndarray, chunk: int) -> bool:
        """Whether all chunks but the first, number ``chunk``, have their checksums."""
        digests = [checksum(part[at : at + CHUNK]) for at in range(CHUNK, len(part), CHUNK)]
        return digests == self._checksums[chunk + 1 : chunk + 1 + len(digests)].tolist()

    def read_span(self, k: int, *, shard: int, image: bool, values: np.ndarray, xy: np.ndarray | None) -> None:
        """Media span number ``k`` of the store into ``values u8[n, width]`` and, of an image, ``xy i16[n, 2]``."""
        at, expected = self._media_places[k].tolist()
        if image:
            if values.shape[1] != self._patch_bytes or xy is None:
                raise document_lib.DamagedRecordError(f"patches have {self._patch_bytes} bytes instead of {values.shape[1]}")
            buffers = [values, xy]
        else:
            buffers = [values]
        self._media[shard].read(buffers, at=at, size=sum(buffer.nbytes for buffer in buffers))
        digest = xxhash.xxh3_64()
        for buffer in buffers:
            digest.update(buffer.data)
        if digest.intdigest() & 0xFFFFFFFF != expected:
            raise document_lib.DamagedRecordError(f"wrong checksum of the media at byte {at}")


class RecordShards:
    """Reads ArrayRecord files; thread-safe, one read at a time (the reader spreads a read over threads of its own)."""

    def __init__(self, paths: Sequence[pathlib.Path], *, ends: Sequence[int]):
        """Takes the files in order, and the number of the first document behind each of them."""
        self._ends = list(ends)

        def open_reader(shard: int) -> Any:
            # 32 kB fit most documents; read-ahead would fetch neighbours, which a shuffled reader does not want.
            return array_record_module.ArrayRecordReader(
                str(paths[shard]), options="readahead_buffer_size:0", file_reader_buffer_size=32768
            )

        self._reader = functools.lru_cache(_OPEN_FILES)(open_reader)

    def place(self, i: int) -> tuple[int, int]:
        """Shard of document ``i``, and its record there."""
        shard = bisect.bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def read(self, i: int) -> bytes:
        """The record of a document.

        Raises:
            DamagedRecordError: it, or its file, cannot be read, or its checksum is wrong.
        """
        shard, record = self.place(i)
        try:
            return self._reader(shard).read([record])[0]
        except Exception as error:  # the reader raises whatever its C++ status maps to; all of it means one unreadable record
            raise unreadable(error) from None

    def read_many(self, documents: Sequence[int]) -> dict[int, bytes]:
        """The records of documents, in few calls; those that share a call with an unreadable one are left out."""
        by_shard: dict[int, list[int]] = {}
        for i in documents:
            by_shard.setdefault(self.place(i)[0], []).append(i)
        found: dict[int, bytes] = {}
        for shard, numbers in by_shard.items():
            first = self._ends[shard - 1] if shard else 0
            try:
                found.update(zip(numbers, self._reader(shard).read([i - first for i in numbers]), strict=True))
            except Exception:  # one of them is damaged; which one, `read` will say
                continue
        return found
