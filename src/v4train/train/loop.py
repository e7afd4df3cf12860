"""The training loop: a list of acts.

Before a step, hooks may read the state that the step will consume (evaluate it, save it together with its data position, which is its step
count). Then the batch is drawn and the step is started; while the devices work, the *previous* step's report goes to the hooks.

A guard, if there is one, hears every report after the hooks and is the only one that may give the loop another state.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax

from v4train.train import ahead, build
from v4train.train import guard as guard_lib
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
    guard: guard_lib.Guard = guard_lib.NONE,
    at: Callable[..., None] = lambda section, step, timed=True: None,
) -> tuple[state_lib.State, int]:
    """Trains from ``start`` steps done to the end, or until ``stop``, asked with the steps done, says so; returns state and steps done.

    Among several processes, ``stop`` must say the same in all of them. ``guard`` judges the reports and may go back. ``at`` is told what
    comes now (`watchdog.Watchdog.at`).
    """
    done, last = start, parts.recipe.train.steps
    draw = ahead.Draw(parts, program, start=start, compiled=guard.compiled)
    report: step_lib.Report | None = None

    def hear(report: step_lib.Report, state: state_lib.State, *, of: int) -> state_lib.State:
        """Tells all the report of the step that made ``of`` steps done; returns the state to go on with."""
        judged = guard.judge(of, _tell(hooks, of, report), state, started=done)
        if judged is not state:
            draw.forget()
        return judged

    while done < last:
        if report is not None and guard.must_know(done):
            at("step", done)
            state, report = hear(report, state, of=done), None
        if stop(done):
            break
        at("snapshot", done)
        guard.before(done, state)
        for hook in hooks:
            hook.before(done, state)
        if guard.anticipates(done):
            at("anticipation", done + 1, timed=False)  # it may have to be compiled
            batch, given = draw.anticipated(done, state, lag=guard.lag)
            at("step", done + 1)
            state, new = program.step(state, batch, variant=parts.variant_at(done), given=given)
        else:
            at("data", done + 1)
            batch = draw.plain()
            at("step", done + 1)
            state, new = program.step(state, batch, variant=parts.variant_at(done))
        done += 1
        if report is not None:
            state = hear(report, state, of=done - 1)
        report = new
    if report is not None:
        at("step", done)
        state = hear(report, state, of=done)
    if done == last:
        for hook in hooks:
            hook.before(done, state)
    return state, done


def _tell(hooks: Sequence[Hook], step: int, report: step_lib.Report) -> step_lib.Report:
    """Fetches the report and gives it to the hooks."""
    on_host = jax.device_get(report)
    for hook in hooks:
        hook.after(step, on_host)
    return on_host
