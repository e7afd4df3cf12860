"""The whole study: trains what is not finished, and says what follows from all that is."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from v4train.bench.efficiency import analysis, arms, cost, training

DIRECTORY = "runs/efficiency"


def measure(
    names: Sequence[str],
    *,
    seeds: int,
    directory: pathlib.Path,
    train: bool,
    say: Callable[[str], None],
    length: int = arms.LENGTH,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Runs and summarises.

    Args:
        names: of the recipes that are to be trained; what others have finished in the directory is used too.
        seeds: runs of each recipe.
        directory: where runs are kept.
        train: False: nothing is trained.
        say: is told what happens.
        length: tokens of a row; runs of several lengths may share a directory.
        overrides: ``a.b=c`` texts for every recipe; runs with other texts belong into another directory.

    Returns:
        The result, ready for `json.dumps`.

    Raises:
        ValueError: a recipe that is not there, a run that failed, or nothing that is finished.
    """
    wanted = arms.runs(names, seeds=seeds, length=length)
    if train:
        training.train(wanted, directory, say=say, overrides=overrides)
    every = [training.finished(run, directory) for run in arms.runs(list(arms.ARMS), seeds=seeds, length=length)]
    results = [result for result in every if result is not None]
    if not results:
        raise ValueError(f"{directory} holds no finished run of the study: leave --finished out to train")
    recipes = {r.run.arm: training.resolve(r.run, directory, overrides=overrides) for r in results}
    costs = {arm: cost.of(recipe) for arm, recipe in recipes.items()}
    first = next(iter(recipes.values()))
    rates = {arm: recipe.optimizer.schedule.peak_lr for arm, recipe in recipes.items()}
    settings = {"tokens_per_step": first.tokens_per_step, "sequence_length": first.data.sequence_length, "peak_lr": rates}
    return {"settings": settings, **analysis.summarise(results, costs)}
