"""What XLA is told, by platform."""

from typing import Any

import jax

# On a CPU a program is small and compiled anew for each recipe: half the compile time is worth a few percent of speed.
_CPU: dict[str, Any] = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
# By default XLA:CPU drops the barriers around recomputed layers and schedules for concurrency, not memory: all layers' recomputed
# activations would be alive at once, as if nothing were recomputed.
_CPU |= {"xla_disable_hlo_passes": "cse_barrier_expander", "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
if jax.__version_info__ < (0, 12):
    _CPU["xla_cpu_use_fusion_emitters"] = False  # newer compilers no longer have the choice
OPTIONS: dict[str, dict[str, Any]] = {"cpu": _CPU}
"""By platform; to be given to ``compile`` of whatever differentiates a model."""


def options() -> dict[str, Any] | None:
    """Of the platform that JAX runs on."""
    return OPTIONS.get(jax.default_backend())
