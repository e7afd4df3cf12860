"""From losses and FLOPs to the compute that reaches the baseline's final loss.

*Measured, for V4*: its held-out loss falls with the tokens it is given (`arms.BUDGETS`, whole schedules), and where the line through
these losses, straight between neighbours in the logarithm of the tokens, crosses the baseline's final loss is the share of tokens that V4
needs. Beyond the shortest and the longest run nothing is extrapolated: the share is then only known to be below or above theirs.

*Estimated, for V4 with an ingredient left out*: such an arm was trained with all tokens only. How far its final loss lies above V4's of
the same seeds is turned into a factor on V4's share by V4's slope (least squares over all its runs), as if leaving something out moved the
line without turning it.

A share of tokens times the FLOPs of one token, relative to the baseline's, is the share of compute. All of it counts, the optimizer's too.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from v4train.bench.efficiency import arms, cost, training


@dataclasses.dataclass(frozen=True)
class Share:
    """Of the baseline's tokens, what another recipe needs for the baseline's final loss.

    Attributes:
        tokens: the share.
        bound: "" where losses on both sides were measured; "at most" or "more than" where only the nearest run is known; "about" by a
            slope.
    """

    tokens: float
    bound: str


def crossing(points: Sequence[tuple[float, float]], *, goal: float) -> Share:
    """Where losses reach a goal.

    Args:
        points: (share of the tokens, final loss) of whole runs.
        goal: the loss to be reached.
    """
    points = sorted(points)
    if points[0][1] <= goal:
        return Share(points[0][0], "at most")
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= goal:
            part = (high - goal) / (high - low)
            return Share(math.exp(math.log(before) + part * (math.log(after) - math.log(before))), "")
    return Share(points[-1][0], "more than")


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares change of the loss per unit of the tokens' natural logarithm; negative if more tokens help."""
    logs = [math.log(share) for share, _ in points]
    return statistics.linear_regression(logs, [loss for _, loss in points]).slope


def moved(share: Share, *, above: float, per_log: float) -> Share:
    """The share of tokens for the same goal when the whole line lies ``above`` by so many nats."""
    return Share(share.tokens * math.exp(-above / per_log), "about")


def summarise(results: Sequence[training.Result], costs: dict[str, cost.Cost], *, steps: int = arms.STEPS) -> dict[str, Any]:
    """Everything that the finished runs tell, ready for `json.dumps`.

    Args:
        results: of runs of `arms.ARMS`; those of the baseline and V4 with all tokens are needed for any share.
        costs: of every arm with a result.
        steps: of a run with all tokens.
    """
    full = {arm: _by_seed(results, arm, steps) for arm in arms.ARMS if _by_seed(results, arm, steps)}
    rows: dict[str, Any] = {}
    for arm, losses in full.items():
        rows[arm] = {"name": arms.ARMS[arm], "cost": costs[arm].as_dict(), "losses": losses, **_spread(list(losses.values()))}
    found: dict[str, Any] = {"steps": steps, "arms": rows, "runs": [r.as_dict() for r in results]}
    if not {"baseline", "v4"} <= full.keys():
        return found
    goal = rows["baseline"]["mean"]
    whole = full["v4"].keys()
    points = [(share, statistics.mean(losses.values())) for share, losses in _budgets(results, steps).items() if losses.keys() == whole]
    found["goal"], found["budgets"] = goal, [{"share": share, "loss": loss} for share, loss in points]
    share = crossing(points, goal=goal)
    _add(rows["v4"], share, costs, "v4")
    rows["v4"]["by_seed"] = _seeds(results, full["baseline"], costs, steps)
    if len(points) > 1 and not share.bound:
        found["slope"] = slope(points)
        for arm in (name for name in arms.LEFT_OUT if name in rows):
            pairs = [loss - full["v4"][seed] for seed, loss in full[arm].items() if seed in full["v4"]]
            if pairs:
                rows[arm]["above_v4"] = statistics.mean(pairs)
                _add(rows[arm], moved(share, above=rows[arm]["above_v4"], per_log=found["slope"]), costs, arm)
    return found


def _add(row: dict[str, Any], share: Share, costs: dict[str, cost.Cost], arm: str) -> None:
    row |= {"tokens": share.tokens, "bound": share.bound, "compute": share.tokens * costs[arm].total / costs["baseline"].total}
    without = costs[arm].total - costs[arm].newton_schulz - costs[arm].elementwise
    base = costs["baseline"].total - costs["baseline"].newton_schulz - costs["baseline"].elementwise
    row["compute_without_optimizer"] = share.tokens * without / base


def _seeds(
    results: Sequence[training.Result], goals: dict[int, float], costs: dict[str, cost.Cost], steps: int
) -> dict[int, dict[str, Any]]:
    """Of V4, each seed against the baseline of the same seed."""
    found = {}
    for seed, goal in goals.items():
        points = [(share, losses[seed]) for share, losses in _budgets(results, steps).items() if seed in losses]
        if points:
            share = crossing(points, goal=goal)
            ratio = costs["v4"].total / costs["baseline"].total
            found[seed] = {"tokens": share.tokens, "bound": share.bound, "compute": share.tokens * ratio}
    return found


def _budgets(results: Sequence[training.Result], steps: int) -> dict[float, dict[int, float]]:
    """V4's final losses by share of the tokens and seed."""
    lengths = sorted({r.run.steps for r in results if r.run.arm == "v4"})
    return {length / steps: _by_seed(results, "v4", length) for length in lengths}


def _by_seed(results: Sequence[training.Result], arm: str, steps: int) -> dict[int, float]:
    return {r.run.seed: r.loss for r in results if (r.run.arm, r.run.steps) == (arm, steps)}


def _spread(losses: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(losses), "std": statistics.stdev(losses) if len(losses) > 1 else 0.0}
