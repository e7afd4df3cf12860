"""The token store: documents on disk, found by number, with an index that plans are made from.

A store is a directory:

    manifest.json            written last: a directory without it is an unfinished store
    documents.npy            one entry a document: hash of its key, tokens, spans, patches, audio frames
    spans.npy                one entry a media span: kind, at, n; all documents one after another
    histogram.npy            i64[vocab], how often each id occurs as text (placeholders of media are left out)
    shard-00000.array_record records of `document.encode`, one document a record

Shards are ArrayRecord with ``group_size:1,zstd``: random access to one record, and a checksum each, so that a flipped bit is noticed
by the record it hits and by no other. The index is plain ``.npy`` because that can be memory mapped (members of an ``.npz`` cannot):
packing rows needs lengths and spans only and never opens a shard. Rejected: Megatron's ``.bin/.idx`` (seven times faster to read, but
no checksums and no place for media), and Parquet or TFRecord (no random access).
"""

import bisect
import hashlib
import json
import os
import pathlib
import threading
import types
from typing import Self

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

from v4train.data import document as document_lib
from v4train.data import tokenizer as tokenizer_lib

VERSION = 1
ENTRY = np.dtype([("key", "<u8"), ("tokens", "<u4"), ("spans", "<u4"), ("patches", "<u4"), ("frames", "<u4")])
MANIFEST = "manifest.json"
DIGEST_AT_OPEN = 2**28  # bytes of an index file; larger ones are left to `TokenStore.verify`
_INDEX = {"documents.npy": ENTRY, "spans.npy": document_lib.SPAN, "histogram.npy": np.dtype("<i8")}


def key_hash(key: str) -> int:
    """64 bits that decide which documents are held out."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _check_digests(root: pathlib.Path, files: dict[str, dict]) -> None:
    for name, entry in files.items():
        digest = file_sha256(root / name)
        if digest != entry["sha256"]:
            message = f"data store {root}: {name} is damaged (sha256 {digest[:12]}..., expected {entry['sha256'][:12]}...)"
            raise ValueError(f"{message}; copy or build the store again")


def file_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStoreWriter:
    """Writes a store; use it as a context manager. Leaving it by an exception leaves an unfinished store, which no reader opens."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        tokenizer: tokenizer_lib.Tokenizer,
        image_patch: int,
        licence: str,
        origin: str,
        compression: str = "zstd:19",
        shard_tokens: int = 2**28,
    ):
        """Starts a store in an empty or new directory.

        Args:
            path: the directory.
            tokenizer: of the documents that will be added.
            image_patch: side of a patch in pixels.
            licence: of the data, as readers should see it.
            origin: where the data comes from.
            compression: ArrayRecord's option; a lower level than 19 writes faster.
            shard_tokens: a new shard is begun after this many tokens.

        Raises:
            ValueError: the directory is not empty.
        """
        self.path = pathlib.Path(path)
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"data store {path}: the directory is not empty; remove it or write somewhere else")
        self.path.mkdir(parents=True, exist_ok=True)
        self._rules = document_lib.Rules.of(tokenizer, image_patch=image_patch)
        self._header = {
            "version": VERSION,
            "licence": licence,
            "origin": origin,
            "image_patch": image_patch,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "image": tokenizer.image,
                "audio": tokenizer.audio,
            },
        }
        self._options, self._shard_tokens = f"group_size:1,{compression}", shard_tokens
        self._writer, self._shards = None, []
        self._entries: list[tuple[int, ...]] = []
        self._spans: list[np.ndarray] = []
        self._histogram = np.zeros(tokenizer.vocab_size, np.int64)

    def add(self, document: document_lib.Document) -> None:
        """Appends a document.

        Raises:
            ValueError: the document contradicts itself; the message names its key.
        """
        try:
            self._rules.check(document)
        except document_lib.DamagedRecordError as error:
            raise ValueError(f"data store {self.path}: document {document.key!r} was refused: {error}") from None
        if self._writer is None or self._shards[-1]["tokens"] >= self._shard_tokens:
            self._open_shard()
        assert self._writer is not None
        self._writer.write(document_lib.encode(document))
        self._shards[-1]["documents"] += 1
        self._shards[-1]["tokens"] += len(document.tokens)
        sizes = (len(document.tokens), len(document.spans), len(document.patches), len(document.audio))
        self._entries.append((key_hash(document.key), *sizes))
        self._spans.append(document.spans)
        self._histogram += np.bincount(document.tokens[document.modality == 0], minlength=len(self._histogram))

    def _open_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        name = f"shard-{len(self._shards):05d}.array_record"
        self._shards.append({"name": name, "documents": 0, "tokens": 0})
        self._writer = array_record_module.ArrayRecordWriter(str(self.path / name), self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        if not self._entries:
            raise ValueError(f"data store {self.path}: no document was added; an empty store cannot be read")
        entries = np.array(self._entries, ENTRY)
        np.save(self.path / "documents.npy", entries)
        np.save(self.path / "spans.npy", np.concatenate(self._spans).astype(document_lib.SPAN))
        np.save(self.path / "histogram.npy", self._histogram)
        names = [*_INDEX, *(shard["name"] for shard in self._shards)]
        total, patches, frames = (int(entries[field].astype(np.int64).sum()) for field in ("tokens", "patches", "frames"))
        manifest = self._header | {
            "documents": len(entries),
            "tokens": {"text": total - patches - frames, "image": patches, "audio": frames},
            "shards": [{"name": shard["name"], "documents": shard["documents"]} for shard in self._shards],
            "files": {name: {"bytes": (self.path / name).stat().st_size, "sha256": file_sha256(self.path / name)} for name in names},
        }
        partial = self.path / (MANIFEST + ".partial")
        partial.write_text(json.dumps(manifest, indent=2) + "\n")
        partial.replace(self.path / MANIFEST)


class TokenStore:
    """A finished store, opened for reading. Safe to read from several threads.

    Attributes:
        documents: the index, one `ENTRY` a document, memory mapped.
        spans: all media spans; those of document ``i`` are ``spans[span_start[i]:span_start[i + 1]]``.
        histogram: ``i64[vocab]``, occurrences of each id as text.
        fingerprint: changes with any byte of the store.
    """

    def __init__(self, path: pathlib.Path, *, manifest: dict):
        self.path, self.manifest = path, manifest
        self.documents: np.ndarray = _load_index(path, "documents.npy")
        self.spans: np.ndarray = _load_index(path, "spans.npy")
        self.histogram: np.ndarray = _load_index(path, "histogram.npy")
        self.span_start = np.concatenate([[0], np.cumsum(self.documents["spans"], dtype=np.int64)])
        if len(self.documents) != manifest["documents"] or self.span_start[-1] != len(self.spans):
            raise ValueError(f"data store {path}: its index and its manifest disagree; build the store again")
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        identity = [manifest["version"], manifest["tokenizer"]["fingerprint"], manifest["image_patch"], digests]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.image_patch: int = manifest["image_patch"]
        tokenizer = manifest["tokenizer"]
        self._rules = document_lib.Rules(tokenizer["vocab_size"], tokenizer["image"], tokenizer["audio"], 3 * self.image_patch**2)
        self._shard_end = np.cumsum([shard["documents"] for shard in manifest["shards"]]).tolist()
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenStore":
        """Opens a store after checking that it is whole: version, every file present and of the right size, and an intact index.

        Documents carry a checksum each, which is checked when they are read; the index has none, so its digest is compared here,
        unless it is too large to be read at every start (`verify` does then).

        Raises:
            ValueError: what is wrong with which file, and what to do.
        """
        root = pathlib.Path(path)
        if not root.is_dir():
            raise ValueError(f"data store {path}: no such directory (from {pathlib.Path.cwd()}); correct the path or build the store")
        try:
            manifest = json.loads((root / MANIFEST).read_text())
        except FileNotFoundError:
            raise ValueError(f"data store {path}: unfinished, it has no {MANIFEST}; remove the directory and build it again") from None
        except ValueError as error:
            raise ValueError(f"data store {path}: {MANIFEST} is not JSON ({error}); build the store again") from None
        if manifest.get("version") != VERSION:
            raise ValueError(f"data store {path}: version {manifest.get('version')!r}, this program reads {VERSION}; build the store again")
        for name, entry in manifest["files"].items():
            if not (root / name).is_file():
                raise ValueError(f"data store {path}: {name} is missing; copy or build the store again")
            size = (root / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"data store {path}: {name} has {size} bytes instead of {entry['bytes']}; copy or build the store again")
        index = {name: entry for name, entry in manifest["files"].items() if name.endswith(".npy") and entry["bytes"] <= DIGEST_AT_OPEN}
        _check_digests(root, index)
        return cls(root, manifest=manifest)

    def verify(self) -> None:
        """Compares the digest of every file with the manifest: reads the whole store.

        Raises:
            ValueError: the first file that differs.
        """
        _check_digests(self.path, self.manifest["files"])

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def mean_document_bytes(self) -> float:
        """Of a decoded document."""
        sizes = {"tokens": 4, "spans": document_lib.SPAN.itemsize, "patches": 3 * self.image_patch**2 + 4, "frames": 80}
        return float(sum(size * self.documents[field].mean() for field, size in sizes.items()))

    def spans_of(self, i: int) -> np.ndarray:
        """``(kind, at, n)`` of document ``i``'s media, from the index."""
        return self.spans[self.span_start[i] : self.span_start[i + 1]]

    def where(self, i: int) -> str:
        """The place of document ``i`` on disk, for messages: file and record."""
        shard = bisect.bisect_right(self._shard_end, i)
        return f"{self.manifest['shards'][shard]['name']}, record {i - (self._shard_end[shard - 1] if shard else 0)}"

    def read(self, i: int) -> document_lib.Document:
        """Document ``i``, checked.

        Raises:
            DamagedRecordError: unreadable, a wrong checksum, or not what the index says.
        """
        try:
            shard = bisect.bisect_right(self._shard_end, i)
            record = self._reader(shard).read([i - (self._shard_end[shard - 1] if shard else 0)])[0]
        except Exception as error:  # the reader raises whatever its C++ status maps to; all of it means one unreadable record
            raise document_lib.DamagedRecordError(f"unreadable: {str(error).splitlines()[0][:160]}") from None
        document = document_lib.decode(record)
        self._rules.check(document)
        if len(document.tokens) != self.documents[i]["tokens"] or document.spans.tobytes() != self.spans_of(i).tobytes():
            raise document_lib.DamagedRecordError("it differs from the index")
        return document

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path = str(self.path / self.manifest["shards"][shard]["name"])
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
                self._readers[shard] = array_record_module.ArrayRecordReader(path, **options)
            return self._readers[shard]


def _load_index(path: pathlib.Path, name: str) -> np.ndarray:
    try:
        array = np.load(path / name, mmap_mode="r").view(np.ndarray)  # still mapped; indexing a `memmap` is slow
    except (ValueError, OSError) as error:
        raise ValueError(f"data store {path}: {name} cannot be read ({error}); copy or build the store again") from None
    if array.dtype != _INDEX[name] or array.ndim != 1:
        raise ValueError(f"data store {path}: {name} holds {array.dtype}, expected {_INDEX[name]}; build the store again")
    return array
