"""The data pipeline: `batch(step)` is a pure function of the step.

    step, host -> global rows -> (source, row of the source)   mixture: closed form
               -> pieces of documents                           plan: two binary searches
               -> tokens, patches, audio                        store: random access, checksummed
               -> arrays of fixed shape                         collate

There is no iterator state: a run resumes from one integer and a fingerprint, on any number of hosts (host h of H reads the h-th part of
the rows of a batch), instantly, and a batch can be looked at without reading those before it. `iterate` adds nothing but reading ahead,
by a grain thread pool whose elements are whole batches (grain costs some 70 us an element: too much for a document, nothing for a
batch). Rejected: grain's own packing and mixing, whose state depends on workers and which lose or shift media when a document is cut.

A document that fails its checksum becomes padding and is reported (`quarantine`); no exception ever ends the stream, because on many
hosts that would leave the others waiting in a collective.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Literal

import grain
import numpy as np

from v4train.data import batch as batch_lib
from v4train.data import collate
from v4train.data import config as config_lib
from v4train.data import document as document_lib
from v4train.data import mixture as mixture_lib
from v4train.data import plan as plan_lib
from v4train.data import store as store_lib
from v4train.data import tokenizer as tokenizer_lib

Split = Literal["train", "holdout"]
_CACHE_BYTES = 2**26  # of decoded documents, all sources together


class Pipeline:
    """Batches of one split, for one host. Thread-safe.

    Attributes:
        tokenizer: of all sources.
        sources: their names; `Batch.source` counts in this order.
        mixture: rows of each source.
        tokens_per_step: places (padding included) of a global batch.
        quarantine: documents that became padding, seen by this host.
    """

    def __init__(
        self,
        config: config_lib.DataConfig,
        *,
        batch_rows: int,
        split: Split = "train",
        host_index: int = 0,
        host_count: int = 1,
        on_bad_record: Callable[[collate.BadRecord], None] | None = None,
    ):
        """Opens the stores and plans their first rows.

        Args:
            config: what to read.
            batch_rows: rows of the global batch.
            split: documents to train on, or those held out.
            host_index: of this host.
            host_count: among how many the rows of a batch are divided.
            on_bad_record: called once for each document that becomes padding, from any thread.

        Raises:
            ValueError: a store that is missing, damaged, empty, or does not fit the config.
        """
        if batch_rows <= 0 or batch_rows % host_count or not 0 <= host_index < host_count:
            hosts = f"host {host_index} of {host_count}"
            raise ValueError(f"a batch of {batch_rows} rows cannot be divided evenly for {hosts}: make it a multiple of {host_count}")
        self._config, self._batch_rows = config, batch_rows
        self._split: Split = split
        self._host_index, self._host_count = host_index, host_count
        self.tokenizer = tokenizer_lib.build(config.tokenizer)
        self.sources = tuple(source.name for source in config.sources)
        self.mixture = mixture_lib.Mixture.of(tuple(source.weight for source in config.sources))
        self.tokens_per_step = batch_rows * config.sequence_length
        self.quarantine = collate.Quarantine(on_bad_record)
        stores = [_open(source, config=config, tokenizer=self.tokenizer) for source in config.sources]
        self._readers = [
            collate.Reader(store, name=name, quarantine=self.quarantine) for store, name in zip(stores, self.sources, strict=True)
        ]
        self._plan = functools.cache(self._make_plan)
        for i in range(len(stores)):
            self._plan(i, split)

    def _make_plan(self, source: int, split: Split) -> plan_lib.Plan:
        store, config = self._readers[source].store, self._config
        held_out = store.documents["key"] < np.uint64(min(int(config.holdout * 2.0**64), 2**64 - 1))
        documents = np.flatnonzero(held_out if split == "holdout" else ~held_out)
        packing = plan_lib.Packing(
            config.sequence_length, config.max_patches, config.max_audio_frames, config.seed, config.sources[source].packing
        )
        return plan_lib.Plan(store, documents=documents, packing=packing)

    def batch(self, step: int) -> batch_lib.Batch:
        """This host's rows of global batch ``step``, as numpy arrays."""
        local = self._batch_rows // self._host_count
        first = step * self._batch_rows + self._host_index * local
        return self._collate([self.mixture.source_and_row(i) for i in range(first, first + local)], split=self._split)

    def _collate(self, rows: list[mixture_lib.SourceRow], *, split: Split) -> batch_lib.Batch:
        config = self._config
        batch = batch_lib.allocate(
            len(rows),
            sequence_length=config.sequence_length,
            max_patches=config.max_patches,
            max_audio_frames=config.max_audio_frames,
            image_patch=config.image_patch,
        )
        batch.source[...] = [source for source, _ in rows]
        parts = [collate.RowPieces(self._readers[source], self._plan(source, split).row(row)) for source, row in rows]
        collate.fill(batch, parts, tokenizer=self.tokenizer)
        return batch

    def iterate(self, start_step: int) -> Iterator[batch_lib.Batch]:
        """Batches ``start_step``, ``start_step + 1``, ... without end, read ahead by threads."""
        local, ahead = self._batch_rows // self._host_count, 0
        if self._config.read_threads:
            ahead = -(-self._config.prefetch_rows // local)
        threads = min(self._config.read_threads, ahead)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        iterator = iter(grain.MapDataset.source(_Steps(self.batch, start=start_step)).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def holdout_batches(self, source_name: str, *, batches: int, batch_rows: int) -> Iterator[batch_lib.Batch]:
        """This host's part of ``batches`` batches of one source's held-out documents; always the same, from the start again if few.

        Args:
            source_name: one of `sources`.
            batches: how many.
            batch_rows: rows of a global batch.

        Raises:
            ValueError: an unknown source, nothing held out, or rows that do not divide by the hosts.
        """
        if source_name not in self.sources:
            raise ValueError(f"no data source is called {source_name!r}; the recipe has {', '.join(self.sources)}")
        if batch_rows % self._host_count:
            raise ValueError(f"{batch_rows} evaluation rows do not divide among {self._host_count} hosts: use a multiple")
        source, local = self.sources.index(source_name), batch_rows // self._host_count
        self._plan(source, "holdout")
        firsts = range(self._host_index * local, batches * batch_rows, batch_rows)
        rows = ([mixture_lib.SourceRow(source, i) for i in range(first, first + local)] for first in firsts)
        return (self._collate(part, split="holdout") for part in rows)

    def rows_by_source(self, step: int) -> dict[str, int]:
        """Rows of each source in the global batches before ``step``: closed form, nothing is read."""
        return dict(zip(self.sources, self.mixture.rows_before(step * self._batch_rows), strict=True))

    def epochs_by_source(self, step: int) -> dict[str, float]:
        """How often each source has been gone through before ``step``, from its rows and the fill of its first rows."""
        return {
            name: rows * self._row_tokens(i) / self._plan(i, self._split).epoch_tokens
            for i, (name, rows) in enumerate(self.rows_by_source(step).items())
        }

    def fill(self) -> dict[str, float]:
        """Share of the places of a source's rows that hold tokens; the rest is padding."""
        return {name: self._plan(i, self._split).fill() for i, name in enumerate(self.sources)}

    def _row_tokens(self, source: int) -> float:
        return self._plan(source, self._split).fill() * self._config.sequence_length

    def token_histogram(self) -> np.ndarray:
        """``f64[vocab]``: how often each id is met as text, in shares that add up to 1, sources weighted as in training.

        Counted over whole stores, held-out documents included; placeholders of media count 0. For balanced hash routing.
        """
        total = np.zeros(self.tokenizer.vocab_size)
        for i, (reader, share) in enumerate(zip(self._readers, self.mixture.shares, strict=True)):
            stored = reader.store.documents["tokens"].sum(dtype=np.int64)
            total += share * self._row_tokens(i) * reader.store.histogram / stored
        return total / total.sum()

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the global `batch(step)` depends on; not with paths, hosts or threads."""
        config = self._config
        sources = [
            (source.name, reader.store.fingerprint, part, source.packing)
            for source, reader, part in zip(config.sources, self._readers, self.mixture.parts, strict=True)
        ]
        shapes = (config.sequence_length, config.image_patch, config.max_patches, config.max_audio_frames, self._batch_rows)
        identity = [plan_lib.VERSION, sources, shapes, config.seed, config.holdout, self._split, self.tokenizer.fingerprint]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class _Steps:
    """What grain reads from: batches by number, without end."""

    def __init__(self, read: Callable[[int], batch_lib.Batch], *, start: int):
        self._read, self._start = read, start

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> batch_lib.Batch:
        return self._read(self._start + index)


def _open(source: config_lib.SourceConfig, *, config: config_lib.DataConfig, tokenizer: tokenizer_lib.Tokenizer) -> store_lib.Store:
    try:
        store = store_lib.TokenStore.open(source.path, cache_bytes=_CACHE_BYTES // len(config.sources))
    except ValueError as error:
        raise ValueError(f"data source {source.name!r}: {error}") from None
    if store.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"data source {source.name!r}: {source.path} was built with another tokenizer; build it again or change `tokenizer`"
        )
    if store.image_patch != config.image_patch and bool((store.spans["kind"] == document_lib.IMAGE).any()):
        message = f"data source {source.name!r}: {source.path} has image patches of {store.image_patch} pixels"
        raise ValueError(f"{message}, but `image_patch` is {config.image_patch}: set it to {store.image_patch} or build the store again")
    return store
