"""What a measurement was taken on: versions, load, memory. A figure without these cannot be compared with another.

Peak memory of a process is ``VmHWM`` where Linux tells it. ``ru_maxrss``, the portable figure, survives ``exec`` on Linux: a small
program started by a large one reports the large one's peak.
"""

import os
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np


def describe(*, devices: int) -> dict[str, Any]:
    """Platform, devices and versions, as fields of a result.

    Args:
        devices: number of devices that the measured program uses.
    """
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "cpu_cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"git": git_version(), "jax": jax.__version__, "python": platform.python_version(), "numpy": np.__version__},
    }


def git_version() -> str | None:
    """The commit of the sources, with ``+changes`` if files differ from it; None outside of a checkout."""
    folder = pathlib.Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: pathlib.Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes: above the number of cores, others slowed the measurement down."""
    return [round(x, 2) for x in os.getloadavg()]


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM at a time."""
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compiled_memory(compiled: Any) -> dict[str, int] | None:
    """XLA's own account of a compiled function, bytes per device; None where the platform gives none.

    ``argument`` and ``output`` share ``alias`` bytes (donated arrays); ``temp`` is everything between them.
    """
    analysis = compiled.memory_analysis() if hasattr(compiled, "memory_analysis") else None
    if analysis is None:
        return None
    return {f"{name}_bytes": int(getattr(analysis, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")}
