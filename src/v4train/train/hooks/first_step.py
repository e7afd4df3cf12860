"""Measures the time from the program's start to the end of its first step: imports and compilation, what a person waits for."""

import time

import jax

from v4train.train import state as state_lib
from v4train.train import step as step_lib


class FirstStep:
    """Attributes:
    seconds: the time, or None as long as no step is done.
    """

    def __init__(self, *, program_started: float, start: int):
        """``program_started`` is `time.time` then, ``start`` the steps done before this process."""
        self._program_started, self._start = program_started, start
        self.seconds: float | None = None

    def before(self, step: int, state: state_lib.State) -> None:
        """Waits, once, until the first step's result is there: a step is only started when it returns."""
        if step == self._start + 1 and self.seconds is None:
            jax.block_until_ready(state)
            self.seconds = round(time.time() - self._program_started, 3)

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""
