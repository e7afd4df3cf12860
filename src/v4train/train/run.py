"""A run from its directory: resume or begin, train, save, summarise."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from v4train import recipe as recipe_lib
from v4train.checkpoint import manager as manager_lib
from v4train.checkpoint import restore, run_lock
from v4train.config import dump, load
from v4train.core import hardware
from v4train.model import count, flops
from v4train.optim import schedule
from v4train.train import build, loop, resilience
from v4train.train import state as state_lib
from v4train.train.hooks import checkpoints, evaluation, metrics, progress, record

# A resumed run may differ in these: they do not change what a step computes from a state and a batch.
MAY_CHANGE = (
    "name",
    "mesh",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.experts_every",
    "train.run_directory",
    "train.grace_seconds",
    "checkpoint",
    "data.read_threads",
    "data.prefetch_rows",
    "model.remat",
    "model.attention.chunk",
    "model.loss_chunk",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        summary: as written to ``summary.json``.
        signal: the signal that asked it to stop, or None.
    """

    summary: dict[str, Any]
    signal: int | None


def run(loaded: load.Loaded[recipe_lib.Recipe], *, program_started: float) -> Outcome:
    """Trains a recipe to its end, from the newest good checkpoint in its run directory if there is one.

    Args:
        loaded: the recipe.
        program_started: `time.time` when the program began, for the time to the first step.

    Raises:
        ValueError: anything that the user can mend: devices, data, another recipe's checkpoints, a directory in use.
    """
    recipe = loaded.config
    directory = pathlib.Path(recipe.run_directory)
    with run_lock.RunLock(directory), resilience.stop_on_signals(grace_seconds=recipe.train.grace_seconds) as stop:
        parts = build.parts(recipe)
        with manager_lib.Manager(directory / "checkpoints", config=recipe.checkpoint) as saver:
            found = restore.describe(directory / "checkpoints", verify=recipe.checkpoint.verify) if saver.steps() else None
            metadata = {"recipe": dump.values(recipe), "data": parts.data.fingerprint, "seed": recipe.seed}
            if found is not None:
                _check_same(found.metadata, metadata, directory)
            _write_recipe(directory, loaded)
            return _train(parts, directory, saver, found, metadata, stop=stop, program_started=program_started)


def _train(
    parts: build.Parts,
    directory: pathlib.Path,
    saver: manager_lib.Manager,
    found: restore.Description | None,
    metadata: dict[str, Any],
    *,
    stop: resilience.Stop,
    program_started: float,
) -> Outcome:
    recipe, start = parts.recipe, 0 if found is None else found.step
    earlier = record.read(directory / "metrics.jsonl")
    with _sinks(directory, recipe=recipe, start=start) as (sink, show):
        show.say(_headline(parts))
        program = build.compile_program(parts)
        if found is None:
            state = build.first_state(parts)
        else:
            state = restore.restore(directory / "checkpoints", template=parts.state, step=start, verify=False).state
            show.say(f"resumed from step {start} in {directory / 'checkpoints'}")
        first = _FirstStep(program_started)
        measured = _metrics(parts, sink, show, seconds_before=_seconds_at(earlier, start))
        saves = checkpoints.Checkpoints(saver, config=recipe.checkpoint, metadata=metadata, start=start)
        evaluates = evaluation.Evaluation(parts, program, sink, done=measured.pause)
        measured.pause()
        state, done = loop.run(parts, program, state, start=start, hooks=[evaluates, saves, first, measured], stop=stop)
        saves.last(done, state)
        summary = {
            "status": "finished" if done == recipe.train.steps else "stopped",
            "steps": done,
            "tokens": done * parts.data.tokens_per_step,
            "seconds": round(_seconds_at(record.read(directory / "metrics.jsonl"), done), 3),
            "first_step_seconds": first.seconds,
            "compile_seconds": round(program.compile_seconds, 3),
            "peak_memory_bytes": metrics.peak_memory_bytes(),
            "skipped_steps": int(state.skipped),
            **_heldout(record.read(directory / "metrics.jsonl")),
            **_parameters(parts),
            "checkpoint_error": saver.last_error,
        }
        _write_atomically(directory / "summary.json", json.dumps(summary, indent=1) + "\n")
        show.close()
        show.say(_closing(summary, directory))
    return Outcome(summary, stop.signal)


class _FirstStep:
    """Measures the time from the program's start to the end of its first step."""

    def __init__(self, program_started: float):
        self._started = program_started
        self.seconds: float | None = None

    def before(self, step: int, state: state_lib.State) -> None:
        if self.seconds is None and self._began:
            jax.block_until_ready(state)
            self.seconds = round(time.time() - self._started, 3)
        self._began = True

    _began = False

    def after(self, step: int, report: object) -> None:
        """Nothing."""


def _metrics(parts: build.Parts, sink: record.Sink, show: progress.Progress, *, seconds_before: float) -> metrics.Metrics:
    recipe = parts.recipe
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    return metrics.Metrics(
        sink,
        sources=parts.data.sources,
        layers=metrics.layer_names(recipe.model),
        tokens_per_step=parts.data.tokens_per_step,
        learning_rate=lambda step: float(schedule.learning_rate(recipe.optimizer.schedule, step=step, total_steps=recipe.train.steps)),
        flops_per_token=flops.training(recipe.model, length=recipe.data.sequence_length).total,
        peak_flops=None if peak is None else peak * parts.mesh.size,
        experts_every=recipe.train.experts_every,
        seconds_before=seconds_before,
        on_skip=lambda step, norm: show.say(f"step {step}: the gradients are not finite (norm {norm}); the step changed nothing"),
    )


@contextlib.contextmanager
def _sinks(directory: pathlib.Path, *, recipe: recipe_lib.Recipe, start: int) -> Iterator[tuple[record.Sink, progress.Progress]]:
    lines = record.JsonLines(directory / "metrics.jsonl")
    board = record.TensorBoard(directory / "tensorboard", start=start)
    show = progress.Progress(steps=recipe.train.steps, start=start, log_every=recipe.train.log_every)
    try:
        yield record.to_all([lines, board, show]), show
    finally:
        show.close()
        board.close()
        lines.close()


def _check_same(saved: dict[str, Any], current: dict[str, Any], directory: pathlib.Path) -> None:
    remedy = f"Continue with the settings of {directory / 'recipe.yaml'}, or train in another directory (train.run_directory)."
    try:
        restore.check_recipe(saved["recipe"], current["recipe"], ignore=MAY_CHANGE)
    except ValueError as e:
        raise ValueError(f"{directory} holds checkpoints of another recipe: {e}\n{remedy}") from None
    if saved["data"] != current["data"]:
        raise ValueError(f"{directory}: the data stores are not those that this run was trained on so far. {remedy}")


def _write_recipe(directory: pathlib.Path, loaded: load.Loaded[recipe_lib.Recipe]) -> None:
    overrides = "".join(f"# --set {text}\n" for text in loaded.overrides)
    header = f"# resolved recipe, sha256 {dump.digest(loaded.config)}\n{overrides}"
    _write_atomically(directory / "recipe.yaml", header + dump.yaml_text(loaded.config))
    _write_atomically(directory / "recipe.json", dump.canonical_json(loaded.config) + "\n")


def _write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _seconds_at(records: list[record.Record], step: int) -> float:
    return max((r["seconds"] for r in records if r["kind"] == "train" and r["step"] <= step), default=0.0)


def _heldout(records: list[record.Record]) -> dict[str, dict[str, float]]:
    evaluations = [r for r in records if r["kind"] == "eval"]
    losses = [{k.removeprefix("loss/"): v for k, v in r.items() if k.startswith("loss/")} for r in evaluations]
    return {"heldout_first": losses[0], "heldout_last": losses[-1]} if losses else {"heldout_first": {}, "heldout_last": {}}


def _parameters(parts: build.Parts) -> dict[str, int]:
    counted = count.parameters(parts.declarations, top_k=parts.recipe.model.moe.top_k)
    return {"parameters_total": counted.total, "parameters_active": counted.active}


def _headline(parts: build.Parts) -> str:
    r, counted = parts.recipe, count.parameters(parts.declarations, top_k=parts.recipe.model.moe.top_k)
    axes = " x ".join(f"{name} {size}" for name, size in r.mesh.sizes.items() if size > 1) or "one device"
    kind = jax.devices()[0].device_kind
    return (
        f"{r.name}: {counted.total:,} parameters ({counted.active:,} active per token), {r.model.depth} layers; "
        f"mesh {axes} on {parts.mesh.size} {'emulated ' if r.mesh.emulate_devices else ''}{kind} device(s); "
        f"{r.train.steps} steps of {parts.data.tokens_per_step:,} tokens; run directory {r.run_directory}"
    )


def _closing(s: dict[str, Any], directory: pathlib.Path) -> str:
    heldout = "; ".join(
        f"{name} {first:.3f} -> {s['heldout_last'][name]:.3f}" for name, first in s["heldout_first"].items() if name in s["heldout_last"]
    )
    lines = [
        f"{s['status']} after {s['steps']} steps, {s['tokens']:,} tokens, {progress.duration(s['seconds'])} of training"
        + (f" (first step {s['first_step_seconds']:.1f}s after the start)" if s["first_step_seconds"] else ""),
        f"held-out loss: {heldout}" if heldout else "",
        f"peak memory {s['peak_memory_bytes'] / 2**30:.2f} GiB; results in {directory}; look at them: v4train report {directory}",
        f"WARNING: the last checkpoint could not be saved: {s['checkpoint_error']}" if s["checkpoint_error"] else "",
    ]
    return "\n".join(line for line in lines if line)
