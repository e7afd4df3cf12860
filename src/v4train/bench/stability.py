"""What the guard against spikes is worth: faults of known kind at a known step, with and without it.

Every run is the trainer's own loop over the trainer's own step; only batches and, for the gradient, one line of the step differ:

- ``gradient``: the gradient of one batch times 10,000. The batch says so by its loss weights, which are 10,000 instead of 1: the loss
  divides by their sum and does not notice; `Amplified`, the step that is compiled here, multiplies its gradient by the largest of them.
- ``nan``: the loss weights of one batch are not numbers, nor are its loss and its gradient.

The recipe does not clip gradients. A clipped gradient of 10,000 times the size is a gradient of the wrong length 1, which hardly harms
anybody; what is to be shown is detection and recovery.

The fault is in batch ``at``, counted from 0, so its report is that of step ``at + 1``.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from v4train import recipe as recipe_lib
from v4train.bench import machine
from v4train.config import dump, load
from v4train.core import compiler
from v4train.data import batch as batch_lib
from v4train.sharding import constrain
from v4train.train import build, loop, precision
from v4train.train import config as train_config
from v4train.train import guard as guard_lib
from v4train.train import loss as loss_lib
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record

RECIPE = "configs/bench/stability.yaml"
AMPLIFICATION = 1e4
WITHIN = 0.01
"""Largest distance of a guarded run's final loss from the clean run's, as a share."""


class Amplified(step_lib.Step):
    """A step that multiplies the gradient by the largest loss weight of the batch, which is 1 in ordinary batches."""

    def gradients(
        self, state: state_lib.State, batch: batch_lib.Batch, given: dict | None, counts: loss_lib.Counts
    ) -> tuple[Array, loss_lib.Terms, dict, precision.Probes]:
        """As in every step, then amplified."""
        loss, sums, grads, probes = super().gradients(state, batch, given, counts)
        return loss, sums, jax.tree.map(lambda x: x * jnp.max(batch.loss_weight).astype(x.dtype), grads), probes


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        fault: ``gradient``, ``nan``, or None.
        guard: as in `train.guard`.
        skip_nonfinite: as in `train.skip_nonfinite`.
    """

    fault: str | None
    guard: train_config.GuardConfig | None
    skip_nonfinite: bool = True


class _Faulty:
    """The data of a run with one batch spoilt."""

    def __init__(self, data: Any, *, fault: str | None, at: int):
        self._data, self._fault, self._at = data, fault, at

    def iterate(self, start: int) -> Iterator[batch_lib.Batch]:
        for step, batch in enumerate(self._data.iterate(start), start):
            yield spoilt(batch, self._fault) if step == self._at else batch


def spoilt(batch: batch_lib.Batch, fault: str | None) -> batch_lib.Batch:
    """The batch with its fault."""
    weight = np.array(batch.loss_weight)
    if fault == "gradient":
        weight *= AMPLIFICATION
    elif fault == "nan":
        weight[:] = np.nan
    return dataclasses.replace(batch, loss_weight=weight)


def measure(
    loaded: load.Loaded[recipe_lib.Recipe], *, at: int, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
) -> dict[str, Any]:
    """Trains the recipe once for each case, and times anticipated steps beside usual ones.

    Args:
        loaded: the recipe; it must have a guard.
        at: the batch with the fault.
        say: where progress goes.

    Returns:
        The result, ready for `json.dumps`.

    Raises:
        ValueError: no guard in the recipe, or no such batch.
    """
    recipe, load_before = loaded.config, machine.load_average()
    guard = recipe.train.guard
    if guard is None:
        raise ValueError("train.guard is null: give the recipe a guard, or there is nothing to measure")
    if not 2 <= at < recipe.train.steps - 2:
        raise ValueError(f"--at {at}: the fault must be in a batch from 2 to {recipe.train.steps - 3} of the {recipe.train.steps}")
    anticipating = guard.model_copy(update={"anticipate": train_config.AnticipateConfig(lag=4, calm_steps=40)})
    cases = {
        "clean": Case(None, guard),
        "gradient, no guard": Case("gradient", None),
        "gradient, guard": Case("gradient", guard),
        "gradient, guard, then anticipated": Case("gradient", anticipating),
        "nan, neither guard nor skipping": Case("nan", None, skip_nonfinite=False),
        "nan, skipping": Case("nan", None),
        "nan, guard": Case("nan", guard),
    }
    runs = {}
    bench = _Bench(recipe, at=at)
    for name, case in cases.items():
        runs[name] = bench.run(case)
        say(f"{name}: held-out loss {runs[name]['final_loss']}, {runs[name]['seconds']} s, rollbacks {len(runs[name]['rollbacks'])}")
    return {
        "bench": "stability",
        "recipe": recipe.name,
        "recipe_sha256": dump.digest(recipe),
        "overrides": list(loaded.overrides),
        **machine.describe(devices=bench.parts.mesh.size),
        "steps": recipe.train.steps,
        "fault_in_batch": at,
        "amplification": AMPLIFICATION,
        "guard": guard.model_dump(),
        "runs": {name: run | _judged(run, runs["clean"], cases[name], at=at) for name, run in runs.items()},
        "anticipated_step": bench.anticipated_step(),
        "load_average": {"before": load_before, "after": machine.load_average()},
    }


class _Bench:
    """One recipe, compiled once for each way of treating what is not finite."""

    def __init__(self, recipe: recipe_lib.Recipe, *, at: int):
        self._at, self._recipe = at, recipe
        self.parts = build.parts(recipe)
        self._programs: dict[bool, build.Program] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Trains one case and evaluates it."""
        program, losses = self._program(case.skip_nonfinite), []
        told: list[record.Record] = []
        guard = guard_lib.Guard(case.guard, sink=told.append)
        parts = dataclasses.replace(self.parts, data=_Faulty(self.parts.data, fault=case.fault, at=self._at))
        started = time.perf_counter()
        hooks = [_Losses(losses)]
        state, _ = loop.run(parts, program, build.first_state(self.parts), start=0, hooks=hooks, stop=lambda done: False, guard=guard)
        return {
            "final_loss": _finite(self._heldout(program, state)),
            "rollbacks": guard.rollbacks,
            "anticipated": [r for r in told if r["kind"] == "anticipate"],
            "skipped_batches": guard_lib.skipped_batches(guard.rollbacks),
            "skipped_steps": int(state.skipped),
            "worst_loss_after": _finite(max(losses[self._at + 2 :])),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _heldout(self, program: build.Program, state: state_lib.State) -> float:
        """Nats per held-out target, all sources together."""
        parts, train = self.parts, self._recipe.train
        stage = parts.stages.at(train.steps - 1)
        options = {"batches": train.eval_batches, "batch_rows": train.batch_rows}
        batches = [parts.place(batch) for name in parts.data.sources for batch in parts.data.holdout_batches(name, **options)]
        sums = jax.device_get([program.evaluate(state, batch, stage=stage) for batch in batches])
        return sum(float(s.nats.sum()) for s in sums) / sum(float(s.targets.sum()) for s in sums)

    def anticipated_step(self, *, rounds: int = 30) -> dict[str, float]:
        """Seconds of a usual step and of one with anticipated routing (the choice for a later batch included), by turns."""
        program, variant = self._program(True), self.parts.variant_at(0)
        build.add_anticipation(program, self.parts, variant)
        state, batch = build.first_state(self.parts), self.parts.place(self.parts.data.batch(0))
        seconds: dict[str, list[float]] = {"usual": [], "anticipated": []}
        for _ in range(rounds):
            for kind, found in seconds.items():
                started = time.perf_counter()
                given = program.anticipate(state, batch, variant=variant) if kind == "anticipated" else None
                state, _ = jax.block_until_ready(program.step(state, batch, variant=variant, given=given))
                found.append(time.perf_counter() - started)
        usual, anticipated = (statistics.median(found[2:]) for found in seconds.values())
        return {"usual_seconds": round(usual, 5), "anticipated_seconds": round(anticipated, 5), "ratio": round(anticipated / usual, 3)}

    def _program(self, skip_nonfinite: bool) -> build.Program:
        if skip_nonfinite not in self._programs:
            train = self._recipe.train.model_copy(update={"skip_nonfinite": skip_nonfinite})
            parts = dataclasses.replace(self.parts, recipe=self._recipe.model_copy(update={"train": train}))
            variant, started = parts.variant_at(0), time.perf_counter()
            with constrain.on_mesh(parts.mesh):
                step = build.trace_step(parts, variant, step=Amplified).lower().compile(compiler.options())
            program = build.Program({variant: step}, {}, time.perf_counter() - started)
            build.add_evaluation(program, parts, variant.stage)
            self._programs[skip_nonfinite] = program
        return self._programs[skip_nonfinite]


class _Losses:
    """Keeps the loss of every step."""

    def __init__(self, found: list[float]):
        self._found = found

    def before(self, step: int, state: state_lib.State) -> None:
        pass

    def after(self, step: int, report: step_lib.Report) -> None:
        self._found.append(float(report.loss))


def _judged(run: dict[str, Any], clean: dict[str, Any], case: Case, *, at: int) -> dict[str, Any]:
    """How far the run ended from the clean one, and how late the fault was seen."""
    found = next(iter(run["rollbacks"]), None)
    loss = run["final_loss"]
    excess = None if loss is None else round(loss / clean["final_loss"] - 1, 5)
    guarded = case.fault is not None and case.guard is not None
    late = None if found is None else found["step"] - (at + 1)
    return {
        "excess_loss": excess,
        "detected_at_step": None if found is None else found["spike"],
        "further_steps_started": late,
        "passed": (excess is not None and abs(excess) <= WITHIN and late is not None and late <= 1) if guarded else None,
    }


def _finite(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['recipe']}: {result['steps']} steps, fault in batch {result['fault_in_batch']} (step {result['fault_in_batch'] + 1})",
        f"{'run':36} {'final loss':>10} {'to clean':>9} {'seen at':>8} {'back to':>8}  batches left out",
    ]
    for name, run in result["runs"].items():
        told = next(iter(run["rollbacks"]), None)
        loss = "not finite" if run["final_loss"] is None else f"{run['final_loss']:.4f}"
        excess = "" if run["excess_loss"] is None else f"{run['excess_loss']:+.2%}"
        back = ("", "", "none") if told is None else (told["spike"], told["snapshot"], f"{told['first_batch']} to {told['last_batch']}")
        lines.append(f"{name:36} {loss:>10} {excess:>9} {back[0]:>8} {back[1]:>8}  {back[2]}")
    step = result["anticipated_step"]
    lines.append(f"anticipated step: {step['anticipated_seconds']:.4f} s, usual {step['usual_seconds']:.4f} s, ratio {step['ratio']:.2f}")
    return "\n".join(lines)
