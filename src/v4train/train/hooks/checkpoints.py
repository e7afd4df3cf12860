"""Saves the state together with the data position that produced it."""

from collections.abc import Callable
from typing import Any

from v4train.checkpoint import config as config_lib
from v4train.checkpoint import manager
from v4train.train import state as state_lib
from v4train.train import step as step_lib


class Checkpoints:
    """Saves when the schedule asks for it; `last` saves at the end."""

    def __init__(
        self,
        saver: manager.Manager,
        *,
        config: config_lib.CheckpointConfig,
        metadata: Callable[[int], dict[str, Any]],
        start: int,
        end: int,
    ):
        """``metadata`` is what to keep beside the state after a step, ``start`` the step that this process began from, ``end`` the
        last of the run, which is always saved."""
        self._saver, self._config, self._metadata = saver, config, metadata
        self._start, self._end = start, end

    def before(self, step: int, state: state_lib.State) -> None:
        """Saves if it is time, and this process has made a step since the checkpoint it began from."""
        if (self._config.is_due(step) or step == self._end) and step != self._start:
            self._save(step, state)

    def after(self, step: int, report: step_lib.Report) -> None:
        """Nothing."""

    def last(self, step: int, state: state_lib.State) -> None:
        """Saves the state at the end of this process, unless it just was, and waits until it is on disk."""
        if step != self._start:
            self._save(step, state)
        self._saver.wait()

    def _save(self, step: int, state: state_lib.State) -> None:
        self._saver.save(step, state, metadata={**self._metadata(step), "data_position": step})
