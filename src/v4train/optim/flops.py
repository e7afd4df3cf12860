"""FLOPs of one update of the optimizer, in closed form: Newton-Schulz per matrix, and a few operations per element.

A step of Newton-Schulz on an n x m matrix, n <= m, is three products: X X^T (2 n^2 m), its square (2 n^3), and that times X (2 n^2 m).
Nothing of it depends on the batch. So its share of a training step falls with the tokens of the step, and it is dear where many parameters
see few tokens: forward and backward pass cost a routed matrix 6 n m for each token that visits it, the update 10 (4 n^2 m + 2 n^3) once.
V4-Flash's experts (2048 x 4096, 6 of 256 a token) cost as much at 728,000 tokens a step, and one percent of that at the paper's 75M.

What is counted is the whole update on all devices together, each matrix once; the padding of stacks (`stacking`) is not in it.
"""

import dataclasses

from v4train.core import param
from v4train.optim import groups
from v4train.optim.config import OptimizerConfig

MUON_ELEMENT = 15
"""Per element of a matrix outside of the iteration: momentum 2, look-ahead 2, norm 3, scale 1, decay 2, rate 1, addition 1, clipping 3."""
ADAMW_ELEMENT = 19
"""Per element of another parameter: moments 7, bias corrections 2, direction 3, decay 2, rate 1, addition 1, clipping 3."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one update. `total` is their sum."""

    newton_schulz: float
    """Products of the iteration."""
    elementwise: float
    """Momentum, moments, decay, clipping: limited by memory, not by arithmetic."""

    @property
    def total(self) -> float:
        return self.newton_schulz + self.elementwise


def newton_schulz(shape: tuple[int, int], *, steps: int) -> float:
    """Of one matrix, with one ``(a, b, c)`` per step."""
    n, m = sorted(shape)
    return float(steps * (4 * n * n * m + 2 * n**3))


def update(config: OptimizerConfig, declarations: dict) -> Flops:
    """Of one update of all trained parameters.

    Args:
        config: of the optimizer.
        declarations: nested dict, as the model declares them; buffers do not count.
    """
    trained = [d for d in param.flatten(groups.assign(config, declarations)).values() if d.trained]
    matrices = [d for d in trained if d.group == "muon"]
    steps = len(config.muon.coefficients) if config.muon else 0
    return Flops(
        newton_schulz=sum(d.matrices * newton_schulz(d.matrix, steps=steps) for d in matrices),
        elementwise=float(sum(d.size * (MUON_ELEMENT if d.group == "muon" else ADAMW_ELEMENT) for d in trained)),
    )
