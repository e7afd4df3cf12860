"""What a chip can do at most: the one table of peaks, looked up by the name that JAX gives a device.

A row is *per JAX device*, which is a whole GPU or TPU chip, except where a chip has two cores that JAX shows one by one (TPU v2, v3,
7 and 7x; MI250X): there it is half a chip. Peaks are dense bf16 with fp32 accumulation: data sheets of NVIDIA and AMD print figures
"with sparsity", which are twice as high. Memory is the vendor's figure in units of 10^9 bytes (TPUs: of 2^30, as Google states them);
what a program may use is a few percent less, and a device that runs reports it (`Device.memory_stats`).

A name matches a row if it contains the row's key as whole words, and the longest key wins: "NVIDIA H100 PCIe" is not an H100 SXM,
"NVIDIA GB200" is not a B200. A slice of a chip (MIG) matches nothing: its name does not say how much it may compute.

Sources: the vendors' data sheets (NVIDIA A100, L4, L40S, H100, H200, H20, GH200; Blackwell and Blackwell Ultra architecture briefs;
AMD CDNA 2, 3 and 4 white papers; "System architecture" pages of Cloud TPU). Clocks under load are lower, so no real program reaches
these figures.
"""

import dataclasses
import re

_GB = 10**9
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
        bf16_flops: peak FLOP/s of dense bf16 matrix products.
        hbm_bytes: memory.
    """

    bf16_flops: float
    hbm_bytes: int


CHIPS: dict[str, Chip] = {
    "A100": Chip(312e12, 80 * _GB),
    "A100-SXM4-40GB": Chip(312e12, 40 * _GB),
    "A100-PCIE-40GB": Chip(312e12, 40 * _GB),
    "A800": Chip(312e12, 80 * _GB),
    "L4": Chip(121e12, 24 * _GB),
    "L40S": Chip(362e12, 48 * _GB),
    "H20": Chip(148e12, 96 * _GB),
    "H100": Chip(989e12, 80 * _GB),  # SXM
    "H100 PCIe": Chip(756e12, 80 * _GB),
    "H100 NVL": Chip(835e12, 94 * _GB),
    "H800": Chip(989e12, 80 * _GB),
    "GH200": Chip(990e12, 96 * _GB),
    "GH200 144G": Chip(990e12, 144 * _GB),
    "H200": Chip(989e12, 141 * _GB),
    "H200 NVL": Chip(836e12, 141 * _GB),
    "B200": Chip(2250e12, 180 * _GB),
    "GB200": Chip(2500e12, 186 * _GB),
    "B300": Chip(2250e12, 270 * _GB),
    "GB300": Chip(2500e12, 279 * _GB),
    "MI250X": Chip(191.5e12, 64 * _GB),  # one of two dies
    "MI300X": Chip(1307e12, 192 * _GB),
    "MI325X": Chip(1307e12, 256 * _GB),
    "MI355X": Chip(2516e12, 288 * _GB),
    "TPU v2": Chip(22.5e12, 8 * _GIB),  # one of two cores
    "TPU v3": Chip(61.5e12, 16 * _GIB),  # one of two cores
    "TPU v4": Chip(275e12, 32 * _GIB),
    "TPU v4 lite": Chip(138e12, 8 * _GIB),
    "TPU v5": Chip(459e12, 95 * _GIB),  # v5p
    "TPU v5p": Chip(459e12, 95 * _GIB),
    "TPU v5 lite": Chip(197e12, 16 * _GIB),  # v5e
    "TPU v5e": Chip(197e12, 16 * _GIB),
    "TPU v6 lite": Chip(918e12, 32 * _GIB),  # v6e
    "TPU v6e": Chip(918e12, 32 * _GIB),
    "TPU7": Chip(1153.5e12, 96 * _GIB),  # one of two cores
    "TPU7x": Chip(1153.5e12, 96 * _GIB),  # one of two cores
}
"""Words in `jax.Device.device_kind` -> peaks."""


def chip(device_kind: str) -> Chip | None:
    """The row of a device, or None for one that is not in the table (a CPU, a slice of a GPU)."""
    if re.search(r"\bMIG\b", device_kind):
        return None
    matches = [key for key in CHIPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", device_kind)]
    return CHIPS[max(matches, key=len)] if matches else None


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one JAX device in dense bf16, the denominator of MFU; None if unknown."""
    found = chip(device_kind)
    return None if found is None else found.bf16_flops
