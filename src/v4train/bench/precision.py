"""The same training run in bf16, in FP8, and in FP8 with experts that are trained for FP4: what few bits cost in loss.

Each run is `v4train train` in a process of its own, with the same seed, data and order of batches; they differ in the keys of `numerics`
alone. Compared are the mean training loss of the last `LAST` steps and the held-out loss after the last step. A run's own noise is part of
the difference: ``yardstick`` trains bf16 once more, from other first values, which shows how far apart two runs are that differ in nothing
that matters.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from v4train import recipe as recipe_lib
from v4train.bench import machine
from v4train.config import dump
from v4train.train.hooks import record

RECIPE = "configs/bench/precision.yaml"
LAST = 50
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8": ("numerics.linear=fp8", "numerics.experts=fp8"),
    "fp8_mxfp4": ("numerics.linear=fp8", "numerics.experts=mxfp4"),
}
YARDSTICK = {"bf16_other_seed": ("seed=1",)}
LIMITS = {"fp8": 0.005, "fp8_mxfp4": 0.02}
"""The most that the final loss may differ from bf16, relative to it."""


def measure(path: str, *, directory: pathlib.Path | None, yardstick: bool, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains all variants and compares them.

    Args:
        path: the recipe; its numerics are bf16.
        directory: where the runs live; those that are finished there are read, and those that were stopped go on. None: a temporary one.
        yardstick: also train bf16 from other first values.
        overrides: ``a.b=c`` texts for all runs.

    Returns:
        The result, ready for `json.dumps`.

    Raises:
        ValueError: a recipe that does not fit, or a run that failed.
    """
    recipe = recipe_lib.resolve(path, overrides=overrides).config
    variants = VARIANTS | (YARDSTICK if yardstick else {})
    with tempfile.TemporaryDirectory(prefix="v4train-precision-") as made:
        where = {"steps": recipe.train.steps, "directory": directory or pathlib.Path(made)}
        runs = {name: _run(path, name, [*overrides, *variants[name]], **where) for name in variants}
    differences = {name: _difference(runs[name], runs["bf16"]) for name in runs if name != "bf16"}
    for name, limit in LIMITS.items():
        differences[name] |= {"limit": limit, "passed": abs(differences[name]["final_loss"]) <= limit}
    return {
        "bench": "precision",
        "recipe": recipe.name,
        "recipe_sha256": dump.digest(recipe),
        "overrides": list(overrides),
        **machine.describe(devices=1),
        "steps": recipe.train.steps,
        "tokens_per_step": recipe.tokens_per_step,
        "last_steps": LAST,
        "runs": runs,
        "relative_to_bf16": differences,
    }


def _run(path: str, name: str, overrides: Sequence[str], *, steps: int, directory: pathlib.Path) -> dict[str, Any]:
    records = record.read(directory / name / "metrics.jsonl")
    if any(r["kind"] == "eval" and r["step"] == steps for r in records):
        return summary(records)
    command = [sys.executable, "-m", "v4train.train", "--config", path, "--set", f"train.run_directory={directory / name}"]
    for text in overrides:
        command += ["--set", text]
    print(f"{name}: started", file=sys.stderr)
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ValueError(f"{name}: the run ended with exit code {done.returncode}; its own message stands above")
    return summary(record.read(directory / name / "metrics.jsonl"))


def summary(records: Sequence[record.Record]) -> dict[str, Any]:
    """A run's figures, from the records that it wrote.

    Raises:
        ValueError: it has no training or no evaluation behind it.
    """
    steps = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    if not steps or not held_out:
        raise ValueError("the run has written no training loss or no held-out loss; train a step and set data.holdout above 0")
    rounding = [name for name in steps[-1] if name.startswith(("saturated/", "vanished/"))]
    return {
        "final_loss": round(statistics.fmean(r["loss"] for r in steps[-LAST:]), 6),
        "held_out": {name: round(value, 6) for name, value in held_out[-1].items() if name.startswith("loss/")},
        "first_loss": round(steps[0]["loss"], 6),
        "skipped": steps[-1]["skipped"],
        "step_seconds": round(statistics.median(r["step_seconds"] for r in steps), 4),
        "rounding": {name: {"mean": statistics.fmean(r[name] for r in steps), "max": max(r[name] for r in steps)} for name in rounding},
        "curve": [[r["step"], round(r["loss"], 4)] for r in steps if r["step"] % 20 == 0],
    }


def _difference(run: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    held_out = {name: round(value / base["held_out"][name] - 1, 6) for name, value in run["held_out"].items()}
    return {"final_loss": round(run["final_loss"] / base["final_loss"] - 1, 6), "held_out": held_out}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    told = f"{result['steps']} steps of {result['tokens_per_step']:,} tokens"
    lines = [f"{told}; final loss is the mean of the last {result['last_steps']}", ""]
    lines.append(f"{'run':<18}{'final loss':>11}{'to bf16':>9}{'limit':>7}{'held out':>10}{'to bf16':>9}{'s/step':>8}")
    for name, run in result["runs"].items():
        apart = result["relative_to_bf16"].get(name, {})
        loss, held = (f"{100 * x:+.2f}%" if x is not None else "" for x in (apart.get("final_loss"), _first(apart.get("held_out"))))
        limit = f"{100 * apart['limit']:.1f}%" if "limit" in apart else ""
        verdict = "" if "passed" not in apart else "  passed" if apart["passed"] else "  missed"
        held_out = _first(run["held_out"])
        lines.append(
            f"{name:<18}{run['final_loss']:>11.4f}{loss:>9}{limit:>7}{held_out:>10.4f}{held:>9}{run['step_seconds']:>8.2f}{verdict}"
        )
    return "\n".join(lines)


def _first(by_name: dict[str, float] | None) -> float | None:
    return next(iter(by_name.values())) if by_name else None
