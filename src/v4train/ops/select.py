"""Which implementation of an op runs on which platform: the one table.

A platform's entry is the fastest implementation that runs there, never a fallback taken silently. A kernel joins by
one file in `ops/kernels/` and one row here; the parity tests run over all rows that the present platform can run.

A program that is traced inside `using` has another implementation of one op: for comparisons that need it, asked for by name at the place
that traces. Ops read the table while they are traced, so a function compiled before keeps what it has. `compiling_for` names the platform
of what is traced inside, where that is not the one JAX runs on: a program for a TPU can be compiled on a laptop.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

TABLE: dict[str, dict[str, str]] = {
    # `ragged_dot` is native on TPU; on CPU and GPU XLA expands it to a dense product over all groups, G times the work and the memory.
    "grouped_matmul": {"cpu": "blocked", "gpu": "triton", "tpu": "ragged_dot"},
    # In the compute dtype, unless the step asks for fewer bits (`train.precision`); `fp8_linear`, `fp8_experts`: by which units.
    "linear_product": {"cpu": "compute", "gpu": "compute", "tpu": "compute"},
    "experts_product": {"cpu": "compute", "gpu": "compute", "tpu": "compute"},
    "fp8_linear": {"cpu": "emulated", "gpu": "fp8_triton", "tpu": "emulated"},
    "fp8_experts": {"cpu": "emulated", "gpu": "fp8_triton", "tpu": "emulated"},
    "expert_exchange": {"cpu": "ragged", "gpu": "padded", "tpu": "ragged"},
    # XLA:CPU has no ragged all-to-all; the one for GPUs is a loop of sends beyond 8 ranks, and is taken only if a recipe asks for it.
    "ragged_all_to_all": {"cpu": "emulated", "gpu": "ragged", "tpu": "ragged"},
    "sparse_attention": {"cpu": "chunked", "gpu": "chunked", "tpu": "chunked"},
    # The gradient of gathered rows, of a small table: by comparing with every row, or row after row (`gather`).
    "summed_rows": {"cpu": "scattered", "gpu": "compared", "tpu": "compared"},
    "top_k": {"cpu": "earliest", "gpu": "earliest", "tpu": "earliest"},
}
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("v4train_platform", default=None)
_chosen: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("v4train_implementations", default=None)


def implementation(op: str, *, platform: str | None = None) -> Any:
    """The name to pass as an op's ``implementation`` (or ``transport``).

    Args:
        op: a row of `TABLE`.
        platform: ``cpu``, ``gpu`` or ``tpu``; by default that of `compiling_for`, or else the one JAX runs on.

    Raises:
        ValueError: the table has no such row or column.
    """
    if op not in TABLE:
        raise ValueError(f"unknown op {op!r}; choose one of {', '.join(sorted(TABLE))}")
    chosen = _chosen.get() or {}
    if platform is None and op in chosen:
        return chosen[op]
    platform = platform or _platform.get() or jax.default_backend()
    if platform not in TABLE[op]:
        raise ValueError(f"{op} has no implementation for platform {platform!r}; there is one for {', '.join(sorted(TABLE[op]))}")
    return TABLE[op][platform]


@contextlib.contextmanager
def using(op: str, *, implementation: Any) -> Iterator[None]:
    """What is traced inside takes this implementation of ``op`` instead of the platform's.

    Raises:
        ValueError: the table has no such row.
    """
    if op not in TABLE:
        raise ValueError(f"unknown op {op!r}; choose one of {', '.join(sorted(TABLE))}")
    token = _chosen.set({**(_chosen.get() or {}), op: implementation})
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced inside is for ``cpu``, ``gpu`` or ``tpu``, whatever JAX runs on here."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)
