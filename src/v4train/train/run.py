"""A run from its directory: resume or begin, train, save, summarise.

Among several processes all of them run all of this, because a restore, a step, an evaluation and a save are work of all. Only the first
one locks the directory, speaks, and writes anything but its part of the checkpoints and its own quarantine file.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from v4train import recipe as recipe_lib
from v4train.checkpoint import hosts, restore, run_lock
from v4train.checkpoint import manager as manager_lib
from v4train.config import dump, load
from v4train.core import hardware
from v4train.data import history
from v4train.model import count, flops
from v4train.optim import schedule
from v4train.train import build, cluster, initial, loop, resilience, watchdog
from v4train.train import guard as guard_lib
from v4train.train import stages as stages_lib
from v4train.train import state as state_lib
from v4train.train import summary as summary_lib
from v4train.train.hooks import checkpoints, evaluation, first_step, metrics, phases, progress, quarantine, record

METRICS = "metrics.jsonl"

# A resumed run may differ in these: they do not change what a step computes from a state and a batch.
MAY_CHANGE = (
    "name",
    "mesh",
    "train.steps",
    "train.microbatches",
    "train.stages",  # what of them must be as it was, their history says
    "train.microbatches",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.evals",
    "train.experts_every",
    "train.run_directory",
    "train.grace_seconds",
    "train.stall_seconds",
    "train.guard",
    "train.skip_nonfinite",
    "checkpoint",
    "cluster",
    "decode",
    "data",  # what of it must be as it was, the history of the data says
    "model.remat",
    "model.attention.chunk",
    "model.loss_chunk",
    "model.moe.exchange.transport",
    "model.moe.exchange.capacity",
    "model.moe.exchange.waves",
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


def run(loaded: load.Loaded[recipe_lib.Recipe], *, program_started: float, describe: cluster.Describe = lambda _: None) -> Outcome:
    """Trains a recipe to its end, from the newest good checkpoint in its run directory if there is one.

    Args:
        loaded: the recipe.
        program_started: `time.time` when the program began, for the time to the first step.
        describe: how to tell an exception that ends the processes of a cluster.

    Raises:
        ValueError: anything that the user can mend: devices, data, another recipe's checkpoints, a directory in use or not writable.
    """
    recipe = loaded.config
    directory = pathlib.Path(recipe.run_directory)
    with (
        cluster.join(recipe, describe=describe) as processes,
        _locked(directory) if processes.first else contextlib.nullcontext(),
        resilience.stop_on_signals(grace_seconds=recipe.train.grace_seconds) as stop,
    ):
        processes.check_shared(directory)
        parts = build.parts(recipe)
        with manager_lib.Manager(directory / "checkpoints", config=recipe.checkpoint) as saver:
            any_steps = hosts.from_first(saver.steps())
            found = restore.describe(directory / "checkpoints", verify=recipe.checkpoint.verify) if any_steps else None
            metadata = {"recipe": dump.values(_portable(recipe)), "seed": recipe.seed, "tokenizer": parts.data.tokenizer.fingerprint}
            if found is not None:
                initial.check_is_run(found.metadata, directory)
                _check_same(found.metadata, metadata, parts, step=found.step, directory=directory)
                parts.data.remember(found.metadata.get("milestones", {}))
                if (summary := _nothing_to_do(recipe, directory, step=found.step, tell=processes.first)) is not None:
                    return Outcome(summary, None)
            if processes.first:
                _write_recipe(directory, loaded)
            processes.follow(stop, started=0 if found is None else found.step)
            dog = watchdog.Watchdog(recipe.train.stall_seconds)
            with processes.watching(dog):
                told = {"stop": stop, "processes": processes, "dog": dog, "program_started": program_started}
                return _train(parts, directory, saver, found, metadata, **told)


def _locked(directory: pathlib.Path) -> run_lock.RunLock:
    try:
        return run_lock.RunLock(directory)
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else str(e)
        raise ValueError(f"train.run_directory: {directory} cannot be written ({reason}); choose another directory") from None


def _nothing_to_do(recipe: recipe_lib.Recipe, directory: pathlib.Path, *, step: int, tell: bool) -> dict[str, Any] | None:
    """The summary, if the run is finished with everything that belongs to it; says so, if it is to ``tell``."""
    remedy = "To train longer raise train.steps; to begin anew use another train.run_directory."
    if step > recipe.train.steps:
        raise ValueError(f"train.steps: {recipe.train.steps}, but {directory} has already done {step} steps. {remedy}")
    summary = summary_lib.finished(directory, steps=recipe.train.steps) if step == recipe.train.steps else None
    if not hosts.from_first([int(summary is not None)])[0]:
        return None
    if summary is not None and tell:
        print(f"nothing to do: {directory} is finished.\n{summary_lib.closing(summary, directory)}\n{remedy}")
    return summary or {}


def _train(
    parts: build.Parts,
    directory: pathlib.Path,
    saver: manager_lib.Manager,
    found: restore.Description | None,
    metadata: dict[str, Any],
    *,
    stop: resilience.Stop,
    processes: cluster.Cluster,
    dog: watchdog.Watchdog,
    program_started: float,
) -> Outcome:
    recipe, start = parts.recipe, 0 if found is None else found.step
    earlier = record.read(directory / METRICS)
    with _sinks(directory, recipe=recipe, start=start) if processes.first else _silence() as (sink, show):
        show.say(_headline(parts))
        asked = evaluation.prepare(parts)  # before anything is compiled: its files may be wrong
        program = build.compile_program(parts, first_step=min(start, recipe.train.steps - 1))
        dog.at("restore", start)
        state = _state(parts, directory, found, show)
        seconds_before = summary_lib.seconds_at(earlier, start)
        measured = _metrics(parts, sink, show, seconds_before=seconds_before, skipped_before=int(state.skipped))
        described = {"config": recipe.checkpoint, "metadata": lambda step: _describe(parts, metadata, step) | {"guard": guard.state()}}
        saves = checkpoints.Checkpoints(saver, **described, start=start, end=recipe.train.steps)
        first = first_step.FirstStep(program_started=program_started, start=start)
        own = quarantine.path(directory, host=jax.process_index())
        bad = quarantine.BadRecords(parts.data.quarantine, path=own, sources=parts.data.sources, config=recipe.data)
        # Saved first: an evaluation must not use up the time that a stopped run has left.
        evaluates = evaluation.Evaluation(parts, program, sink, asked=asked, done=measured.leave_out)
        compiles = phases.Changes(parts, program, sink, say=show.say, done=measured.leave_out)
        timed = [dog.over("save", saves), dog.over("evaluation", evaluates), dog.over("compilation", compiles, timed=False)]
        hooks = [*timed, first, measured, phases.Amounts(parts, sink), bad]
        told = {"sink": sink, "say": show.say, "done": measured.leave_out}
        guard = _guard(parts, found, reads=lambda step: recipe.checkpoint.is_due(step) or evaluates.is_due(step), **told)
        measured.begin()
        ended = lambda done: _complaint(bad, guard, directory) is not None or not processes.may_go(done)  # noqa: E731
        state, done = loop.run(parts, program, state, start=start, hooks=hooks, stop=ended, guard=guard, at=dog.at)
        dog.at("save", done)
        saves.last(done, state)
        dog.at("end", done)
        bad.write()
        hosts.barrier("run/saved")
        measurements = {
            "first_step_seconds": first.seconds,
            "compile_seconds": round(program.compile_seconds, 3),
            "skipped_steps": int(state.skipped),
            "skipped_batches": guard_lib.skipped_batches(guard.rollbacks),
            "rollbacks": guard.rollbacks,
            "bad_records": quarantine.count(directory),
            "checkpoint_error": saver.last_error,
        }
        summary = _summary(parts, directory, done=done) | measurements
        if processes.first:
            summary_lib.write(directory, summary)
        show.close()
        show.say(summary_lib.closing(summary, directory))
    if (complaint := _complaint(bad, guard, directory)) is not None and done < recipe.train.steps:
        raise ValueError(f"{complaint} The run is saved at step {done}; the same command goes on from there.")
    return Outcome(summary, stop.signal)


def _complaint(bad: quarantine.BadRecords, guard: guard_lib.Guard, directory: pathlib.Path) -> str | None:
    """Why the run must not go on, with the remedy; None if it may."""
    if bad.too_many is not None:
        return (
            f"{bad.too_many}. {quarantine.named(directory)} names the documents. Mend the store, give the source weight 0 in a new phase "
            "(data.phases), or raise data.max_bad_share."
        )
    return guard.exceeded


def _guard(parts: build.Parts, found: restore.Description | None, **watched: Any) -> guard_lib.Guard:
    """With what it remembers from the process before."""
    computed = {
        "level": lambda step: repr(tuple(parts.variant_at(step))),
        "objective": lambda step: str(parts.variant_at(step).stage.attention),
    }
    guard = guard_lib.Guard(parts.recipe.train.guard, **computed, **watched)
    if found is not None and "guard" in found.metadata:
        guard.restore(found.metadata["guard"])
    return guard


def _summary(parts: build.Parts, directory: pathlib.Path, *, done: int) -> dict[str, Any]:
    """How far the run has come, over all its processes."""
    records, last = record.read(directory / METRICS), max(done - 1, 0)
    return {
        "status": "finished" if done == parts.recipe.train.steps else "stopped",
        "steps": done,
        "tokens": parts.data.phases.places_before(done),
        "seconds": round(summary_lib.seconds_at(records, done), 3),
        "peak_memory_bytes": metrics.peak_memory_bytes(),
        "data": {name: amount._asdict() for name, amount in parts.data.amounts(done).items()},
        "fill": {name: round(share, 4) for name, share in parts.data.fill(last).items()},
        **summary_lib.heldout(records),
        **_parameters(parts),
    }


def _state(parts: build.Parts, directory: pathlib.Path, found: restore.Description | None, show: progress.Progress) -> state_lib.State:
    if found is None:
        if parts.recipe.init_from is None:
            return build.first_state(parts)
        begun = initial.load(parts, source=parts.recipe.init_from, draws=parts.recipe.init_draws)
        show.say(begun.told)
        return begun.state
    where = directory / "checkpoints"
    for step, damage in found.skipped:
        show.say(f"the checkpoint of step {step} is damaged and not used: {damage}")
    # Its digests were compared when it was found.
    state = restore.restore(where, template=parts.state, step=found.step, verify=False).state
    show.say(f"resumed from step {found.step} in {where}")
    return state


def _metrics(
    parts: build.Parts, sink: record.Sink, show: progress.Progress, *, seconds_before: float, skipped_before: int
) -> metrics.Metrics:
    recipe = parts.recipe
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    credited = functools.cache(lambda stage, length: flops.training(stage.model(recipe.model), length=length).total)
    return metrics.Metrics(
        sink,
        sources=parts.data.sources,
        layers=metrics.layer_names(recipe.model),
        tokens=parts.data.phases.places_before,
        learning_rate=lambda step: float(schedule.learning_rate(recipe.optimizer.schedule, step=step, total_steps=recipe.train.steps)),
        flops_per_token=lambda step: credited(parts.stages.at(step), parts.phases.at(step).shape.sequence_length),
        peak_flops=None if peak is None else peak * parts.mesh.size,
        experts_every=recipe.train.experts_every,
        seconds_before=seconds_before,
        skipped_before=skipped_before,
        on_skip=lambda step, norm: show.say(f"step {step}: the gradients are not finite (norm {norm}); the step changed nothing"),
    )


@contextlib.contextmanager
def _silence() -> Iterator[tuple[record.Sink, progress.Progress]]:
    """What the processes have that neither write nor speak."""
    yield (lambda _: None), progress.Silent()


@contextlib.contextmanager
def _sinks(directory: pathlib.Path, *, recipe: recipe_lib.Recipe, start: int) -> Iterator[tuple[record.Sink, progress.Progress]]:
    lines = record.JsonLines(directory / METRICS)
    board = record.TensorBoard(directory / "tensorboard", start=start)
    show = progress.Progress(steps=recipe.train.steps, start=start, log_every=recipe.train.log_every)
    try:
        yield record.to_all([lines, board, show]), show
    finally:
        show.close()
        board.close()
        lines.close()


def _describe(parts: build.Parts, metadata: dict[str, Any], step: int) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    data = parts.data
    past = {"data": data.fingerprint_before(step), "history": data.history(step), "stages": parts.stages.history(step)}
    return {**metadata, **past, "milestones": data.milestones(step)}


def _check_same(saved: dict[str, Any], current: dict[str, Any], parts: build.Parts, *, step: int, directory: pathlib.Path) -> None:
    """Refuses a checkpoint of another model or optimizer, or one whose data or stages were others than this recipe's up to its step."""
    remedy = f"Continue with the settings of {directory / 'recipe.yaml'}, or train in another directory (train.run_directory)."
    try:
        restore.check_recipe(saved["recipe"], current["recipe"], ignore=MAY_CHANGE)
    except ValueError as e:
        raise ValueError(f"{directory} holds checkpoints of another recipe: {e}\n{remedy}") from None
    if saved.get("tokenizer", current["tokenizer"]) != current["tokenizer"]:
        raise ValueError(f"{directory} was trained with another tokenizer (data.tokenizer). {remedy}")
    if "history" not in saved:
        raise ValueError(f"{directory} is of an older version, which does not say what data it has read. {remedy}")
    if lines := history.differences(saved["history"], parts.data.history(step)):
        listed = "\n".join(f"  {line}" for line in lines)
        change = "What comes later may change: append to data.phases."
        raise ValueError(f"{directory}: the data are not those that this run was trained on so far:\n{listed}\n{change} {remedy}")
    before = saved.get("stages", stages_lib.unchanging(parts.recipe.model, step=step))
    if lines := stages_lib.differences(before, parts.stages.history(step)):
        listed = "\n".join(f"  {line}" for line in lines)
        change = "What comes later may change: append to train.stages."
        raise ValueError(f"{directory}: the stages are not those that this run has gone through so far:\n{listed}\n{change} {remedy}")


def _write_recipe(directory: pathlib.Path, loaded: load.Loaded[recipe_lib.Recipe]) -> None:
    recipe = _portable(loaded.config)
    overrides = "".join(f"# --set {text}\n" for text in loaded.overrides if not text.startswith("cluster."))
    header = f"# resolved recipe, sha256 {dump.digest(recipe)}\n{overrides}"
    summary_lib.write_atomically(directory / "recipe.yaml", header + dump.yaml_text(recipe))
    summary_lib.write_atomically(directory / "recipe.json", dump.canonical_json(recipe) + "\n")


def _portable(recipe: recipe_lib.Recipe) -> recipe_lib.Recipe:
    """Without this process's place: who trains the written recipe again says anew where."""
    place = {"coordinator": None, "processes": None, "process": None}
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=place)})


def _parameters(parts: build.Parts) -> dict[str, int]:
    counted = count.parameters(parts.declarations, top_k=parts.recipe.model.moe.top_k)
    return {"parameters_total": counted.total, "parameters_active": counted.active}


def _headline(parts: build.Parts) -> str:
    r, counted = parts.recipe, count.parameters(parts.declarations, top_k=parts.recipe.model.moe.top_k)
    axes = " x ".join(f"{name} {size}" for name, size in r.mesh.sizes.items() if size > 1) or "one device"
    kind = jax.devices()[0].device_kind
    return (
        f"{r.name}: {counted.total:,} parameters ({counted.active:,} active per token), {r.model.depth} layers; "
        f"mesh {axes} on {parts.mesh.size} {'emulated ' if r.mesh.emulate_devices else ''}{kind} device(s){_of_processes()}; "
        f"{r.train.steps} steps of {parts.data.tokens_per_step:,} tokens; run directory {r.run_directory}"
    )


def _of_processes() -> str:
    return f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
