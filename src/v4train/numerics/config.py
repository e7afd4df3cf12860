"""Config of number formats by role."""

from typing import Literal

from v4train.config import base


class NumericsConfig(base.Config):
    """Master weights and optimizer state are fp32; these are the formats of the work between."""

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations of the forward and backward pass. What must stay fp32 (mHC, router, norms, sinks, loss, angles) does."""
