"""FLOPs of a training step, all of them: the model's, the optimizer's, and the mixing of streams.

`model.flops` leaves the mixing of streams out, as the field does: it is vector work, and less than 0.1% of V4-Flash. In a model of 64
features it is several percent, and only one side of the comparison has it, so here it counts. Norms, softmax, rotations and the pooling of
entries are left out on both sides.
"""

import dataclasses

from v4train import recipe as recipe_lib
from v4train.core import param
from v4train.model import config as model_config
from v4train.model import count, flops, transformer
from v4train.optim import flops as optimizer_flops

_SIGMOID = 4
"""FLOPs of one."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs per trained token, padding included, and the parameters that a token uses. `total` is the sum of the FLOPs.

    Attributes:
        layers: weight matrices of layers and head, forward and backward.
        attention: to raw tokens and entries, index scores.
        mtp: the multi-token prediction block with its attention and its pass through the head.
        mixing: of residual streams, everywhere.
        newton_schulz: Muon's iteration, shared out over the tokens of a step.
        elementwise: all else that the optimizer does.
        active: parameters without MTP.
        parameters: all of them, without MTP.
    """

    layers: float
    attention: float
    mtp: float
    mixing: float
    newton_schulz: float
    elementwise: float
    active: int
    parameters: int

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.mtp + self.mixing + self.newton_schulz + self.elementwise

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**dataclasses.asdict(self), "total": self.total}


def of(recipe: recipe_lib.Recipe) -> Cost:
    """Of a recipe's step."""
    declarations = param.declarations(transformer.Transformer(recipe.model))
    once = flops.training(recipe.model, length=recipe.data.sequence_length)
    update = optimizer_flops.update(recipe.optimizer, declarations)
    counted = count.parameters(declarations, top_k=recipe.model.moe.top_k)
    return Cost(
        layers=once.linear + once.head,
        attention=once.attention + once.indexer,
        mtp=once.mtp,
        mixing=3 * mixing(recipe.model),
        newton_schulz=update.newton_schulz / recipe.tokens_per_step,
        elementwise=update.elementwise / recipe.tokens_per_step,
        active=counted.active,
        parameters=counted.total,
    )


def mixing(model: model_config.ModelConfig) -> float:
    """FLOPs per token of a forward pass that hyper-connections take besides the matrices that `model.flops` counts.

    A site squares and sums the streams, passes (2 + n) n coefficients through scale, base and sigmoid or Sinkhorn, sums the streams with
    gates, and writes back: n x n products of streams and n of the output. The head's collapse has the first and the gated sum.
    """
    hyper = model.hyper
    if not isinstance(hyper, model_config.HyperConnectionConfig):
        return 0.0
    n, d = hyper.streams, model.hidden
    norm, gated, written = 2 * n * d, 2 * n * d, 2 * n * n * d + 2 * n * d
    coefficients = 3 * (2 + n) * n + 2 * n * _SIGMOID
    normalisation = 2 * n * n + n  # sums, eps, quotients
    sinkhorn = 4 * n * n + (2 * hyper.iterations - 1) * normalisation
    blocks, heads = model.depth + (model.mtp is not None), 1 + (model.mtp is not None)
    return float(2 * blocks * (norm + gated + written + coefficients + sinkhorn) + heads * (norm + gated + (3 + _SIGMOID) * n))
