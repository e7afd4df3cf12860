"""The training loop: a list of acts.

Before a step, hooks may read the state that the step will consume (evaluate it, save it together with its data position, which is its step
count). Then the batch is drawn and the step is started; while the devices work, the *previous* step's report goes to the hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax

from v4train.data import batch as batch_lib
from v4train.train import build
from v4train.train import state as state_lib
from v4train.train import step as step_lib


class Hook(Protocol):
    """Something that watches a run. It never changes the state."""

    def before(self, step: int, state: state_lib.State) -> None:
        """``step`` steps are done and the next one has not begun. Called once more after the last step of the run, not
        where a run is only interrupted: the process that goes on from there calls it."""
        ...

    def after(self, step: int, report: step_lib.Report) -> None:
        """The report, on the host, of the step that made ``step`` steps done."""
        ...


def run(
    parts: build.Parts,
    program: build.Program,
    state: state_lib.State,
    *,
    start: int,
    hooks: Sequence[Hook],
    stop: Callable[[int], bool],
    at: Callable[[str, int], None] = lambda section, step: None,
) -> tuple[state_lib.State, int]:
    """Trains from ``start`` steps done to the end, or until ``stop``, asked with the steps done, says so; returns state and steps done.

    Among several processes, ``stop`` must say the same in all of them. ``at`` is told what comes now: data, or the step.
    """
    done, last = start, parts.recipe.train.steps
    batches: Iterator[batch_lib.Batch] = parts.data.iterate(start)
    report: step_lib.Report | None = None
    while done < last and not stop(done):
        for hook in hooks:
            hook.before(done, state)
        at("data", done + 1)
        batch = parts.place(next(batches))
        at("step", done + 1)
        state, new = program.step(state, batch, variant=parts.variant_at(done))
        if report is not None:
            _tell(hooks, done, report)
        report, done = new, done + 1
    if report is not None:
        at("step", done)
        _tell(hooks, done, report)
    if done == last:
        for hook in hooks:
            hook.before(done, state)
    return state, done


def _tell(hooks: Sequence[Hook], step: int, report: step_lib.Report) -> None:
    on_host = jax.device_get(report)
    for hook in hooks:
        hook.after(step, on_host)
