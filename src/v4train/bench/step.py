"""How fast a recipe trains: its own data, its own routing, the trainer's own compiled step.

Everything comes from `train.build`, so what is measured is what `v4train train` runs; only hooks and checkpoints are missing. A batch is
on the devices before its step's clock starts, and the clock stops when state and report are ready: ``step_seconds`` is the device's time
plus one dispatch. ``batch_seconds`` is what the loop would wait for data beside that (the trainer overlaps the two). The median is
reported, because one slow step (another process, a page fault) says nothing about the program. After the last step the optimizer's update
is run alone (`update`), for its share of a step.

MFU credits attention sparsely (`model.flops`). What the same shape would be credited with dense attention stands apart and enters no
other figure: a sparse model that claims it looks several times faster than it is.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from v4train import recipe as recipe_lib
from v4train.bench import machine, update
from v4train.config import dump, load
from v4train.core import hardware
from v4train.model import count, flops
from v4train.train import build
from v4train.train.hooks import metrics


@dataclasses.dataclass(frozen=True)
class _Timed:
    """Seconds of each measured step, and of the wait for each batch; what the last report said; when the first step ended; the state."""

    steps: list[float]
    batches: list[float]
    report: Any
    first_step_ended: float
    state: Any


def measure(
    loaded: load.Loaded[recipe_lib.Recipe],
    *,
    steps: int,
    warmup: int,
    program_started: float,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Trains a few steps and says how long they took.

    Args:
        loaded: the recipe.
        steps: steps that are measured.
        warmup: steps before those.
        program_started: `time.time` when the program began, for the time to the end of the first step.
        say: where progress goes.

    Returns:
        The result, ready for `json.dumps`: tokens_per_second and step_seconds first of all. FLOPs are per token, memory in bytes.

    Raises:
        ValueError: steps or warmup out of range; devices or data that the recipe asks for are missing.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}: at least one step must be measured")
    if warmup < 0:
        raise ValueError(f"--warmup {warmup}: give 0 or more")
    recipe, load_before = loaded.config, machine.load_average()
    parts = build.parts(recipe)
    say(f"{recipe.name}: compiling for {parts.mesh.size} {jax.devices()[0].device_kind} device(s)")
    program = build.compile_program(parts)
    say(f"compiled in {program.compile_seconds:.1f} s; {warmup} + {steps} steps of {parts.data.tokens_per_step:,} tokens")
    timed = _time_steps(parts, program, steps=steps, warmup=warmup, say=say)
    rate, peak = parts.data.tokens_per_step / statistics.median(timed.steps), metrics.peak_memory_bytes()
    return {
        "bench": "step",
        "recipe": recipe.name,
        "recipe_sha256": dump.digest(recipe),
        "overrides": list(loaded.overrides),
        **machine.describe(devices=parts.mesh.size),
        "emulated": recipe.mesh.emulate_devices is not None,
        "mesh": recipe.mesh.sizes,
        "sequence_length": recipe.data.sequence_length,
        "batch_rows": recipe.train.batch_rows,
        "tokens_per_step": parts.data.tokens_per_step,
        "warmup_steps": warmup,
        "measured_steps": steps,
        "tokens_per_second": round(rate, 3),
        "step_seconds": _spread(timed.steps),
        "batch_seconds": _spread(timed.batches),
        "compile_seconds": round(program.compile_seconds, 3),
        "first_step_seconds": round(timed.first_step_ended - program_started, 3),
        **_work(recipe, rate=rate, devices=parts.mesh.size),
        "peak_memory_bytes": peak,
        "compiled_memory": machine.compiled_memory(next(iter(program.steps.values()))),
        "optimizer": update.measure(parts, timed.state, repeats=steps, step_seconds=statistics.median(timed.steps)),
        "parameters": _parameters(parts),
        "loss": float(timed.report.loss),
        "finite": bool(timed.report.finite),
        "busiest_expert": round(float((timed.report.load.max(axis=-1) / timed.report.load.mean(axis=-1).clip(1e-9)).max()), 4),
        "load_average": {"before": load_before, "after": machine.load_average()},
    }


def _time_steps(parts: build.Parts, program: build.Program, *, steps: int, warmup: int, say: Callable[[str], None]) -> _Timed:
    state, batches = build.first_state(parts), parts.data.iterate(0)
    seconds, waits, first_step_ended = [], [], 0.0
    report = None
    for i in range(warmup + steps):
        drawn = time.perf_counter()
        batch = jax.block_until_ready(parts.place(next(batches)))
        started = time.perf_counter()
        state, report = jax.block_until_ready(program.step(state, batch, variant=parts.variant_at(i)))
        ended = time.perf_counter()
        if i == 0:
            first_step_ended = time.time()
        if i >= warmup:
            waits.append(started - drawn)
            seconds.append(ended - started)
        say(f"step {i + 1}{' (warm-up)' if i < warmup else ''}: {ended - started:.3f} s")
    return _Timed(seconds, waits, jax.device_get(report), first_step_ended, state)


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 6), "min": round(min(seconds), 6), "max": round(max(seconds), 6)}


def _work(recipe: recipe_lib.Recipe, *, rate: float, devices: int) -> dict[str, Any]:
    """Arithmetic per token, and its share of the chips' peak."""
    length = recipe.data.sequence_length
    sparse, once = flops.training(recipe.model, length=length), flops.forward(recipe.model, length=length)
    dense = sparse.total + 3 * (flops.dense_attention(recipe.model, length=length) - once.attention - once.indexer)
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    return {
        "model_flops_per_token": sparse.total,
        "model_flops_parts": dataclasses.asdict(sparse),
        "model_flops_per_second": rate * sparse.total,
        "peak_flops_per_second": None if peak is None else peak * devices,
        "mfu": None if peak is None else rate * sparse.total / (peak * devices),
        "dense_credit_flops_per_token": dense,
    }


def _parameters(parts: build.Parts) -> dict[str, int]:
    counted = count.parameters(parts.declarations, top_k=parts.recipe.model.moe.top_k)
    return {"total": counted.total, "active": counted.active, "mtp": counted.mtp}
