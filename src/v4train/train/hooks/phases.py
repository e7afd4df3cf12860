"""Changes in the course of a run: compiles the step for a new variant, of batch or of model, and records what of each source was drawn."""

import time
from collections.abc import Callable, Iterator

import jax

from v4train.train import build
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record


class Changes:
    """Compiles the training step of a new variant before its first step, once, says what is new and records it (kind ``change``). Its
    time is not a step's."""

    def __init__(
        self, parts: build.Parts, program: build.Program, sink: record.Sink, *, say: Callable[[str], None], done: Callable[[float], None]
    ):
        """``say`` gets a line for people; ``done`` is told the seconds of a change."""
        self._parts, self._program, self._sink, self._say, self._done = parts, program, sink, say, done
        self._current: build.Variant | None = None

    def before(self, step: int, state: state_lib.State) -> None:
        """Compiles, if the next step is the first of its variant; speaks, if it differs from the last."""
        if step >= self._parts.recipe.train.steps:
            return
        variant = self._parts.variant_at(step)
        if variant == self._current:
            return
        jax.block_until_ready(state)  # the step before is still at work: its time is its own
        started = time.perf_counter()
        seconds = build.add_step(self._program, self._parts, variant)
        before = self._parts.variant_at(max(step - 1, 0))  # not the current one: a process may begin just here
        if variant != before:
            shape = {"rows": variant.shape.rows, "sequence_length": variant.shape.sequence_length}
            what = ", ".join(changed(before, variant))
            self._sink({"kind": "change", "step": step, "what": what, **shape, **variant.stage._asdict()})
        if self._current is not None:
            compiled = "compiled before" if seconds is None else f"compiled in {seconds:.1f} s"
            self._say(f"step {step:>6}  from here on {', '.join(changed(self._current, variant))}; {compiled}")
        self._done(time.perf_counter() - started)
        self._current = variant

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""


def changed(old: build.Variant, new: build.Variant) -> Iterator[str]:
    """What is new in a variant, for people."""
    if old.shape != new.shape:
        yield f"{new.shape.rows} rows of {new.shape.sequence_length:,} tokens a step"
    if old.stage.attention != new.stage.attention:
        yield f"{new.stage.attention} attention" + (" (only the indexer learns)" if new.stage.attention == "warmup" else "")
    if old.stage.mtp_weight != new.stage.mtp_weight:
        yield f"MTP weight {new.stage.mtp_weight:g}"


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
