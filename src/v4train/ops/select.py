"""Which implementation of an op runs on which platform: the one table.

A platform's entry is the fastest implementation that runs there, never a fallback taken silently. A kernel joins by
one file in `ops/kernels/` and one row here; the parity tests run over all rows that the present platform can run.
"""

from typing import Any

import jax

TABLE: dict[str, dict[str, str]] = {
    # `ragged_dot` is expanded to a dense product over all groups on GPU, G times the work: correct, and slow until there is a kernel.
    "grouped_matmul": {"cpu": "blocked", "gpu": "ragged_dot", "tpu": "ragged_dot"},
    "expert_exchange": {"cpu": "emulated", "gpu": "ragged", "tpu": "ragged"},
}


def implementation(op: str, *, platform: str | None = None) -> Any:
    """The name to pass as an op's ``implementation`` (or ``transport``).

    Args:
        op: a row of `TABLE`.
        platform: ``cpu``, ``gpu`` or ``tpu``; by default the one JAX runs on. Name it to compile for a machine that is not here.

    Raises:
        ValueError: the table has no such row or column.
    """
    if op not in TABLE:
        raise ValueError(f"unknown op {op!r}; choose one of {', '.join(sorted(TABLE))}")
    platform = platform or jax.default_backend()
    if platform not in TABLE[op]:
        raise ValueError(f"{op} has no implementation for platform {platform!r}; there is one for {', '.join(sorted(TABLE[op]))}")
    return TABLE[op][platform]
