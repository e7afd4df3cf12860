"""Config of the device mesh."""

import pydantic

from v4train.config import base

_Size = pydantic.Field(default=1, ge=1)


class MeshConfig(base.Config):
    """Number of devices along each mesh axis. Their product is the number of devices used.

    The batch is split over ``replica x fsdp x expert``.
    """

    replica: int = _Size
    """Copies of everything: plain data parallelism, across slices."""
    fsdp: int = _Size
    """Parameters, gradients and optimizer state are split; each device also has its own rows."""
    expert: int = _Size
    """Routed experts are split; for dense layers it acts as more data parallelism."""
    context: int = _Size
    """The sequence is split."""
    tensor: int = _Size
    """Heads, expert width and vocabulary are split."""
    emulate_devices: int | None = pydantic.Field(default=None, ge=1)
    """Run on this many emulated CPU devices instead of real ones."""

    @property
    def devices(self) -> int:
        return self.replica * self.fsdp * self.expert * self.context * self.tensor

    @property
    def batch_shards(self) -> int:
        """Devices that hold different rows."""
        return self.replica * self.fsdp * self.expert

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size, in the mesh's order."""
        return {name: getattr(self, name) for name in ("replica", "fsdp", "expert", "context", "tensor")}
