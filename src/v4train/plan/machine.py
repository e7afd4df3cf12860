"""The machine that a run is planned for: how many of which chip, and in how many slices.

Said in words as people order machines: ``H200x512``, ``v5px512``, or as a topology: ``v5p:8x8x8`` (chips along the torus), ``v5p:8x8x8:2``
(two such slices), ``H100:64x8`` (hosts and GPUs of a host). A device is what JAX calls one. Of some TPUs each chip is two: the first form
counts devices, a topology is of chips.
"""

import dataclasses
import math
import re

from v4train.core import hardware

USABLE = 0.95
"""Share of a device's memory that a program may fill. The rest is the runtime's: buffers of the network, fragments, the program itself."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind.

    Attributes:
        name: of the chip, as `core.hardware` has it.
        chip: its peaks.
        devices: how many, over all slices.
        slices: sets of devices with a fast network inside (TPU slices); 1 for GPUs, whose network is one.
        option: that it was named with.
    """

    name: str
    chip: hardware.Chip
    devices: int
    slices: int = 1
    option: str = "--chips"

    @property
    def usable_bytes(self) -> float:
        """Memory of a device that a program may fill."""
        return USABLE * self.chip.hbm_bytes

    @property
    def label(self) -> str:
        """``512 x H200``; ``2 slices of 512 x TPU v5p``."""
        each = f"{self.devices // self.slices:,} x {self.name}"
        return each if self.slices == 1 else f"{self.slices} slices of {each}"


def parse(text: str, *, option: str = "--chips") -> Machine:
    """``H200x512`` as a machine, which ``option`` names.

    Raises:
        ValueError: no such chip, or no number of them.
    """
    found = re.fullmatch(r"\s*(.*?[A-Za-z0-9].*?)\s*(?:x\s*(\d+)|:\s*(\d+(?:x\d+)*)(?::(\d+))?)\s*", text)
    if not found:
        raise ValueError(f"{option} {text!r} is not a chip and a number of them; write it like H200x512, v5px512, v5p:8x8x8 or v5p:8x8x8:2")
    if found[2] and re.search(r"x\s*\d+$", found[1]):
        raise ValueError(f"{option} {text!r}: a topology is written with a colon, like v5p:8x8x8 or H100:64x8")
    name, chip = hardware.named(found[1])
    slices = int(found[4] or 1)
    chips = 0 if found[2] else slices * math.prod(int(size) for size in found[3].split("x"))
    devices = int(found[2]) if found[2] else chips * hardware.devices_per_chip(name)
    if devices < 1:
        raise ValueError(f"{option} {text!r}: {devices} chips cannot train; give 1 or more")
    return Machine(name, chip, devices, slices, option)
