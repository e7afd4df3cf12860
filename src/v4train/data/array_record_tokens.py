"""ArrayRecord files of plain tokens: one record a document, its ids one after another, little endian, of a dtype that the recipe states.

An ArrayRecord knows how many records it has, not how long they are, and a plan needs the lengths. They are therefore counted once, by
reading everything (some 10^5 documents a second from a local disk), and kept in the user's cache directory (`index_directory`) under a
name that follows from the content, so that a copy of the files, or a second run, finds them. Many hosts that start at once on a shared
home directory each count, and write the same file.

Records carry the file format's checksum. One that is damaged when it is counted has no known length; it counts as one token, which is
always bad. One that is damaged later keeps its length as padding.

**Fingerprint.** Names, sizes, and evenly spread blocks of 64 kB of the files (64 in all, at least 2 a file), and the lengths of all
documents.

The files should have been written with ``group_size:1``: with the default of 65536, one document costs the decoding of a whole group.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

from v4train.data import decoded, foreign
from v4train.data import document as document_lib
from v4train.data import shards as shards_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

log = logging.getLogger(__name__)

SUFFIXES = (".array_record", ".arrayrecord")
_AT_ONCE = 4096
_UNKNOWN = 2**32 - 1  # in the kept lengths: a record that could not be read


class ArrayRecordTokens(foreign.PlainTokens):
    """A file, or all files of a directory in the order of their names, opened for reading."""

    whole_documents = True

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str,
        tokenizer: tokenizer_lib.Tokenizer,
        cache_bytes: int = store_lib.CACHE_BYTES,
        index_directory: str | os.PathLike | None = None,
    ):
        """Opens the files; the first time, counts their tokens.

        Args:
            path: of a file, or of a directory of ``*.array_record`` or ``*.arrayrecord``.
            dtype: of the ids: uint8, uint16, uint32, int32 or int64.
            tokenizer: that the ids are from.
            cache_bytes: memory for decoded documents.
            index_directory: where lengths are kept; ``~/.cache/v4train`` (or ``$XDG_CACHE_HOME/v4train``) unless given.

        Raises:
            ValueError: no such files, or one that is no ArrayRecord.
        """
        root = pathlib.Path(path)
        self._paths = sorted(p for p in root.iterdir() if p.suffix in SUFFIXES) if root.is_dir() else [root]
        missing = not self._paths or not self._paths[0].is_file()
        if missing:
            raise ValueError(f"ArrayRecord data {path}: no such file, or no {' or '.join(SUFFIXES)} in it; correct the path")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        ends = np.cumsum([_records_in(p) for p in self._paths])
        self._records = shards_lib.RecordShards(self._paths, ends=ends.tolist())
        self._latest = decoded.Latest(cache_bytes)
        samples = max(2, foreign.SAMPLES // len(self._paths))
        content = hashlib.sha256(self._dtype.str.encode())
        for p in self._paths:
            content.update(p.name.encode() + foreign.sampled_digest(p, samples=samples))
        sizes = self._lengths(int(ends[-1]), content=content.hexdigest(), directory=index_directory)
        content.update(sizes.tobytes())
        self._kept = np.flatnonzero(sizes)
        self._broken = sizes[self._kept] == _UNKNOWN
        lengths = np.where(self._broken, 1, sizes[self._kept].astype(np.int64))
        super().__init__(root, lengths=lengths, tokenizer=tokenizer, content=content.hexdigest())

    def _lengths(self, count: int, *, content: str, directory: str | os.PathLike | None) -> np.ndarray:
        """``u32[records]`` from the cache, or counted now."""
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "v4train"
        kept = pathlib.Path(directory or cache) / f"lengths-{content[:32]}.npy"
        if kept.is_file():
            with contextlib.suppress(ValueError, EOFError):  # cut short by a power cut
                sizes = np.load(kept)
                if sizes.dtype == np.uint32 and sizes.shape == (count,):
                    return sizes
        log.info("counting the tokens of %d documents of %s, once; kept in %s", count, self._paths[0].parent, kept)
        sizes = np.concatenate([self._count(range(at, min(at + _AT_ONCE, count))) for at in range(0, count, _AT_ONCE)])
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.partial.npy")
            np.save(partial, sizes)
            partial.replace(kept)
        except OSError as error:
            log.warning("the lengths of documents could not be kept in %s (%s); they will be counted at every start", kept, error)
        return sizes

    def _count(self, numbers: range) -> np.ndarray:
        records, width = self._records.read_many(numbers), self._dtype.itemsize
        sizes = np.full(len(numbers), _UNKNOWN, np.uint32)
        for place, i in enumerate(numbers):
            try:
                size = len(records[i]) if i in records else len(self._records.read(i))
            except document_lib.DamagedRecordError:
                continue
            sizes[place] = size // width if size % width == 0 else _UNKNOWN
        return sizes

    def where(self, i: int) -> str:
        """The place of document ``i`` on disk, for messages."""
        shard, record = self._records.place(int(self._kept[i]))
        return f"{self._paths[shard].name}, record {record}"

    def load(self, documents: Sequence[int]) -> None:
        """Reads documents together, as far as they fit into memory; one that fails is left to `fetch`."""
        wanted = {int(self._kept[i]): i for i in dict.fromkeys(documents) if self._latest.get(i) is None}
        for record, content in self._records.read_many(list(wanted)).items():
            try:
                self._latest.put(wanted[record], self._decode(wanted[record], content))
            except document_lib.DamagedRecordError:
                continue

    def fetch(self, i: int, *, start: int, stop: int) -> np.ndarray:
        """Ids ``start:stop`` of document ``i``.

        Raises:
            DamagedRecordError: it is unreadable, its checksum is wrong, or it is not as long as it was.
        """
        document = self._latest.get(i)
        if document is None:
            document = self._decode(i, self._records.read(int(self._kept[i])))
            self._latest.put(i, document)
        return document.tokens[start:stop]

    def _decode(self, i: int, content: bytes) -> document_lib.Document:
        width, n = self._dtype.itemsize, int(self.documents["tokens"][i])
        if self._broken[i] or len(content) != n * width:
            raise document_lib.DamagedRecordError(f"{len(content)} bytes instead of {n} ids of {width}")
        ids = np.frombuffer(content, self._dtype)
        if width > 4 and bool((ids >> 32).any()):
            raise document_lib.DamagedRecordError("an id does not fit into 32 bits")
        return document_lib.Document(key=str(i), tokens=ids.astype(np.uint32))


def _records_in(path: pathlib.Path) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        count = reader.num_records()
        reader.close()
        return count
    except Exception as error:  # whatever its C++ status maps to
        raise ValueError(f"ArrayRecord data {path}: cannot be opened ({str(error).splitlines()[0][:160]}); copy it again") from None
