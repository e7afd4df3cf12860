"""What a step costs per token as rows get longer, and what compiling costs as models get deeper.

*Lengths*: the tokens of a step stay the same and its rows get longer and fewer, so that everything that depends on the number of tokens
alone (experts, projections, head, optimizer) costs the same in all of them. What grows is attention, and by how much it should is known
from `model.flops`: index scores grow with the length, everything else of sparse attention levels off. ``time_over_flops`` divides the
measured growth of the time per token by the predicted growth of the FLOPs per token: 1 means that time follows arithmetic, and something
quadratic, or a sort over all entries, shows as a figure that climbs. ``cpu_over_flops`` does the same with the seconds that the process had
a core: on a machine that others use too, those are what the work costs, and the others are how long it had to wait.

*Depths*: equal layers are scanned, so a deep model has hardly more program than a shallow one.

Each length runs in a fresh process (`bench.one_length`); this one starts no device for them.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from v4train import recipe as recipe_lib
from v4train.bench import memory
from v4train.config import dump
from v4train.core import compiler
from v4train.model import flops


def measure_lengths(path: str, *, lengths: Sequence[int], tokens: int | None, steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Times steps of ``tokens`` tokens at every length of row.

    Args:
        path: a recipe for one device; rows and lengths are replaced and its data are not read.
        lengths: tokens of a row, ascending.
        tokens: of a step; None: those of one row of the longest.
        steps: measured per length, after one that is not.
        overrides: ``a.b=c`` texts.

    Returns:
        The result, ready for `json.dumps`. ``growth`` is relative to the shortest rows.

    Raises:
        ValueError: lengths that do not divide the tokens, a recipe that does not fit, or a process that failed.
    """
    tokens = tokens or lengths[-1]
    wrong = [length for length in lengths if tokens % length]
    if wrong:
        raise ValueError(f"--tokens {tokens}: rows of {wrong[0]} tokens do not divide it; give a common multiple of the lengths")
    if steps < 1:
        raise ValueError(f"--steps {steps}: at least one step must be measured")
    rows, recipe = [], None
    for length in lengths:
        texts = [*overrides, f"data.sequence_length={length}", f"train.batch_rows={tokens // length}"]
        recipe = recipe_lib.resolve(path, overrides=texts).config
        result = memory.run(path, texts, length=length, steps=steps + 1)
        seconds, cpu_seconds = (result["measured"][name][1:] for name in ("step_seconds", "step_cpu_seconds"))
        rows.append(
            {
                "length": length,
                "batch_rows": tokens // length,
                "step_seconds": seconds,
                "step_cpu_seconds": cpu_seconds,
                "seconds_per_token": statistics.median(seconds) / tokens,
                "cpu_seconds_per_token": statistics.median(cpu_seconds) / tokens,
                "model_flops_per_token": flops.training(recipe.model, length=length).total,
                "compile_seconds": result["measured"]["compile_seconds"],
            }
        )
        common = {name: value for name, value in result.items() if name != "measured"}
    assert recipe is not None
    growth = [_growth(rows[0], row) for row in rows[1:]]
    return {"bench": "step_lengths", "recipe": recipe.name, "tokens_per_step": tokens, **common, "lengths": rows, "growth": growth}


def _growth(first: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    time_ratio, cpu_ratio = (row[name] / max(first[name], 1e-12) for name in ("seconds_per_token", "cpu_seconds_per_token"))
    flops_ratio = row["model_flops_per_token"] / first["model_flops_per_token"]
    ratios = {"time_per_token": time_ratio, "cpu_per_token": cpu_ratio, "flops_per_token": flops_ratio}
    ratios |= {"time_over_flops": time_ratio / flops_ratio, "cpu_over_flops": cpu_ratio / flops_ratio}
    return {"length": row["length"], **{name: round(ratio, 4) for name, ratio in ratios.items()}}


def measure_depths(path: str, *, depths: Sequence[int], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compiles the training step of the recipe's model at several depths; nothing is run and no data are read.

    Args:
        path: a recipe; its sequence of layers is cut, or its last run repeated.
        depths: numbers of layers.
        overrides: ``a.b=c`` texts.

    Returns:
        The result, ready for `json.dumps`. ``growth`` is relative to the first depth.

    Raises:
        ValueError: a recipe that does not fit.
    """
    from v4train.sharding import mesh as mesh_lib
    from v4train.train import build

    base, rows = recipe_lib.resolve(path, overrides=overrides).config, []
    mesh = mesh_lib.make(base.mesh)
    for depth in depths:
        layers = json.dumps([{"pattern": list(layers_of(base, depth=depth))}])
        parts = build.abstract(recipe_lib.resolve(path, overrides=[*overrides, f"model.layers={layers}"]).config, mesh=mesh)
        started = time.perf_counter()
        lowered = build.lower_step(parts, parts.variant_at(0))
        traced = time.perf_counter()
        lowered.compile(compiler.options())
        ended = time.perf_counter()
        rows.append({"depth": depth, "trace_seconds": round(traced - started, 3), "compile_seconds": round(ended - traced, 3)})
        print(f"{depth} layers: traced in {traced - started:.1f} s, compiled in {ended - traced:.1f} s", file=sys.stderr)
    total = [row["trace_seconds"] + row["compile_seconds"] for row in rows]
    growth = [{"depth": row["depth"], "time": round(t / max(total[0], 1e-9), 4)} for row, t in zip(rows[1:], total[1:], strict=True)]
    return {"bench": "step_depths", "recipe": base.name, "recipe_sha256": dump.digest(base), "depths": rows, "growth": growth}


def parse_depths(text: str) -> tuple[int, ...]:
    """``"8,61"`` -> the depths.

    Raises:
        ValueError: not positive whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--depths {text}: give numbers of layers above 0, separated by commas, for example 8,61")
    return tuple(map(int, words))


def layers_of(recipe: recipe_lib.Recipe, *, depth: int) -> tuple[str, ...]:
    """Attention kinds of a model of this depth: the recipe's layers, cut, or its last run again and again."""
    kinds = list(recipe.model.layer_kinds)
    while len(kinds) < depth:
        kinds += recipe.model.layers[-1].pattern
    return tuple(kinds[:depth])
