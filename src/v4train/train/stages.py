"""The stages of a run: from which step on which attention holds, and which weight of the multi-token prediction.

A recipe says what changes (`config.StageConfig`); here it becomes a list of stages with their first steps, on each of which the model is
constant. Where a stage begins is a closed form in the batches' shapes, so a stage is a pure function of the step, like the data
(`data.phases`, which has sequence length, rows and mixture), and depends on nothing that the recipe says about later steps: a run may be
resumed with another future, and with no other past (`history`, `differences`).

A stage changes no parameter, no declaration and no array of the optimizer: the indexer is declared in every phase of attention. So any
checkpoint can be read by any stage. Rejected: a recipe per stage, begun from the last one's checkpoint. It loses the optimizer's moments,
the schedule and the data's position at every change, or needs options to carry each of them over.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from v4train.data import phases as phases_lib
from v4train.model import config as model_config

if TYPE_CHECKING:
    from v4train.train import config as config_lib

Attention = Literal["dense", "warmup", "sparse"]


class Stage(NamedTuple):
    """What may change between steps; None where the model has no such part.

    Attributes:
        attention: phase of the CSA layers (`model.config.CompressedSparseConfig.phase`).
        mtp_weight: `model.config.MtpConfig.loss_weight`.
    """

    attention: Attention | None
    mtp_weight: float | None

    @classmethod
    def of(cls, model: model_config.ModelConfig) -> "Stage":
        """What a model's config says, which holds until a stage changes it."""
        phases: list[Attention] = [kind.phase for kind in model.kinds if isinstance(kind, model_config.CompressedSparseConfig)]
        return cls(phases[0] if phases else None, None if model.mtp is None else model.mtp.loss_weight)

    def model(self, config: model_config.ModelConfig) -> model_config.ModelConfig:
        """The model in this stage: the config with the phase of its CSA kind and the weight of its MTP replaced."""
        return config.at_stage(attention=self.attention, mtp_weight=self.mtp_weight)

    @property
    def evaluated(self) -> "Stage":
        """The stage whose model gives the same predictions for least work: in the indexer's warm-up they are those of dense attention,
        and the weight of a loss term changes none."""
        return Stage("dense" if self.attention == "warmup" else self.attention, None if self.mtp_weight is None else 0.0)


@dataclasses.dataclass(frozen=True)
class Stages:
    """All stages and their first steps, from 0 on; the last has no end."""

    first_steps: tuple[int, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, changes: Sequence["config_lib.StageConfig"], *, model: model_config.ModelConfig, phases: phases_lib.Phases) -> "Stages":
        """From what the recipe says.

        Args:
            changes: `train.stages`.
            model: as the recipe has it, which is the first stage.
            phases: of the data, which say how many tokens come before a step.

        Raises:
            ValueError: stages out of order, or one that changes what the model does not have.
        """
        first_steps, found = [0], [Stage.of(model)]
        for i, change in enumerate(changes):
            where = f"train.stages[{i}]"
            first = change.from_step
            if first is None:
                assert change.from_tokens is not None
                first = phases.first_step_after(change.from_tokens)
            if first <= first_steps[-1]:
                raise ValueError(
                    f"{where} begins at step {first}, but the stage before it begins at step {first_steps[-1]}: move it behind"
                )
            if change.attention is not None and "csa" not in model.layer_kinds:
                raise ValueError(f"{where}.attention is {change.attention}, but no layer of the model is csa: remove it")
            if change.mtp_weight is not None and model.mtp is None:
                raise ValueError(f"{where}.mtp_weight is {change.mtp_weight:g}, but the model has no MTP (model.mtp is null): remove it")
            named = {name: getattr(change, name) for name in Stage._fields}
            first_steps.append(first)
            found.append(found[-1]._replace(**{name: value for name, value in named.items() if value is not None}))
        return cls(tuple(first_steps), tuple(found))

    def at(self, step: int) -> Stage:
        """The one that a step is in."""
        return self.stages[bisect.bisect_right(self.first_steps, step) - 1]

    def history(self, step: int) -> list[dict[str, Any]]:
        """The stages of the steps before ``step``, as JSON; neighbours that are equal are one."""
        found: list[dict[str, Any]] = []
        ends = (*self.first_steps[1:], step)
        for first, end, stage in zip(self.first_steps, ends, self.stages, strict=True):
            if first >= step:
                break
            here = {"from_step": first, "until_step": min(end, step), **stage._asdict()}
            if found and all(found[-1][name] == here[name] for name in Stage._fields):
                here["from_step"] = found.pop()["from_step"]
            found.append(here)
        return found


def unchanging(model: model_config.ModelConfig, *, step: int) -> list[dict[str, Any]]:
    """The history of a run whose recipe has no stages."""
    return Stages((0,), (Stage.of(model),)).history(step)


def differences(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the past (`Stages.history`) is not as it was, a line each; none if the run may go on."""
    lines = []
    edges = sorted({edge for stage in (*saved, *current) for edge in (stage["from_step"], stage["until_step"])})
    for first, end in itertools.pairwise(edges):
        before, now = (next(s for s in stages if s["from_step"] <= first < s["until_step"]) for stages in (saved, current))
        for name in Stage._fields:
            if before.get(name) != now.get(name):
                lines.append(f"steps {first} to {end}: {name} {before.get(name)} in the checkpoint, {now.get(name)} now")
    return lines
