"""The plan as plain values, for JSON and for whoever reads it with another program. Bytes are per device unless their name says more."""

import dataclasses
from typing import Any

from v4train.model import config as model_config
from v4train.model import flops
from v4train.plan import comms, cost, estimate, low_precision, search


def as_json(plan: estimate.Estimate, *, remedy: search.Change | None = None) -> dict[str, Any]:
    """Everything that a plan says."""
    counted, recipe = plan.parameters, plan.recipe
    return {
        "recipe": recipe.name,
        "machine": {
            "chip": plan.on.name,
            "devices": plan.on.devices,
            "slices": plan.on.slices,
            "memory_bytes": plan.on.chip.hbm_bytes,
            "usable_bytes": round(plan.on.usable_bytes),
            "bf16_flops": plan.on.chip.bf16_flops,
        },
        "mesh": recipe.mesh.sizes,
        "parameters_total": counted.total,
        "parameters_active": counted.active,
        "parameters_mtp": counted.mtp,
        "parameters_mtp_active": counted.mtp_active,
        "parameters_by_kind": counted.by_kind,
        "parameters_per_device": plan.stored_by_kind,
        "fits": plan.fits,
        "bytes_total": round(plan.worst.memory.total),
        "remedy": None if remedy is None else dataclasses.asdict(remedy),
        "phases": [_phase(plan, phase) for phase in plan.phases],
        "cost": dataclasses.asdict(plan.bill) | {"price": plan.price, "chip_hours_at_reference_mfu": plan.chip_hours(mfu=cost.V3_MFU)},
        "reference": reference(),
        "assumptions": dataclasses.asdict(plan.assumed) | {"network": comms.EFFICIENCY},
        "low_precision": {role.name: role.units for role in low_precision.of(recipe, platform=estimate.platform_of(plan.on)).values()},
    }


def _phase(plan: estimate.Estimate, phase: estimate.Phase) -> dict[str, Any]:
    model, times = phase.model, phase.timing
    return {
        "shape": phase.shape._asdict(),
        "attention": phase.attention,
        "steps": phase.steps,
        "tokens_per_step": phase.shape.places,
        "bytes_total": round(phase.memory.total),
        "bytes_by_cause": {cause: round(size) for cause, size in phase.memory.at_peak.items()},
        "bytes_each_at_its_worst": {cause: round(size) for cause, size in phase.memory.parts.items()},
        "worst_moment": phase.memory.moment,
        "evaluation_cache_bytes": round(phase.memory.evaluation),
        "flops_per_token": dataclasses.asdict(flops.training(model, length=phase.shape.sequence_length)),
        "flops_per_token_total": flops.training(model, length=phase.shape.sequence_length).total,
        "optimizer_flops": dataclasses.asdict(times.update),
        "optimizer_flops_share": times.update.total / (times.update.total + times.flops),
        "forward_flops_by_layer_kind": by_layer_kind(model, length=phase.shape.sequence_length),
        "transfers": [dataclasses.asdict(one) | {"seconds": seconds} for one, seconds in timed(plan, phase)],
        "seconds": {
            "products": times.products,
            "vector": times.vector,
            "network": times.network,
            "exposed": times.exposed,
            "optimizer": times.optimizer,
            "step": times.step,
        },
        "mfu": times.mfu,
        "tokens_per_second": times.tokens / times.step,
        "tokens_per_second_per_device": times.tokens / times.step / plan.on.devices,
    }


def by_layer_kind(model: model_config.ModelConfig, *, length: int) -> dict[str, dict[str, float]]:
    """FLOPs per token of a forward pass for one layer of each kind, and how many there are."""
    found = {}
    for name in dict.fromkeys(model.layer_kinds):
        one = flops.layer(model, model.kind(name), length=length)
        found[name] = {"layers": model.layer_kinds.count(name), **dataclasses.asdict(one), "total": one.total}
    return found


def timed(plan: estimate.Estimate, phase: estimate.Phase) -> list[tuple[comms.Transfer, float]]:
    """The transfers of a step, longest first, with the seconds that each takes alone."""
    sizes = plan.recipe.mesh.sizes
    found = [(one, comms.seconds(one, sizes=sizes, on=plan.on)) for one in phase.transfers]
    return sorted(found, key=lambda pair: -pair[1])


def reference() -> dict[str, Any]:
    """DeepSeek-V3's published bill, and what the formula makes of its published shape and speed."""
    stages = cost.v3_hours()
    return {
        "name": "DeepSeek-V3",
        "chip": cost.V3_CHIP,
        "mfu": cost.V3_MFU,
        "stages": [dataclasses.asdict(stage) | {"hours": hours} for stage, hours in stages],
        "pre_training_hours": stages[0][1],
        "total_hours": sum(hours for _, hours in stages) + cost.V3_POST_TRAINING_HOURS,
        "published_pre_training_hours": stages[0][0].published_hours,
        "published_total_hours": cost.V3_TOTAL_HOURS,
    }


def candidates_as_json(found: list[search.Candidate]) -> list[dict[str, Any]]:
    """Ranked meshes."""
    return [
        {
            "mesh": one.recipe.mesh.sizes,
            "microbatches": one.recipe.train.microbatches,
            "fits": one.fits,
            "bytes_total": round(one.total),
            "step_seconds": one.phase.timing.step,
            "mfu": one.phase.timing.mfu,
        }
        for one in found
    ]
