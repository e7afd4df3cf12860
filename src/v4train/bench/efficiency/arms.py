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
STEPS = 80
"""Of a run with all tokens."""
BUDGETS = (0.3, 0.5, 0.65)
"""Shares of all tokens that V4 is trained with besides; the last two enclose what it needs on average."""
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


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: a key of `ARMS`.
        steps: of the run; its schedule ends with them.
        seed: of parameters and of the order of documents.
    """

    arm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm}-{self.steps}-seed{self.seed}"

    @property
    def recipe(self) -> str:
        """The recipe file, from the repository's root."""
        return f"{RECIPES}/{self.arm}.yaml"

    def overrides(self, directory: str) -> list[str]:
        """What differs from the recipe file: seed, length with the decay over its second half, and where it lives."""
        return [
            f"seed={self.seed}",
            f"data.seed={self.seed}",
            f"train.steps={self.steps}",
            f"train.run_directory={directory}",
            f"optimizer.schedule.decay_steps={self.steps // 2}",
            f"checkpoint.every_steps={self.steps}",
        ]


def runs(arms: Sequence[str], *, seeds: int, steps: int = STEPS) -> list[Run]:
    """All runs of these arms, those that decide most first, seed by seed.

    Raises:
        ValueError: an unknown arm, or fewer than one seed.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"--runs: {unknown[0]!r} is none of the recipes that are compared: {', '.join(ARMS)}")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one is needed, and two or more to tell a difference from chance")
    lengths = {arm: [steps] + ([round(steps * share) for share in BUDGETS] if arm == "v4" else []) for arm in arms}
    decisive = [arm for arm in arms if arm not in LEFT_OUT]
    ordered = [Run(arm, length, seed) for seed in range(seeds) for arm in decisive for length in lengths[arm]]
    return ordered + [Run(arm, steps, seed) for seed in range(seeds) for arm in arms if arm in LEFT_OUT]
