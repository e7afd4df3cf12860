"""The data pipeline: `batch(step)` is a pure function of the step.

    step, host -> global rows -> (source, row of the source)   phases, mixture: closed form
               -> pieces of documents                           plan: two binary searches
               -> tokens, patches, audio                        store: random access, checksummed
               -> arrays of fixed shape                         collate

There is no iterator state: a run resumes from one integer and a fingerprint, on any number of hosts (host h of H reads the h-th part of
the rows of a batch), at once, and a batch can be looked at without reading those before it. (Where rows have no closed form, with media or
best fit, `milestones` of a checkpoint spare the next program to count again; without them, a far step takes time.) Where hosts share
a row (context parallelism), each reads the documents of its own slice only: a row of 2^20 image tokens is gigabytes. `iterate` adds
nothing but reading ahead, by a grain thread pool whose elements are whole batches (grain costs some 70 us an element: too much for a
document, nothing for a batch). Rejected: grain's own packing and mixing, whose state depends on workers and which lose or shift media
when a document is cut.

**Phases.** Weights and the shape of batches may change with the step. A source counts its rows through changes of weights; at a change
of shape its next plan begins with the token at which the last one has ended. What was drawn before step k therefore depends on no later
phase, and `history(k)` says it in full: a run goes on from a checkpoint if, and only if, the histories up to there are equal.

A document that fails its checksum becomes padding and is reported (`quarantine`); no exception ever ends the stream, because on many
hosts that would leave the others waiting in a collective. The batch counts such documents, so that all hosts can decide alike.
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from v4train.data import batch as batch_lib
from v4train.data import collate
from v4train.data import config as config_lib
from v4train.data import document as document_lib
from v4train.data import history as history_lib
from v4train.data import mixture as mixture_lib
from v4train.data import phases as phases_lib
from v4train.data import plan as plan_lib
from v4train.data import sources as sources_lib
from v4train.data import tokenizer as tokenizer_lib

Split = Literal["train", "holdout"]
_CACHE_BYTES = 2**26  # of decoded documents, all sources together
_AHEAD_BYTES = 2**28  # of batches that are read ahead, one of them in any case


class Amount(NamedTuple):
    """What of a source was drawn: rows, tokens without padding, and how often its documents were gone through."""

    rows: int
    tokens: int
    epochs: float


class Pipeline:
    """Batches of one split, for one host. Thread-safe.

    Attributes:
        tokenizer: of all sources.
        sources: their names; `Batch.source` counts in this order.
        stores: of the sources, in this order.
        documents: ``(source, split)`` -> numbers of its documents, in their store.
        phases: shapes and weights by step.
        mixture: rows of each source.
        tokens_per_step: places (padding included) of a global batch of the first phase.
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
        context_index: int = 0,
        context_count: int = 1,
        on_bad_record: Callable[[collate.BadRecord], None] | None = None,
    ):
        """Opens the stores and plans their first rows.

        Args:
            config: what to read.
            batch_rows: rows of the global batch, until a phase changes it.
            split: documents to train on, or those held out.
            host_index: which part of the rows of a batch to read.
            host_count: among how many hosts, or groups of hosts that share rows, they are divided.
            context_index: which slice of each row to read.
            context_count: into how many slices rows are divided. A slice has its own patches and frames, so its slots count from its
                beginning, and its budgets are the row's or its number of tokens, whichever is less.
            on_bad_record: called once for each document that becomes padding, from any thread.

        Raises:
            ValueError: a store that is missing, damaged, empty, or does not fit the config.
        """
        self._config = config
        self._split: Split = split
        self._host_index, self._host_count = host_index, host_count
        self._context_index, self._context_count = context_index, context_count
        self.phases = phases_lib.Phases.of(config, batch_rows=batch_rows)
        self._check_division()
        self.tokenizer = tokenizer_lib.build(config.tokenizer)
        self.sources = tuple(source.name for source in config.sources)
        self.mixture = self.phases.mixture
        self.tokens_per_step = self.phases.at(0).shape.places
        self.quarantine = collate.Quarantine(on_bad_record)
        opened = {"tokenizer": self.tokenizer, "image_patch": config.image_patch, "cache_bytes": _CACHE_BYTES // len(config.sources)}
        stores = [sources_lib.open_store(source, **opened) for source in config.sources]
        self.stores = tuple(stores)
        self._readers = [
            collate.Reader(store, name=name, quarantine=self.quarantine) for store, name in zip(stores, self.sources, strict=True)
        ]
        # Phases of one shape of row share a plan: (S, P, A), and the global row it begins at.
        self._row_shapes: list[tuple[phases_lib.RowShape, int]] = []
        for phase in self.phases.phases:
            if not self._row_shapes or self._row_shapes[-1][0] != phase.shape.row:
                self._row_shapes.append((phase.shape.row, phase.first_row))
        self._milestones: dict[str, plan_lib.Milestone] = {}  # by fingerprint of a plan
        self.documents = functools.cache(self._select)
        self._plan = functools.cache(self._make_plan)
        for i in range(len(stores)):
            self._plan(i, split, 0)
            for shape in {shape for shape, _ in self._row_shapes[1:]}:  # a span that no row can hold is better found now
                plan_lib.Plan(stores[i], documents=self.documents(i, split), packing=self._packing(i, shape))

    def _delimited(self, source: int) -> list[int]:
        """Kinds of media that have delimiters in a store. Its counts of ids say so: text is never control, so only media brings them."""
        if not len(self.stores[source].spans):
            return []
        tokenizer, counts = self.tokenizer, self.stores[source].histogram
        kinds = {document_lib.IMAGE: (tokenizer.image_start, tokenizer.image_end)}
        kinds |= {document_lib.AUDIO: (tokenizer.audio_start, tokenizer.audio_end)}
        return [kind for kind, ids in kinds.items() if all(counts[i] for i in ids)]

    def _check_division(self) -> None:
        hosts, slices = self._host_count, self._context_count
        assert 0 <= self._host_index < hosts, "a host outside the number of hosts"
        assert 0 <= self._context_index < slices, "a slice outside the number of slices"
        for shape in {phase.shape for phase in self.phases.phases}:
            rows, length = shape[:2]
            if rows <= 0 or rows % hosts:
                message = f"a batch of {rows} rows cannot be divided evenly for host {self._host_index} of {hosts}"
                raise ValueError(f"{message}: make it a multiple of {hosts}")
            if length % slices:
                raise ValueError(
                    f"rows of {length} tokens cannot be divided into {slices} slices: make `sequence_length` a multiple of {slices}"
                )

    def _select(self, source: int, split: Split) -> np.ndarray:
        held_out = self._readers[source].store.documents["key"] < np.uint64(min(int(self._config.holdout * 2.0**64), 2**64 - 1))
        return np.flatnonzero(held_out if split == "holdout" else ~held_out)

    def _packing(self, source: int, shape: phases_lib.RowShape) -> plan_lib.Packing:
        return plan_lib.Packing(*shape, self._config.seed, self._config.sources[source].packing)

    def _make_plan(self, source: int, split: Split, part: int) -> plan_lib.Plan:
        """Of the rows in the ``part``-th shape. It begins where the plan before, if there is one, has come to by then."""
        start = None
        if part:
            start = self._plan(source, split, part - 1).after(self._rows_in_part(source, part - 1))
        documents, packing = self.documents(source, split), self._packing(source, self._row_shapes[part][0])
        plan = plan_lib.Plan(self.stores[source], documents=documents, packing=packing, start=start, delimited=self._delimited(source))
        self._remind(plan)
        return plan

    def _remind(self, plan: plan_lib.Plan) -> None:
        if self._milestones and not plan.closed_form and (found := self._milestones.get(plan.fingerprint)) is not None:
            plan.remember(found)

    def _rows_in_part(self, source: int, part: int) -> int:
        first, end = (self.mixture.rows_before(self._row_shapes[i][1])[source] for i in (part, part + 1))
        return end - first

    def _part(self, row: int) -> int:
        """Which shape the global row is of."""
        return bisect.bisect_right(self._row_shapes, row, key=lambda shape: shape[1]) - 1

    def batch(self, step: int) -> batch_lib.Batch:
        """This host's rows (and slices of them) of global batch ``step``, as numpy arrays."""
        phase = self.phases.at(step)
        local = phase.shape.rows // self._host_count
        first = phase.rows_before(step) + self._host_index * local
        part = self._part(first)
        before = self.mixture.rows_before(self._row_shapes[part][1])
        rows = [self.mixture.source_and_row(i) for i in range(first, first + local)]
        rows = [mixture_lib.SourceRow(source, row - before[source]) for source, row in rows]
        return self._collate(rows, split=self._split, part=part)

    def _collate(self, rows: list[mixture_lib.SourceRow], *, split: Split, part: int) -> batch_lib.Batch:
        batch = self._allocate(len(rows), self._row_shapes[part][0])
        width = batch.tokens.shape[1]
        batch.source[...] = [source for source, _ in rows]
        start = self._context_index * width
        slices = [self._plan(source, split, part).slice(row, start=start, stop=start + width) for source, row in rows]
        parts = [collate.RowPieces(self._readers[source], *place) for (source, _), place in zip(rows, slices, strict=True)]
        collate.fill(batch, parts, tokenizer=self.tokenizer)
        return batch

    def _allocate(self, rows: int, shape: phases_lib.RowShape) -> batch_lib.Batch:
        length, *budgets = shape
        width = length // self._context_count
        patches, frames = (min(budget, width) for budget in budgets) if self._context_count > 1 else budgets
        return batch_lib.allocate(
            rows,
            sequence_length=width,
            max_patches=patches,
            max_audio_frames=frames,
            image_patch=self._config.image_patch,
        )

    def iterate(self, start_step: int) -> Iterator[batch_lib.Batch]:
        """Batches ``start_step``, ``start_step + 1``, ... without end, read ahead by threads."""
        ahead = self._batches_ahead(start_step) if self._config.read_threads else 0
        threads = min(self._config.read_threads, ahead)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        iterator = iter(grain.MapDataset.source(_Steps(self.batch, start=start_step)).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def _batches_ahead(self, step: int) -> int:
        """As many as ``prefetch_rows`` are, but of no more than `_AHEAD_BYTES`, unless it is one; a later phase may have the largest."""
        wanted = -(-self._config.prefetch_rows // (self.phases.at(step).shape.rows // self._host_count))
        shapes = {self.phases.at(step).shape, *(phase.shape for phase in self.phases.phases if phase.first_step > step)}
        largest = max(shape.rows // self._host_count * self._row_bytes(shape.row) for shape in shapes)
        return min(wanted, max(1, _AHEAD_BYTES // largest))

    def _row_bytes(self, shape: phases_lib.RowShape) -> int:
        return sum(array.nbytes for array in vars(self._allocate(1, shape)).values())

    def holdout_batches(self, source_name: str, *, batches: int, batch_rows: int) -> Iterator[batch_lib.Batch]:
        """This host's part of ``batches`` batches of one source's held-out documents; always the same, from the start again if few.

        Rows have the shape of the first phase, so that losses of different phases can be compared.

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
        self._plan(source, "holdout", 0)
        firsts = range(self._host_index * local, batches * batch_rows, batch_rows)
        rows = ([mixture_lib.SourceRow(source, i) for i in range(first, first + local)] for first in firsts)
        return (self._collate(chosen, split="holdout", part=0) for chosen in rows)

    def rows_by_source(self, step: int) -> dict[str, int]:
        """Rows of each source in the global batches before ``step``: closed form, nothing is read."""
        return dict(zip(self.sources, self.mixture.rows_before(self.phases.rows_before(step)), strict=True))

    def amounts(self, step: int) -> dict[str, Amount]:
        """What of each source was drawn before ``step``, exactly and without reading. Media, and best fit, are planned up to there."""
        rows, tokens = self.mixture.rows_before(self.phases.rows_before(step)), dict.fromkeys(self.sources, 0)
        for name, plan, n in self._plans_before(step):
            tokens[name] += plan.tokens_before(n)
        once = {name: self._plan(i, self._split, 0).epoch_tokens for i, name in enumerate(self.sources)}
        return {name: Amount(n, tokens[name], tokens[name] / once[name]) for name, n in zip(self.sources, rows, strict=True)}

    def _plans_before(self, step: int) -> Iterator[tuple[str, plan_lib.Plan, int]]:
        """Source, plan and the number of its rows before ``step``, of each shape of row up to there."""
        end = self.phases.rows_before(step)
        last = self._part(max(end - 1, 0))
        rows, before = self.mixture.rows_before(end), self.mixture.rows_before(self._row_shapes[last][1])
        for i, name in enumerate(self.sources):
            for part in range(last):
                yield name, self._plan(i, self._split, part), self._rows_in_part(i, part)
            yield name, self._plan(i, self._split, last), rows[i] - before[i]

    def milestones(self, step: int) -> dict[str, list[int]]:
        """What the plans counted on the way to ``step``, for `remember`; JSON, a few integers for each source and shape of row."""
        found = {}
        for _, plan, n in self._plans_before(step):
            if not plan.closed_form and (milestone := plan.milestone(n)).block:
                found[plan.fingerprint] = list(milestone)
        return found

    def remember(self, milestones: Mapping[str, Sequence[int]]) -> None:
        """Takes over what `milestones` returned in an earlier program, so that steps from there on are found without planning those before.

        Changes no row: what belongs to other documents, or to another way of packing them, is left aside.
        """
        self._milestones |= {key: plan_lib.Milestone(*numbers) for key, numbers in milestones.items()}
        for source in range(len(self.sources)):
            self._remind(self._plan(source, self._split, 0))

    def planning(self, step: int) -> dict[str, plan_lib.Planning]:
        """By source, what must be planned before batch ``step`` is found; sources of which nothing must are left out.

        Shapes of rows after the first are taken to be unknown.
        """
        row, found = self.phases.rows_before(step), {}
        rows = self.mixture.rows_before(row)
        before = self.mixture.rows_before(self._row_shapes[1][1] if self._part(row) else row)
        for i, name in enumerate(self.sources):
            first = self._plan(i, self._split, 0).planning(before[i])
            if first.rows:
                scale = 1 + (rows[i] - before[i]) / first.rows
                found[name] = plan_lib.Planning(first.rows + rows[i] - before[i], first.seconds * scale)
        return found

    def epochs_by_source(self, step: int) -> dict[str, float]:
        """How often each source has been gone through before ``step``."""
        return {name: amount.epochs for name, amount in self.amounts(step).items()}

    def fill(self, step: int = 0) -> dict[str, float]:
        """Share of the places of a source's rows that hold tokens, in the first 256 rows or more of the shape at ``step``."""
        part = self._part(self.phases.rows_before(step))
        return {name: self._plan(i, self._split, part).fill() for i, name in enumerate(self.sources)}

    def token_histogram(self) -> np.ndarray:
        """``f64[vocab]``: how often each id is met as text, in shares that add up to 1. For balanced hash routing.

        Sources are weighted as in the first phase, those that have no weight there by the first that they get. Counted over whole
        stores, held-out documents included; placeholders of media count 0.
        """
        total = np.zeros(self.tokenizer.vocab_size)
        for i, (reader, fill) in enumerate(zip(self._readers, self.fill().values(), strict=True)):
            share = next((float(phase.weights[i]) for phase in self.phases.phases if phase.weights[i]), 0.0)
            stored = reader.store.documents["tokens"].sum(dtype=np.int64)
            total += share * fill * reader.store.histogram / stored
        return total / total.sum()

    def history(self, step: int) -> dict[str, Any]:
        """Everything that the global batches before ``step`` depend on, as JSON (see `history.of`)."""
        return self._history(step)

    def _history(self, step: int | None) -> dict[str, Any]:
        config = self._config
        settings = {"seed": config.seed, "holdout": config.holdout, "image_patch": config.image_patch, "split": self._split}
        settings |= {"tokenizer": self.tokenizer.fingerprint, "packing_version": plan_lib.VERSION}
        sources = {
            source.name: {"store": reader.store.fingerprint, "packing": source.packing}
            for source, reader in zip(config.sources, self._readers, strict=True)
        }
        return history_lib.of(self.phases, sources=sources, settings=settings, step=step)

    def fingerprint_before(self, step: int) -> str:
        """Of `history`."""
        return _digest(self._history(step))

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the global `batch(step)` of any step depends on; not with paths, hosts or threads."""
        return _digest(self._history(None))


def _digest(history: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(history).encode()).hexdigest()


class _Steps:
    """What grain reads from: batches by number, without end."""

    def __init__(self, read: Callable[[int], batch_lib.Batch], *, start: int):
        self._read, self._start = read, start

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> batch_lib.Batch:
        return self._read(self._start + index)
