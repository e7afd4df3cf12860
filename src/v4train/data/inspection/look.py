"""A look at one step: the rows that `Pipeline.batch` gives, taken apart."""

import dataclasses

from v4train.data import batch as batch_lib
from v4train.data import collate, pipeline
from v4train.data.inspection import rows as rows_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What was asked to be shown of a step.

    Attributes:
        step: the batch's number; the optimizer's update ``step + 1`` is made from it.
        rows: in the order of the batch.
        sequence_length: S of this step.
        fingerprint: of the data, as checkpoints hold it.
        bad: documents that were found to be unreadable on the way.
    """

    step: int
    rows: tuple[rows_lib.Row, ...]
    sequence_length: int
    fingerprint: str
    bad: tuple[collate.BadRecord, ...]


def look(data: pipeline.Pipeline, *, step: int, rows: int, source: str | None = None, window: tuple[int, int] | None = None) -> Look:
    """Reads a batch and takes its first rows apart.

    Args:
        data: the pipeline that training would read from.
        step: number of the batch, from 0.
        rows: how many to show.
        source: only rows of the source of this name.
        window: places of each row to show; by default all.

    Raises:
        ValueError: an unknown source, or one that has no row in this batch.
    """
    if source is not None and source not in data.sources:
        raise ValueError(f"--source {source}: no data source is called so; the recipe has {', '.join(data.sources)}")
    batch = data.batch(step)
    chosen = [i for i in range(batch.source.shape[0]) if source is None or data.sources[int(batch.source[i])] == source]
    if not chosen:
        raise ValueError(_absent(data, batch, step=step, source=source))
    return Look(
        step=step,
        rows=tuple(rows_lib.describe(batch, row=i, tokenizer=data.tokenizer, sources=data.sources, window=window) for i in chosen[:rows]),
        sequence_length=batch.tokens.shape[1],
        fingerprint=data.fingerprint,
        bad=tuple(data.quarantine.records),
    )


def _absent(data: pipeline.Pipeline, batch: batch_lib.Batch, *, step: int, source: str | None) -> str:
    present = sorted({data.sources[int(i)] for i in batch.source})
    return f"--source {source}: step {step} has no row of it, only of {', '.join(present)}; try another --step"
