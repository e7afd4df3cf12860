"""What a mixture is made of and what training will draw of it, from indexes and closed forms: no document is read.

Of each source: the documents that are trained on, their tokens by modality and their lengths; how many rows it is to give by the recipe's
weights and how many it gives exactly; how often that goes through its documents; and how full its rows are. The lengths are counted in
bins of powers of two: corpora spread over five orders of magnitude, and neither a linear axis nor the mean shows that.
"""

import dataclasses
import fractions
from typing import Any

import numpy as np
from jaxtyping import Int64

from v4train.data import config as config_lib
from v4train.data import phases as phases_lib
from v4train.data import pipeline


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens: of ``2^i .. 2^(i+1) - 1`` tokens there are ``documents[i]`` with ``tokens[i]`` together."""

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    mean: float
    median: float
    longest: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One source.

    Attributes:
        name: in the recipe.
        path: of its store.
        packing: policy.
        fingerprint: of its store.
        documents: trained on.
        held_out_documents: never trained on.
        held_out_share: of the store's tokens.
        tokens: modality -> tokens of the documents that are trained on.
        asked: share of the rows of the whole training that the weights ask for.
        rows: that the training draws, exactly.
        drawn: their tokens, padding left out.
        epochs: how often that goes through its documents.
        fill: share of the places of its rows that hold tokens, in the shape of the first step.
        lengths: of the documents that are trained on.
    """

    name: str
    path: str
    packing: str
    fingerprint: str
    documents: int
    held_out_documents: int
    held_out_share: float
    tokens: dict[str, int]
    asked: float
    rows: int
    drawn: int
    epochs: float
    fill: float
    lengths: Lengths


@dataclasses.dataclass(frozen=True)
class Statistics:
    """All sources, and the training that they are drawn in.

    Attributes:
        sources: in the order of the recipe.
        steps: of the training.
        rows: of all its batches.
        places: of these rows, padding included.
        phases: shapes and weights by step.
        fingerprint: of the data, as checkpoints hold it.
    """

    sources: tuple[Source, ...]
    steps: int
    rows: int
    places: int
    phases: tuple[phases_lib.Phase, ...]
    fingerprint: str

    def values(self) -> dict[str, Any]:
        """Everything as JSON."""
        sources = [dataclasses.asdict(source) | {"share_of_rows": source.rows / max(self.rows, 1)} for source in self.sources]
        names = [source.name for source in self.sources]
        phases = [
            {"from_step": phase.first_step} | phase.shape._asdict() | {"weights": dict(zip(names, map(float, phase.weights), strict=True))}
            for phase in self.phases
        ]
        figures = {"steps": self.steps, "rows": self.rows, "places": self.places, "fingerprint": self.fingerprint}
        return figures | {"sources": sources, "phases": phases}


def measure(data: pipeline.Pipeline, *, config: config_lib.DataConfig, steps: int) -> Statistics:
    """The statistics of a mixture, opened from ``config``, over a training of so many steps."""
    rows = data.phases.rows_before(steps)
    asked, amounts, fill = _asked(data.phases, steps=steps), data.amounts(steps), data.fill()
    sources = []
    for i, (source, store) in enumerate(zip(config.sources, data.stores, strict=True)):
        train, held_out = (store.documents[data.documents(i, split)] for split in ("train", "holdout"))
        total = _tokens(train)
        patches, frames = (int(train[field].sum(dtype=np.int64)) for field in ("patches", "frames"))
        all_tokens = max(1, total + _tokens(held_out))
        sources.append(
            Source(
                name=source.name,
                path=str(store.path),
                packing=source.packing,
                fingerprint=store.fingerprint,
                documents=len(train),
                held_out_documents=len(held_out),
                held_out_share=_tokens(held_out) / all_tokens,
                tokens={"text": total - patches - frames, "image": patches, "audio": frames},
                asked=float(asked[i]),
                rows=amounts[source.name].rows,
                drawn=amounts[source.name].tokens,
                epochs=amounts[source.name].epochs,
                fill=fill[source.name],
                lengths=lengths(train["tokens"].astype(np.int64)),
            )
        )
    phases = tuple(phase for phase in data.phases.phases if phase.first_step < max(steps, 1))
    return Statistics(tuple(sources), steps, rows, data.phases.places_before(steps), phases, data.fingerprint)


def lengths(tokens: Int64[np.ndarray, "documents"]) -> Lengths:
    """The distribution of at least one length; every length is at least 1."""
    bins = np.frexp(tokens.astype(np.float64))[1] - 1  # exact below 2^53, which log2 is not
    weights = [np.bincount(bins), np.bincount(bins, weights=tokens)]
    documents, total = (tuple(int(n) for n in counts) for counts in weights)
    return Lengths(documents, total, float(tokens.mean()), float(np.median(tokens)), int(tokens.max()))


def _tokens(documents: np.ndarray) -> int:
    return int(documents["tokens"].sum(dtype=np.int64))


def _asked(phases: phases_lib.Phases, *, steps: int) -> list[fractions.Fraction]:
    """Share of all rows that each source is due."""
    ends = [phase.first_step for phase in phases.phases[1:]] + [None]
    due = [fractions.Fraction(0)] * len(phases.phases[0].weights)
    for phase, end in zip(phases.phases, ends, strict=True):
        rows = max(0, min(steps, steps if end is None else end) - phase.first_step) * phase.shape.rows
        due = [before + rows * weight for before, weight in zip(due, phase.weights, strict=True)]
    total = sum(due)
    return [rows / total if total else weight for rows, weight in zip(due, phases.phases[0].weights, strict=True)]
