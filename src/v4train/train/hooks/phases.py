"""Changes of the data in the course of a run: compiles the step for a new shape of batch, and records what of each source was drawn."""

from collections.abc import Callable

from v4train.train import build
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record


class Shapes:
    """Compiles the training step for the batches of a phase before its first step. Its time is not a step's."""

    def __init__(self, parts: build.Parts, program: build.Program, *, say: Callable[[str], None], done: Callable[[], None]):
        """``say`` gets a line for people; ``done`` is called after a compilation."""
        self._parts, self._program, self._say, self._done = parts, program, say, done

    def before(self, step: int, state: state_lib.State) -> None:
        """Compiles, if the next step is the first with batches of its shape."""
        if step >= self._parts.recipe.train.steps:
            return
        seconds = build.add_step(self._program, self._parts, step=step)
        if seconds is not None:
            rows, length = self._parts.data.phases.at(step).shape[:2]
            self._say(f"step {step:>6}  from here on {rows} rows of {length:,} tokens a step; compiled in {seconds:.1f} s")
            self._done()

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""


class Amounts:
    """A record of kind ``data`` every so many steps: rows, tokens without padding and epochs of each source, in closed form."""

    def __init__(self, parts: build.Parts, sink: record.Sink):
        self._parts, self._sink = parts, sink

    def before(self, step: int, state: state_lib.State) -> None:
        """Nothing."""

    def after(self, step: int, report: step_lib.Report) -> None:
        """Writes the record, if it is time."""
        train = self._parts.recipe.train
        if step % train.experts_every == 0 or step == train.steps:
            amounts = self._parts.data.amounts(step).items()
            by_source = {f"{field}/{name}": value for name, amount in amounts for field, value in amount._asdict().items()}
            self._sink({"kind": "data", "step": step, **by_source})
