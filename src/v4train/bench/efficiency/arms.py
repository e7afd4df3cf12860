"""The recipes that are compared, and the runs that compare them.

All arms see the same text in the same order and have the same number of active parameters, to within 1%: what an arm lacks in
hyper-connections, compressors and indexers is given to its experts as width. A run's seed draws the parameters and orders the documents,
so that runs of one seed are pairs.

How much compute an arm needs for a given loss cannot be read off the curve of one long run: near its end the learning rate has fallen, at
the same tokens of a longer run it has not. So V4 is also trained with fewer tokens, each time through its whole schedule (`BUDGETS`).
"""

import dataclasses
from collections.abc import Sequence

RECIPES = "configs/bench/efficiency"
LENGTH = 256
"""Tokens of a row, unless another is asked for."""
TOKENS = 4096
"""Of a step, whatever the rows."""
STEPS = 80
"""Of a run with all tokens."""
BUDGETS = (0.3, 0.5, 0.65)
"""Shares of all tokens that V4 is trained with besides; they enclose what it needs on average, with short rows and with long ones."""
ARMS = {
    "v4": "V4",
    "baseline": "baseline",
    "no_muon": "V4, AdamW for Muon",
    "no_mhc": "V4, plain residuals for mHC",
    "no_sparse_attention": "V4, dense attention for CSA and HCA",
    "no_routing": "V4, sigmoid routing with auxiliary loss",
    "no_mtp": "V4 without MTP",
}
"""Name of the recipe -> what it is called in tables."""
LEFT_OUT = tuple(name for name in ARMS if name.startswith("no_"))
DENSE = ("baseline", "no_sparse_attention")
"""Their window is the whole row."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: a key of `ARMS`.
        steps: of the run; its schedule ends with them.
        seed: of parameters and of the order of documents.
        length: tokens of a row.
    """

    arm: str
    steps: int
    seed: int
    length: int = LENGTH

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm}-{self.length}-{self.steps}-seed{self.seed}"

    @property
    def recipe(self) -> str:
        """The recipe file, from the repository's root."""
        return f"{RECIPES}/{self.arm}.yaml"

    def overrides(self, directory: str) -> list[str]:
        """What differs from the recipe file: seed, rows, steps with the decay over their second half, and where it lives."""
        return [
            f"seed={self.seed}",
            f"data.seed={self.seed}",
            f"data.sequence_length={self.length}",
            *([f"model.attention.window={self.length}"] if self.arm in DENSE else []),
            f"train.batch_rows={TOKENS // self.length}",
            f"train.steps={self.steps}",
            f"train.run_directory={directory}",
            f"optimizer.schedule.decay_steps={self.steps // 2}",
            f"checkpoint.every_steps={self.steps}",
        ]


def runs(arms: Sequence[str], *, seeds: int, length: int = LENGTH, steps: int = STEPS) -> list[Run]:
    """All runs of these arms, those that decide most first, seed by seed.

    Raises:
        ValueError: an unknown arm, fewer than one seed, or rows that do not fill a step.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"--runs: {unknown[0]!r} is none of the recipes that are compared: {', '.join(ARMS)}")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one is needed, and two or more to tell a difference from chance")
    if length < 1 or TOKENS % length:
        raise ValueError(f"--length {length}: a step has {TOKENS:,} tokens and must be whole rows: 256, 512 or 1024, say")
    budgets = {arm: [steps] + ([round(steps * share) for share in BUDGETS] if arm == "v4" else []) for arm in arms}
    decisive = [arm for arm in arms if arm not in LEFT_OUT]
    ordered = [Run(arm, budget, seed, length) for seed in range(seeds) for arm in decisive for budget in budgets[arm]]
    return ordered + [Run(arm, steps, seed, length) for seed in range(seeds) for arm in arms if arm in LEFT_OUT]
