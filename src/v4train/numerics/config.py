"""Config of number formats by role."""

from typing import Literal

from v4train.config import base


class NumericsConfig(base.Config):
    """Master weights and optimizer state are fp32; these are the formats of the work between (docs/low_precision.md)."""

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations of the forward and backward pass. What must stay fp32 (mHC, router, norms, sinks, loss, angles) does."""
    linear: Literal["compute", "fp8"] = "compute"
    """Products with the projections of attention and the shared expert. fp8: both factors in E4M3, weights in blocks of 128 x 128,
    activations and gradients in tiles of 1 x 128, each with a power of two as its scale. Indexer, compressors, router, norms, mHC,
    embedding, head and what joins MTP to the model stay in `compute`."""
    experts: Literal["compute", "fp8", "mxfp4"] = "compute"
    """Products with the routed experts. mxfp4: their weights are rounded to E2M1 with a scale for 32 values along the input (training that
    knows of its quantisation), expanded to E4M3, and multiplied as with fp8. Gradients pass all rounding of weights unchanged."""
    emulate: bool = False
    """Multiply values of FP8 in `compute` on GPUs too, where there are kernels for the codes: to compare the two, or for a GPU that is
    older than Hopper. Elsewhere nothing else is there."""
    gradient_sums: Literal["float32", "bfloat16"] = "float32"
    """In which the gradients of microbatches are summed. bfloat16: half the memory, every addition rounded up or down at random in
    proportion, so that the sum is right on average; random numbers follow from seed and step."""

    @property
    def low_precision(self) -> bool:
        """Some products have fewer bits than `compute`."""
        return (self.linear, self.experts) != ("compute", "compute")
