"""Which parameters Muon trains, and which decay: their declarations, and what a recipe says about some of their tags.

A recipe chooses by role, never by name: a parameter has a role because its declaration has the tag. What comes out are declarations again,
so the optimizer, its state, the checkpoint, the planner and the count of FLOPs all follow the one answer.
"""

import dataclasses

from v4train.core import param
from v4train.optim.config import CommonConfig, OptimizerConfig


def assign(config: CommonConfig, declarations: dict) -> dict:
    """The declarations as the optimizer treats them: group, decay and heads as the recipe says.

    Args:
        config: of the whole optimizer. A hybrid without Muon has every trained parameter in the other group; for transforms of optax the
            groups only say what is a matrix, and stay.
        declarations: nested dict, with or without buffers, which stay as they are.
    """
    hybrid = config if isinstance(config, OptimizerConfig) else None
    groups = {"router_gate": hybrid.router_gates, "position_table": hybrid.position_tables} if hybrid else {}
    decays = {
        "norm": config.decays.norms,
        "position_table": config.decays.position_tables,
        "sink": config.decays.sinks,
        "hyper_gate": config.decays.hyper_gates,
    }

    def of(_: str, declaration: param.Declaration) -> param.Declaration:
        if not declaration.trained:
            return declaration
        group = "adamw" if hybrid and hybrid.muon is None else _by_tag(declaration, groups, declaration.group)
        decay = _by_tag(declaration, decays, declaration.decay)
        heads = declaration.heads if hybrid and hybrid.muon and hybrid.muon.head_wise and group == "muon" else 1
        return dataclasses.replace(declaration, group=group, decay=decay, heads=heads)

    return param.map_declarations(of, declarations)  # pyright: ignore[reportReturnType]


def _by_tag(declaration: param.Declaration, choices: dict, otherwise):
    """What is chosen for the declaration's role; a parameter has at most one."""
    found = [choice for tag, choice in choices.items() if tag in declaration.tags]
    assert len(found) <= 1, f"several roles: {sorted(declaration.tags)}"
    return found[0] if found else otherwise
