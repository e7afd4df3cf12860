"""What a recipe, or a command line, asks of a model beside its loss: files of questions and needles, prepared once, asked at any time.

Everything that can be wrong with a file is found while it is prepared, which is before the first step. Each probe has one shape of
batch: rows as long as its longest document needs, within limits, and as many as there is work for, at most the places that a microbatch
of training has, since those are known to fit. Probes of one shape share a compiled program.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from v4train.data import document as document_lib
from v4train.data import pipeline
from v4train.data import tokenizer as tokenizer_lib
from v4train.model import config as model_config
from v4train.numerics import config as numerics_config
from v4train.train.evals import choices, judge, needle
from v4train.train.evals import config as config_lib

_SHORT_ROW = 2048
"""Rows for questions are not made longer than this unless a question is."""
_HAY_TOKENS = 2**16
"""Least tokens of a haystack to draw stretches from."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one probe: numbers for a record by name, and the whole result."""

    label: str
    fields: dict[str, float]
    result: choices.Result | list[needle.Cell]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A prepared evaluation.

    Attributes:
        label: see `config.EvaluationConfig.label`.
        rows: of a batch.
        length: of a row.
        ask: ``(judge, all parameters) -> Answer``.
    """

    label: str
    rows: int
    length: int
    ask: Callable[[judge.Judge, dict], Answer]


class Probes:
    """All evaluations of a recipe. Among several processes all of them ask, together."""

    def __init__(
        self,
        evals: Sequence[config_lib.Evaluation],
        *,
        tokenizer: tokenizer_lib.Tokenizer,
        numerics: numerics_config.NumericsConfig,
        mesh: jax.sharding.Mesh,
        rows: int,
        length: int,
        hay: Callable[[int], Int[np.ndarray, "n"] | None],
    ):
        """Reads the files.

        Args:
            evals: what to ask.
            tokenizer: of the model.
            numerics: formats.
            mesh: where the parameters will be.
            rows: with ``length``, the places of a batch that surely fit.
            length: tokens of a row, which a question must not exceed.
            hay: ids of a text to hide needles in, of about so many tokens; None: there is none.

        Raises:
            ValueError: a file is missing or not what it should be, or a question or a needle does not fit.
        """
        self._numerics, self._mesh = numerics, mesh
        limits = {"tokenizer": tokenizer, "rows": rows, "length": length}
        self.probes = tuple(
            _questions(each, **limits) if isinstance(each, config_lib.MultipleChoiceConfig) else _needles(each, hay=hay, **limits)
            for each in evals
        )
        self._judges: dict[tuple[str, int, int], judge.Judge] = {}

    def ask(self, probe: Probe, *, model: model_config.ModelConfig, params: dict) -> Answer:
        """Asks the model.

        Args:
            probe: one of `probes`.
            model: its config.
            params: all its parameters and buffers.
        """
        key = model.model_dump_json(), probe.rows, probe.length
        if key not in self._judges:
            made = judge.Judge(model, numerics=self._numerics, mesh=self._mesh, rows=probe.rows, length=probe.length)
            self._judges[key] = made
        return probe.ask(self._judges[key], params)


def held_out(data: pipeline.Pipeline, *, tokens: int) -> Int[np.ndarray, "n"] | None:
    """Ids of held-out text, document after document, until there are so many; documents with media are left out. None: there is none."""
    text, found, count = data.tokenizer.byte_counts() > 0, [], 0
    for source, store in enumerate(data.stores):
        for i in data.documents(source, "holdout").tolist():
            if len(store.spans_of(i)):
                continue
            try:
                ids = store.read(i).tokens.astype(np.int32)
            except document_lib.DamagedRecordError:
                continue  # training reports it
            found.append(ids[text[ids]])
            count += len(found[-1])
            if count >= tokens:
                return np.concatenate(found)
    return np.concatenate(found) if count else None


def _questions(each: config_lib.MultipleChoiceConfig, *, tokenizer: tokenizer_lib.Tokenizer, rows: int, length: int) -> Probe:
    encoded = choices.encode(choices.read(each.path, limit=each.limit), tokenizer=tokenizer, length=length, cut=each.long == "cut")
    sizes = [len(document.tokens) for item in encoded for document in item.documents]
    row = min(length, max(_SHORT_ROW, max(sizes)))

    def ask(judged: judge.Judge, params: dict) -> Answer:
        result = choices.ask(encoded, judged=judged, params=params)
        return Answer(each.label, {f"{each.label}/{name}": value for name, value in result.fields.items()}, result)

    return Probe(each.label, min(max(rows * length // row, 1), len(judge.pack(sizes, length=row))), row, ask)


def _needles(
    each: config_lib.NeedleConfig,
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    rows: int,
    length: int,
    hay: Callable[[int], Int[np.ndarray, "n"] | None],
) -> Probe:
    longest = max(each.lengths)
    ids = needle.haystack(_text(each.text), tokenizer=tokenizer, source=each.text) if each.text else hay(max(_HAY_TOKENS, longest))
    if ids is None:
        ids = needle.haystack(needle.text(), tokenizer=tokenizer, source="the made-up text")
    needle.document(ids, tokenizer=tokenizer, length=min(each.lengths), depth=0.0, seed=(0,))  # is there room?
    grid = {"lengths": each.lengths, "depths": each.depths, "samples": each.samples, "seed": each.seed}

    def ask(judged: judge.Judge, params: dict) -> Answer:
        cells = needle.ask(ids, tokenizer=tokenizer, judged=judged, params=params, **grid)
        return Answer(each.label, {f"{each.label}/{name}": value for name, value in needle.fields(cells).items()}, cells)

    sizes = [size for size in each.lengths for _ in range(len(each.depths) * each.samples)]
    return Probe(each.label, min(max(rows * length // longest, 1), len(judge.pack(sizes, length=longest))), longest, ask)


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror} (from {pathlib.Path.cwd()}); name a file of text, or none") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert it") from None
