"""The token store: documents on disk, found by number, with an index that plans are made from.

A store is a directory:

    manifest.json            written last: a directory without it is an unfinished store
    documents.npy            one entry a document: hash of its key, tokens, spans, patches, audio frames
    spans.npy                one entry a media span: kind, at, n; all documents one after another
    histogram.npy            i64[vocab], how often each id occurs as text (placeholders of media are left out)
    shard-00000.*            the documents, in one of the two layouts of `shards`: small records, or flat and fast

The index is plain ``.npy`` because that can be memory mapped (members of an ``.npz`` cannot): packing rows needs lengths and spans only
and never opens a shard. Rejected: Megatron's ``.bin/.idx`` as the format of our own (no checksums and no place for media; it is
read as it is by `megatron`), and Parquet or TFRecord (no random access).

`Store` is what plan, collate and pipeline need of any source of documents; every reader of a foreign format implements it.
"""

import bisect
import hashlib
import json
import os
import pathlib
import re
import types
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np

from v4train.data import decoded
from v4train.data import document as document_lib
from v4train.data import shards as shards_lib
from v4train.data import tokenizer as tokenizer_lib

VERSION = 1
ENTRY = np.dtype([("key", "<u8"), ("tokens", "<u4"), ("spans", "<u4"), ("patches", "<u4"), ("frames", "<u4")])
MANIFEST = "manifest.json"
DIGEST_AT_OPEN = 2**28  # bytes of an index file; larger ones are left to `TokenStore.verify`
CACHE_BYTES = 2**26
_INDEX = {"documents.npy": ENTRY, "spans.npy": document_lib.SPAN, "histogram.npy": np.dtype("<i8")}
_FLAT_INDEX = {"places.npy": shards_lib.PLACE, "media_places.npy": shards_lib.MEDIA_PLACE, "checksums.npy": np.dtype("<u4")}
_SHARD = re.compile(r"shard-\d{5,}(\.\w+)")


class Pieces(NamedTuple):
    """Tokens ``starts:stops`` of documents of a store, ``i64[pieces]`` each."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, pieces: "Sequence[tuple[int, int, int]] | Pieces") -> "Pieces":
        """From ``(document, start, stop)`` triples; arrays are passed on."""
        return pieces if isinstance(pieces, Pieces) else cls(*np.array(pieces, np.int64).reshape(-1, 3).T)


class Store(Protocol):
    """Documents by number, with an index. Safe to read from several threads.

    Attributes:
        path: for messages.
        documents: the index, one `ENTRY` a document.
        spans: all media spans, `document.SPAN` each; those of document ``i`` are ``spans[span_start[i]:span_start[i + 1]]``.
        span_start: ``i64[documents + 1]``.
        image_patch: side of the patches; of no meaning where there are none.
        whole_documents: whether a piece costs its whole document, so that `load` pays.
        tokenizer_fingerprint: of the tokenizer that the ids are from.
        fingerprint: changes with the documents; what of them it covers is for the reader of a format to say.
    """

    path: pathlib.Path
    documents: np.ndarray
    spans: np.ndarray
    span_start: np.ndarray
    image_patch: int
    whole_documents: bool
    tokenizer_fingerprint: str
    fingerprint: str

    @property
    def histogram(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def spans_of(self, i: int) -> np.ndarray: ...

    def where(self, i: int) -> str: ...

    def read(self, i: int) -> document_lib.Document: ...

    def load(self, documents: Sequence[int]) -> None:
        """Documents that will be read next: a chance to fetch them together. Never raises for a document."""
        ...

    def read_pieces(self, pieces: Pieces, *, out: np.ndarray) -> dict[int, document_lib.DamagedRecordError]:
        """Fills ``out i32[sum of lengths]``; which pieces could not be read, and why: their part of ``out`` is undefined."""
        ...

    def read_span(self, i: int, k: int, *, skip: int, values: np.ndarray, xy: np.ndarray | None) -> None:
        """Payload ``skip : skip + len(values)`` of media span ``k`` of document ``i`` into ``values`` (and ``xy`` of an image).

        Raises:
            DamagedRecordError: it cannot be read, or is not what the index says.
        """
        ...


def key_hash(key: str) -> int:
    """64 bits that decide which documents are held out."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _check_digests(root: pathlib.Path, files: dict[str, dict]) -> None:
    for name, entry in files.items():
        digest = file_sha256(root / name)
        if digest != entry["sha256"]:
            message = f"data store {root}: {name} is damaged (sha256 {digest[:12]}..., expected {entry['sha256'][:12]}...)"
            raise ValueError(f"{message}; copy or build the store again")


def is_file_of_store(name: str) -> bool:
    """Whether a store may have a file of this name, so that a directory of something else is not taken for a store."""
    shard = _SHARD.fullmatch(name)
    if shard is not None:
        return shard[1] in (*shards_lib.RecordWriter.suffixes, *shards_lib.FlatWriter.suffixes)
    return name in (MANIFEST, MANIFEST + ".partial", *_INDEX, *_FLAT_INDEX)


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
        layout: Literal["records", "flat"] = "records",
    ):
        """Starts a store in an empty or new directory.

        Args:
            path: the directory.
            tokenizer: of the documents that will be added.
            image_patch: side of a patch in pixels.
            licence: of the data, as readers should see it.
            origin: where the data comes from.
            compression: of records, ArrayRecord's option; a lower level than 19 writes faster.
            shard_tokens: a new shard is begun after this many tokens.
            layout: small ``records``, or ``flat`` for the fastest reading (`shards` compares them).

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
        flat = layout == "flat"
        self._header |= {"layout": layout} if flat else {}
        dtype = token_dtype(tokenizer.vocab_size)
        self._writer: shards_lib.ShardWriter = (
            shards_lib.FlatWriter(self.path, dtype=dtype) if flat else shards_lib.RecordWriter(self.path, compression=compression)
        )
        self._suffixes = (shards_lib.FlatWriter if flat else shards_lib.RecordWriter).suffixes
        self._shard_tokens, self._shards = shard_tokens, []
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
        if not self._shards or self._shards[-1]["tokens"] >= self._shard_tokens:
            self._open_shard()
        self._writer.add(document)
        self._shards[-1]["documents"] += 1
        self._shards[-1]["tokens"] += len(document.tokens)
        sizes = (len(document.tokens), len(document.spans), len(document.patches), len(document.audio))
        self._entries.append((key_hash(document.key), *sizes))
        self._spans.append(document.spans)
        self._histogram += np.bincount(document.tokens[document.modality == 0], minlength=len(self._histogram))

    def _open_shard(self) -> None:
        if self._shards:
            self._writer.close()
        stem = f"shard-{len(self._shards):05d}"
        self._shards.append({"name": stem + self._suffixes[0], "documents": 0, "tokens": 0})
        self._writer.open(stem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if self._shards:
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
        for name, array in self._writer.indexes().items():
            np.save(self.path / name, array)
        stems = [pathlib.Path(shard["name"]).stem for shard in self._shards]
        found = [stem + suffix for stem in stems for suffix in self._suffixes if (self.path / (stem + suffix)).exists()]
        names = [*_INDEX, *self._writer.indexes(), *found]
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


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of ``u16`` and ``u32`` that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenStore:
    """A finished store, opened for reading. Safe to read from several threads.

    Attributes:
        documents: the index, one `ENTRY` a document, memory mapped.
        spans: all media spans; those of document ``i`` are ``spans[span_start[i]:span_start[i + 1]]``.
        fingerprint: changes with any byte of the store.
    """

    def __init__(self, path: pathlib.Path, *, manifest: dict, cache_bytes: int = CACHE_BYTES):
        self.path, self.manifest = path, manifest
        self.documents: np.ndarray = _load_index(path, "documents.npy", dtype=ENTRY)
        self.spans: np.ndarray = _load_index(path, "spans.npy", dtype=document_lib.SPAN)
        self._histogram: np.ndarray = _load_index(path, "histogram.npy", dtype=_INDEX["histogram.npy"])
        self.span_start = np.concatenate([[0], np.cumsum(self.documents["spans"], dtype=np.int64)])
        shards = manifest["shards"]
        self._shard_end = np.cumsum([shard["documents"] for shard in shards])
        if not len(self.documents) == manifest["documents"] == self._shard_end[-1] or self.span_start[-1] != len(self.spans):
            raise ValueError(f"data store {path}: its index and its manifest disagree; build the store again")
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        identity = [manifest["version"], manifest["tokenizer"]["fingerprint"], manifest["image_patch"], digests]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.image_patch: int = manifest["image_patch"]
        tokenizer = manifest["tokenizer"]
        self.tokenizer_fingerprint: str = tokenizer["fingerprint"]
        self._rules = document_lib.Rules(tokenizer["vocab_size"], tokenizer["image"], tokenizer["audio"], 3 * self.image_patch**2)
        self._latest = decoded.Latest(cache_bytes)
        self._flat = self._open_flat() if manifest.get("layout", "records") == "flat" else None
        self.whole_documents = self._flat is None
        self._records = shards_lib.RecordShards([path / shard["name"] for shard in shards], ends=self._shard_end.tolist())

    def _open_flat(self) -> shards_lib.FlatShards:
        indexes = {name: _load_index(self.path, name, dtype=dtype) for name, dtype in _FLAT_INDEX.items()}
        chunks = int((-(-self.documents["tokens"].astype(np.int64) // shards_lib.CHUNK)).sum())
        if [len(index) for index in indexes.values()] != [len(self), len(self.spans), chunks]:
            raise ValueError(f"data store {self.path}: places or checksums are missing in its index; build the store again")
        dtype = token_dtype(self.manifest["tokenizer"]["vocab_size"])
        rules = {"dtype": dtype, "patch_bytes": self._rules.patch_bytes}
        return shards_lib.FlatShards(self.path, shards=self.manifest["shards"], indexes=indexes, **rules)

    @classmethod
    def open(cls, path: str | os.PathLike, *, cache_bytes: int = CACHE_BYTES) -> "TokenStore":
        """Opens a store after checking that it is whole: version, every file present and of the right size, and an intact index.

        Documents carry a checksum each, which is checked when they are read; the index has none, so its digest is compared here,
        unless it is too large to be read at every start (`verify` does then).

        Args:
            path: the directory.
            cache_bytes: memory for decoded documents of the layout ``records``.

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
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version != VERSION:
            raise ValueError(f"data store {path}: version {version!r}, this program reads {VERSION}; build the store again")
        try:
            return cls._open(root, manifest=manifest, cache_bytes=cache_bytes)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"{MANIFEST} is not one of a store ({type(error).__name__}: {error})"
            raise ValueError(f"data store {path}: {what}; copy or build the store again") from error

    @classmethod
    def _open(cls, root: pathlib.Path, *, manifest: dict, cache_bytes: int) -> "TokenStore":
        for name, entry in manifest["files"].items():
            if not (root / name).is_file():
                raise ValueError(f"data store {root}: {name} is missing; copy or build the store again")
            size = (root / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"data store {root}: {name} has {size} bytes instead of {entry['bytes']}; copy or build the store again")
        index = {name: entry for name, entry in manifest["files"].items() if name.endswith(".npy") and entry["bytes"] <= DIGEST_AT_OPEN}
        _check_digests(root, index)
        return cls(root, manifest=manifest, cache_bytes=cache_bytes)

    def verify(self) -> None:
        """Compares the digest of every file with the manifest: reads the whole store.

        Raises:
            ValueError: the first file that differs.
        """
        _check_digests(self.path, self.manifest["files"])

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def histogram(self) -> np.ndarray:
        """``i64[vocab]``, occurrences of each id as text."""
        return self._histogram

    def spans_of(self, i: int) -> np.ndarray:
        """``(kind, at, n)`` of document ``i``'s media, from the index."""
        return self.spans[self.span_start[i] : self.span_start[i + 1]]

    def where(self, i: int) -> str:
        """The place of document ``i`` on disk, for messages: file and record."""
        shard, record = self._records.place(i)
        return f"{self.manifest['shards'][shard]['name']}, record {record}"

    def read(self, i: int) -> document_lib.Document:
        """Document ``i``, checked; the flat layout does not keep its key.

        Raises:
            DamagedRecordError: unreadable, a wrong checksum, or not what the index says.
        """
        if self._flat is not None:
            return self._read_flat(i)
        document = self._latest.get(i)
        if document is None:
            document = self._decode(i, self._records.read(i))
            self._latest.put(i, document)
        return document

    def load(self, documents: Sequence[int]) -> None:
        """Decodes documents together, as far as they fit into memory; one that fails is left to `read`."""
        if self._flat is not None:
            return
        for i, record in self._records.read_many([i for i in dict.fromkeys(documents) if self._latest.get(i) is None]).items():
            try:
                self._latest.put(i, self._decode(i, record))
            except document_lib.DamagedRecordError:
                continue

    def read_pieces(self, pieces: Pieces, *, out: np.ndarray) -> dict[int, document_lib.DamagedRecordError]:
        """Tokens of pieces, one after another, into ``out i32[sum of lengths]``; which pieces failed, and why."""
        documents, starts, stops = pieces
        if self._flat is None:
            return decoded.read_pieces(self.read, documents, starts, stops, out=out)
        shards = np.searchsorted(self._shard_end, documents, side="right")
        lengths = self.documents["tokens"][documents].astype(np.int64)
        return self._flat.read_pieces(documents, shards=shards, starts=starts, stops=stops, lengths=lengths, out=out)

    def read_span(self, i: int, k: int, *, skip: int, values: np.ndarray, xy: np.ndarray | None) -> None:
        """Payload ``skip : skip + len(values)`` of media span ``k`` of document ``i`` into ``values`` and, of an image, ``xy``.

        Raises:
            DamagedRecordError: it cannot be read, or is not what the index says.
        """
        if self._flat is None:
            return decoded.copy_span(self.read(i), k, skip=skip, values=values, xy=xy)
        number, shard = int(self.span_start[i]) + k, bisect.bisect_right(self._shard_end, i)
        n, image = int(self.spans["n"][number]), bool(self.spans["kind"][number] == document_lib.IMAGE)
        try:
            if n == len(values):
                return self._flat.read_span(number, shard=shard, image=image, values=values, xy=xy)
            whole, whole_xy = np.empty((n, values.shape[1]), np.uint8), np.empty((n, 2), np.int16)
            self._flat.read_span(number, shard=shard, image=image, values=whole, xy=whole_xy)
        except OSError as error:
            raise shards_lib.unreadable(error) from None
        values[...] = whole[skip : skip + len(values)]
        if xy is not None:
            xy[...] = whole_xy[skip : skip + len(values)]

    def _decode(self, i: int, record: bytes) -> document_lib.Document:
        document = document_lib.decode(record)
        self._rules.check(document)
        if len(document.tokens) != self.documents["tokens"][i] or document.spans.tobytes() != self.spans_of(i).tobytes():
            raise document_lib.DamagedRecordError("it differs from the index")
        return document

    def _read_flat(self, i: int) -> document_lib.Document:
        entry, spans = self.documents[i], self.spans_of(i)
        tokens = np.empty(entry["tokens"], np.uint32)
        for error in self.read_pieces(Pieces.of([(i, 0, len(tokens))]), out=tokens).values():
            raise error
        patches, frames = np.empty((entry["patches"], self._rules.patch_bytes), np.uint8), np.empty((entry["frames"], 80), np.uint8)
        xy, done = np.empty((entry["patches"], 2), np.int16), {document_lib.IMAGE: 0, document_lib.AUDIO: 0}
        for k, (kind, _, n) in enumerate(spans.tolist()):
            part, done[kind] = slice(done[kind], done[kind] + n), done[kind] + n
            image = kind == document_lib.IMAGE
            self.read_span(i, k, skip=0, values=(patches if image else frames)[part], xy=xy[part] if image else None)
        document = document_lib.Document(key="", tokens=tokens, spans=spans, patches=patches, patch_xy=xy, audio=frames)
        self._rules.check(document)
        return document


def _load_index(path: pathlib.Path, name: str, *, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path / name, mmap_mode="r").view(np.ndarray)  # still mapped; indexing a `memmap` is slow
    except (ValueError, OSError) as error:
        raise ValueError(f"data store {path}: {name} cannot be read ({error}); copy or build the store again") from None
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"data store {path}: {name} holds {array.dtype}, expected {dtype}; build the store again")
    return array
