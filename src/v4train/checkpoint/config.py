"""When a run saves checkpoints, which it keeps, and whether it checks them."""

import pydantic

from v4train.checkpoint import policies
from v4train.config import base


class CheckpointConfig(base.Config):
    """The ``checkpoint`` part of a recipe."""

    every_steps: int | None = pydantic.Field(default=1000, ge=1)
    """Training steps between saves; null: never save on a schedule (the trainer may still save at the end)."""

    keep: policies.Policy = policies.Latest()
    """Which finished steps stay on disk. While one is being written, one more than these needs room."""

    verify: bool = True
    """Compare every file with its SHA-256 digest before it is restored. Without it, only sizes and the small files are checked."""

    def is_due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after ``step`` training steps."""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0
