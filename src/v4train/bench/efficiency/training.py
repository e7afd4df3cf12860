"""The runs, each in a process of its own; what is finished stays in the directory and is not done again.

Compiled programs are kept in the directory too: seeds of an arm differ in nothing that is compiled, and compiling takes as long as a
third of a run.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from v4train import recipe as recipe_lib
from v4train.bench.efficiency import arms

SOURCE = "text"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        run: which.
        tokens: places in the rows of all steps, padding included.
        curve: (tokens, held-out loss in nats per token) from before the first step to after the last.
        seconds: from the first step to the last, evaluations included, what was compiled before them not.
        busiest: largest load of an expert at the end, relative to the mean, averaged over the layers.
    """

    run: arms.Run
    tokens: int
    curve: list[tuple[int, float]]
    seconds: float
    busiest: float

    @property
    def loss(self) -> float:
        """Held-out, at the end."""
        return self.curve[-1][1]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self.run), **{k: v for k, v in dataclasses.asdict(self).items() if k != "run"}, "loss": self.loss}


def resolve(run: arms.Run, directory: pathlib.Path, *, overrides: tuple[str, ...] = ()) -> recipe_lib.Recipe:
    """The recipe of a run that lives below a directory."""
    return recipe_lib.resolve(run.recipe, overrides=[*run.overrides(str(directory / run.name)), *overrides]).config


def finished(run: arms.Run, directory: pathlib.Path) -> Result | None:
    """What a finished run gave; None if it has not been finished."""
    where = directory / run.name
    try:
        summary = json.loads((where / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (summary.get("status"), summary.get("steps")) != ("finished", run.steps):
        return None
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = {r["tokens"]: r[f"loss/{SOURCE}"] for r in records if r["kind"] == "eval"}
    return Result(run, summary["tokens"], sorted(curve.items()), summary["seconds"], _busiest(records))


def train(runs: list[arms.Run], directory: pathlib.Path, *, say: Callable[[str], None], overrides: tuple[str, ...] = ()) -> list[Result]:
    """Does what is not finished, one run at a time.

    Args:
        overrides: ``a.b=c`` texts for every recipe.

    Raises:
        ValueError: a run failed; its own message has been printed.
    """
    results = []
    for number, run in enumerate(runs, 1):
        result = finished(run, directory)
        if result is None:
            say(f"{run.name} ({number} of {len(runs)})")
            started = time.perf_counter()
            _run(run, directory, overrides)
            result = finished(run, directory)
            if result is None:
                raise ValueError(f"{run.name} was stopped before its end; the same command goes on from there")
            say(f"{run.name}: held-out loss {result.loss:.4f} after {result.tokens:,} tokens, {time.perf_counter() - started:.0f} s")
        results.append(result)
    return results


def _run(run: arms.Run, directory: pathlib.Path, overrides: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "v4train.train", "--config", run.recipe]
    for text in (*run.overrides(str(directory / run.name)), *overrides):
        words += ["--set", text]
    programs = {"JAX_COMPILATION_CACHE_DIR": str(directory / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(words, stdout=sys.stderr, env={**os.environ, **programs}, check=False)
    if done.returncode:
        raise ValueError(f"{run.name} ended with exit code {done.returncode}; its own message stands above")


def _busiest(records: list[dict[str, Any]]) -> float:
    loads = [r["load"]["all"] for r in records if r["kind"] == "experts"]
    return round(sum(max(layer) for layer in loads[-1]) / len(loads[-1]), 3) if loads else float("nan")
