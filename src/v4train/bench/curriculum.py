"""What the changes of a run did to its loss, and what its indexer had learned when they came: from a run's directory.

A change is a step at which the shape of the batch or the stage of the model differs from the step's before. Two figures say whether it
hurt, and neither is enough alone:

* ``training``: mean text loss of the N steps after over that of the N steps before, less one. It has all effects of the change, also those
  that need a step to appear, but the batches are different ones, and the loss falls anyway. ``noise`` is the standard error of the ratio.
* ``same_state``: held-out loss of one state, the checkpoint at the change, by the model and at the length of row of the step after, over
  that by those of the step before, less one. Same parameters, same text; what differs is the change alone. None where a change cannot
  alter predictions (the weight of a loss term, rows of a step). Longer rows cut the same text at fewer places, which lowers the loss.

A step of the indexer's warm-up moves no text loss, so around it ``training`` compares the neighbours only.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from v4train import recipe as recipe_lib
from v4train.bench import machine
from v4train.checkpoint import restore, step_directory
from v4train.config import dump
from v4train.core import compiler
from v4train.model import config as model_config
from v4train.train import build, stages
from v4train.train.hooks import phases, record

_NO_TEXT = ("loss/mtp", "loss/indexer", "loss/balance")
_LAST = 10


@dataclasses.dataclass
class _Heldout:
    """Held-out loss of checkpoints, by stage and length of row, on about as many tokens each. Compiles each program once."""

    recipe: recipe_lib.Recipe
    directory: pathlib.Path
    tokens: int

    def __post_init__(self):
        self._parts: dict[int, build.Parts] = {}
        self._programs: dict[tuple[int, stages.Stage], Any] = {}

    def loss(self, step: int, *, stage: stages.Stage, length: int) -> float:
        """Nats per target over all sources, of the state after ``step`` steps."""
        parts = self._at(length)
        key = (length, stage.evaluated)
        if key not in self._programs:
            self._programs[key] = build.lower_evaluation(parts, stage).compile(compiler.options())
        state = restore.restore(self.directory / "checkpoints", template=parts.state, step=step, verify=False).state
        rows = parts.recipe.train.batch_rows
        batches = -(-self.tokens // (rows * length))
        sums = [
            jax.device_get(self._programs[key](state, parts.place(batch)))
            for name in parts.data.sources
            for batch in parts.data.holdout_batches(name, batches=batches, batch_rows=rows)
        ]
        nats, targets = (float(np.sum([getattr(part, name) for part in sums])) for name in ("nats", "targets"))
        return nats / targets

    def _at(self, length: int) -> build.Parts:
        if length not in self._parts:
            recipe, least = self.recipe, self.recipe.mesh.batch_shards
            rows = max(least, recipe.tokens_per_step // length // least * least)
            data = recipe.data.model_copy(update={"sequence_length": length, "phases": ()})
            train = recipe.train.model_copy(update={"batch_rows": rows, "microbatches": 1, "stages": ()})
            self._parts[length] = build.parts(recipe.model_copy(update={"data": data, "train": train}))
        return self._parts[length]


def measure(directory: pathlib.Path, *, around: int, tokens: int, limit: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about the changes of a finished run, ready for `json.dumps`.

    Args:
        directory: of the run; it needs the checkpoint of each change's step.
        around: steps before and after a change whose losses are compared; fewer where the next change is nearer.
        tokens: held-out tokens of each source to evaluate.
        limit: a rise above this share is a jump.
        say: where progress goes.

    Raises:
        ValueError: no run is there, it has no change, or the checkpoint of one is gone.
    """
    if not (directory / "recipe.json").is_file():
        raise ValueError(f"{directory} is no run directory: recipe.json is missing; name the directory of a finished run")
    recipe = recipe_lib.Recipe.model_validate(json.loads((directory / "recipe.json").read_text(encoding="utf-8")))
    parts = build.parts(recipe)
    found = {r["step"]: r for r in record.read(directory / "metrics.jsonl") if r["kind"] == "train"}
    edges = [step for step in range(1, recipe.train.steps) if parts.variant_at(step) != parts.variant_at(step - 1)]
    if not edges:
        raise ValueError(f"{directory}: nothing changes in this run; give its recipe data.phases or train.stages")
    missing = sorted(set(edges) - set(step_directory.list_steps(directory / "checkpoints")))
    if missing:
        raise ValueError(f"{directory} has no checkpoint of step {missing[0]}, where it changes; let checkpoint.keep keep it")
    heldout, changes = _Heldout(recipe, directory, tokens), []
    for edge, before, after in zip(edges, [0, *edges], [*edges[1:], recipe.train.steps], strict=False):
        changes.append(_change(parts, found, heldout, edge, around=min(around, edge - before, after - edge)))
        say(f"step {edge}: {changes[-1]}")
    figures = [x for change in changes for x in (change["training"], change["same_state"]) if x is not None]
    return {
        "bench": "curriculum",
        "recipe": recipe.name,
        "recipe_sha256": dump.digest(recipe),
        **machine.describe(devices=parts.mesh.size),
        "steps_around": around,
        "heldout_tokens": tokens,
        "limit": limit,
        "changes": changes,
        "largest_rise": max(figures),
        "passed": max(figures) <= limit,
        "indexer": _indexer(parts, found),
        "losses": {str(edge): _window(found, edge, around) for edge in edges},
    }


def _change(parts: build.Parts, found: dict[int, record.Record], heldout: _Heldout, edge: int, *, around: int) -> dict[str, Any]:
    old, new = parts.variant_at(edge - 1), parts.variant_at(edge)
    before, after = (
        [_text(found[step]) for step in steps] for steps in (range(edge - around + 1, edge + 1), range(edge + 1, edge + around + 1))
    )
    ratio = statistics.mean(after) / statistics.mean(before)
    change = {
        "step": edge,
        "tokens": parts.phases.places_before(edge),
        "change": ", ".join(phases.changed(old, new)),
        "steps": around,
        "before": round(statistics.mean(before), 4),
        "after": round(statistics.mean(after), 4),
        "training": round(ratio - 1, 4),
        "noise": round(ratio * math.hypot(*(_error(x) / statistics.mean(x) for x in (before, after))), 4),
        "same_state": None,
    }
    if (old.shape.sequence_length, old.stage.evaluated) != (new.shape.sequence_length, new.stage.evaluated):
        by_old, by_new = (heldout.loss(edge, stage=v.stage, length=v.shape.sequence_length) for v in (old, new))
        change |= {"heldout_before": round(by_old, 4), "heldout_after": round(by_new, 4), "same_state": round(by_new / by_old - 1, 4)}
    return change


def _indexer(parts: build.Parts, found: dict[int, record.Record]) -> dict[str, Any] | None:
    """How recall rose in the warm-up; None without one."""
    steps = [step for step, r in found.items() if r.get("index_recall") is not None]
    if not steps:
        return None
    recall = [found[step]["index_recall"] for step in sorted(steps)]
    length = parts.phases.at(max(steps) - 1).shape.sequence_length
    kind = parts.recipe.model.kind("csa")
    assert isinstance(kind, model_config.CompressedSparseConfig)  # only its indexer has a recall
    return {
        "top_k": kind.top_k,
        "entries_in_a_row": length // kind.ratio,
        "sequence_length": length,
        "steps": len(recall),
        "recall_first": round(recall[0], 4),
        "recall_last": round(statistics.mean(recall[-_LAST:]), 4),
        "possible_last": round(statistics.mean(found[step]["index_recall_possible"] for step in sorted(steps)[-_LAST:]), 4),
        "by_step": {str(step): round(found[step]["index_recall"], 4) for step in sorted(steps)},
        "loss_first": round(found[min(steps)]["loss/indexer"], 4),
        "loss_last": round(found[max(steps)]["loss/indexer"], 4),
    }


def _window(found: dict[int, record.Record], edge: int, around: int) -> dict[str, float]:
    return {str(step): round(_text(found[step]), 4) for step in range(edge - around + 1, edge + around + 1) if step in found}


def _text(r: record.Record) -> float:
    """Mean over the sources."""
    return statistics.mean(value for name, value in r.items() if name.startswith("loss/") and name not in _NO_TEXT)


def _error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
