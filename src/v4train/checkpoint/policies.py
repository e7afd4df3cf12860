"""Which finished steps to keep: small value objects that the recipe chooses by ``kind``.

A policy sees nothing but step numbers and never deletes the newest one, so whatever it says a run can be resumed.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic

from v4train.config import base


class Latest(base.Config):
    """Keep the newest ``count`` steps."""

    kind: Literal["latest"] = "latest"
    count: int = pydantic.Field(default=3, ge=1, description="finished steps to keep")

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps to keep."""
        return set(sorted(steps)[-self.count :])


class Every(base.Config):
    """Keep the newest ``latest`` steps to resume from, and for good each step that is a multiple of ``steps``."""

    kind: Literal["every"]
    steps: int = pydantic.Field(ge=1, description="keep each multiple of this many training steps for good")
    latest: int = pydantic.Field(default=3, ge=1, description="newest finished steps to keep besides")

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps to keep."""
        return set(sorted(steps)[-self.latest :]) | {step for step in steps if step % self.steps == 0}


Policy = Annotated[Latest | Every, pydantic.Field(discriminator="kind")]


def expendable(policy: Latest | Every, *, steps: Sequence[int]) -> list[int]:
    """The steps that the policy lets go, oldest first."""
    kept = policy.kept(steps)
    assert not steps or max(steps) in kept, "a policy never deletes the newest step"
    return sorted(set(steps) - kept)
