"""What a chip can do at most: the one table of peaks, looked up by the name that JAX gives a device, or that people give a chip.

A row is *per JAX device*, which is a whole GPU or TPU chip, except where a chip has two cores that JAX shows one by one (TPU v2, v3,
7 and 7x; MI250X): there it is half a chip. Peaks are dense, with fp32 accumulation: data sheets of NVIDIA and AMD print figures
"with sparsity", which are twice as high. A chip without FP8 units has its bf16 figure there. Memory is the vendor's figure in units of 10^9
bytes (TPUs: of 2^30, as Google states them); what a program may use is a few percent less, and a device that runs reports it
(`Device.memory_stats`).

Networks are of two kinds. GPUs stand in *domains* (a server of 8, a rack of 72) in which each reaches each at full speed, and each has
one network card for everything farther away. TPUs are the nodes of a *torus* (the slice); hosts of different slices speak over the data
centre's network. All bandwidths are bytes a second in one direction: vendors print the sum of both.

A name matches a row if it contains the row's key as whole words, and the longest key wins: "NVIDIA H100 PCIe" is not an H100 SXM,
"NVIDIA GB200" is not a B200. A slice of a chip (MIG) matches nothing: its name does not say how much it may compute.

Sources: the vendors' data sheets (NVIDIA A100, L4, L40S, H100, H200, H20, GH200; Blackwell and Blackwell Ultra architecture briefs;
AMD CDNA 2, 3 and 4 white papers; "System architecture" pages of Cloud TPU, whose ICI figures per chip are divided by the number of links
and by 2). H800 has an H100's units and 400 of its 900 GB/s of NVLink (DeepSeek-V3 report, 3.1). Network cards are those of the vendor's
reference server (DGX A100: 200 Gb/s a GPU; DGX H100, H200, B200, GB200 NVL72 and MI300X platforms: 400; B300 and GB300: 800); a cluster may
have other ones. Clocks under load are lower, so no real program reaches these figures.
"""

import dataclasses
import difflib
import re

_GB = 10**9
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Domains:
    """A network of GPUs.

    Attributes:
        size: devices that reach each other without a network card.
        bandwidth: of one device inside its domain, bytes/s in one direction.
        card: of one device to other domains, bytes/s in one direction.
    """

    size: int
    bandwidth: float
    card: float


@dataclasses.dataclass(frozen=True)
class Torus:
    """A network of TPUs.

    Attributes:
        dimensions: of the torus; a device has two links in each.
        link: of one of its links, bytes/s in one direction.
        card: of one device to other slices, bytes/s in one direction.
    """

    dimensions: int
    link: float
    card: float


Network = Domains | Torus


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
        bf16_flops: peak FLOP/s of dense bf16 matrix products.
        hbm_bytes: memory.
        fp8_flops: peak FLOP/s of dense FP8 matrix products.
        hbm_bandwidth: of its memory, bytes/s.
        network: to other devices.
    """

    bf16_flops: float
    hbm_bytes: int
    fp8_flops: float
    hbm_bandwidth: float
    network: Network


_A100 = Domains(8, 300e9, 25e9)
_HOPPER = Domains(8, 450e9, 50e9)
_CDNA3 = Domains(8, 448e9, 50e9)
_PCIE = Domains(1, 32e9, 25e9)
_TPU_V5E = Torus(2, 50e9, 3.125e9)
_TPU_V5P = Torus(3, 100e9, 6.25e9)
_TPU_V6E = Torus(2, 100e9, 12.5e9)
_TPU7 = Torus(3, 50e9, 6.25e9)  # half of a chip's

CHIPS: dict[str, Chip] = {
    "A100": Chip(312e12, 80 * _GB, 312e12, 2.04e12, _A100),
    "A100-SXM4-40GB": Chip(312e12, 40 * _GB, 312e12, 1.56e12, _A100),
    "A100-PCIE-40GB": Chip(312e12, 40 * _GB, 312e12, 1.56e12, _PCIE),
    "A800": Chip(312e12, 80 * _GB, 312e12, 2.04e12, Domains(8, 200e9, 25e9)),
    "L4": Chip(121e12, 24 * _GB, 242e12, 0.30e12, _PCIE),
    "L40S": Chip(362e12, 48 * _GB, 733e12, 0.86e12, _PCIE),
    "H20": Chip(148e12, 96 * _GB, 296e12, 4.0e12, _HOPPER),
    "H100": Chip(989e12, 80 * _GB, 1979e12, 3.35e12, _HOPPER),  # SXM
    "H100 PCIe": Chip(756e12, 80 * _GB, 1513e12, 2.0e12, _PCIE),
    "H100 NVL": Chip(835e12, 94 * _GB, 1671e12, 3.9e12, Domains(2, 300e9, 50e9)),
    "H800": Chip(989e12, 80 * _GB, 1979e12, 3.35e12, Domains(8, 200e9, 50e9)),
    "GH200": Chip(990e12, 96 * _GB, 1979e12, 4.0e12, Domains(1, 450e9, 50e9)),
    "GH200 144G": Chip(990e12, 144 * _GB, 1979e12, 4.9e12, Domains(1, 450e9, 50e9)),
    "H200": Chip(989e12, 141 * _GB, 1979e12, 4.8e12, _HOPPER),
    "H200 NVL": Chip(836e12, 141 * _GB, 1671e12, 4.8e12, Domains(4, 450e9, 50e9)),
    "B200": Chip(2250e12, 180 * _GB, 4500e12, 7.7e12, Domains(8, 900e9, 50e9)),
    "GB200": Chip(2500e12, 186 * _GB, 5000e12, 8.0e12, Domains(72, 900e9, 50e9)),
    "B300": Chip(2250e12, 270 * _GB, 4500e12, 7.7e12, Domains(8, 900e9, 100e9)),
    "GB300": Chip(2500e12, 279 * _GB, 5000e12, 8.0e12, Domains(72, 900e9, 100e9)),
    "MI250X": Chip(191.5e12, 64 * _GB, 191.5e12, 1.6e12, Domains(8, 100e9, 12.5e9)),  # one of two dies
    "MI300X": Chip(1307e12, 192 * _GB, 2615e12, 5.3e12, _CDNA3),
    "MI325X": Chip(1307e12, 256 * _GB, 2615e12, 6.0e12, _CDNA3),
    "MI355X": Chip(2516e12, 288 * _GB, 5033e12, 8.0e12, Domains(8, 537e9, 50e9)),
    "TPU v2": Chip(22.5e12, 8 * _GIB, 22.5e12, 0.35e12, Torus(2, 31e9, 3.125e9)),  # one of two cores
    "TPU v3": Chip(61.5e12, 16 * _GIB, 61.5e12, 0.45e12, Torus(2, 41e9, 3.125e9)),  # one of two cores
    "TPU v4": Chip(275e12, 32 * _GIB, 275e12, 1.2e12, Torus(3, 50e9, 6.25e9)),
    "TPU v4 lite": Chip(138e12, 8 * _GIB, 138e12, 0.6e12, Torus(2, 50e9, 3.125e9)),
    "TPU v5": Chip(459e12, 95 * _GIB, 459e12, 2.77e12, _TPU_V5P),  # v5p
    "TPU v5p": Chip(459e12, 95 * _GIB, 459e12, 2.77e12, _TPU_V5P),
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 197e12, 0.82e12, _TPU_V5E),  # v5e
    "TPU v5e": Chip(197e12, 16 * _GIB, 197e12, 0.82e12, _TPU_V5E),
    "TPU v6 lite": Chip(918e12, 32 * _GIB, 918e12, 1.64e12, _TPU_V6E),  # v6e
    "TPU v6e": Chip(918e12, 32 * _GIB, 918e12, 1.64e12, _TPU_V6E),
    "TPU7": Chip(1153.5e12, 96 * _GIB, 2307e12, 3.69e12, _TPU7),  # one of two cores
    "TPU7x": Chip(1153.5e12, 96 * _GIB, 2307e12, 3.69e12, _TPU7),  # one of two cores
}
"""Words in `jax.Device.device_kind` -> peaks."""


_HOPPER_AND_LATER = frozenset(
    {
        *("H20", "H100", "H100 PCIe", "H100 NVL", "H800", "H200", "H200 NVL", "GH200", "GH200 144G"),
        *("B200", "GB200", "B300", "GB300"),
    }
)
_TWO_CORES = ("TPU v2", "TPU v3", "TPU7", "TPU7x")


def names() -> list[str]:
    """The chips as people call them: ``H200``, ``v5p``."""
    return [key.removeprefix("TPU ") for key in CHIPS]


def named(name: str) -> tuple[str, Chip]:
    """The table's key and row of a chip as people call it: ``h200``, ``v5p``, ``TPU v5p``, ``tpu7x``.

    Raises:
        ValueError: there is no such chip; the message has the nearest names.
    """
    wanted = name.lower().removeprefix("tpu").strip(" -_")
    by_name = {key.lower().removeprefix("tpu").strip(): key for key in CHIPS}
    if wanted in by_name:
        return by_name[wanted], CHIPS[by_name[wanted]]
    close = difflib.get_close_matches(wanted, by_name, n=3, cutoff=0.5)
    near = f"; nearest: {', '.join(by_name[key].removeprefix('TPU ') for key in close)}" if close else ""
    raise ValueError(f"there is no chip {name!r} in core/hardware.py{near} (known: {', '.join(names())})")


def devices_per_chip(key: str) -> int:
    """How many JAX devices a chip of this row is."""
    return 2 if key in _TWO_CORES else 1


def multiplies_codes(key: str) -> bool:
    """Whether kernels for FP8 codes (`ops.kernels.fp8_matmul_triton`) are for chips of this row: NVIDIA's Hopper and later."""
    return key in _HOPPER_AND_LATER


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
