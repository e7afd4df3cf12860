"""The result of ``v4train bench efficiency`` as a table to read; it is Markdown, so that a page can take it over as it is."""

from typing import Any

from v4train.bench.efficiency import arms


def table(result: dict[str, Any]) -> str:
    """A row for each recipe, and what follows from them."""
    base = result["arms"].get("baseline")
    lines = [
        "| recipe | seeds | final held-out loss, nats | above V4, same seeds | kFLOPs a token | of them optimizer | active "
        "| compute to the baseline's loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in ("baseline", "v4", *arms.LEFT_OUT):
        if arm in result["arms"]:
            lines.append(_row(arm, result["arms"][arm], most=max(len(row["losses"]) for row in result["arms"].values())))
    lines += ["", *_budgets(result)] if "budgets" in result else []
    if base is not None and "v4" in result["arms"]:
        lines += ["", *_verdict(result)]
    return "\n".join(lines)


def _row(arm: str, row: dict[str, Any], *, most: int) -> str:
    """Of a recipe with fewer seeds than others this is said."""
    cost = row["cost"]
    optimizer = cost["newton_schulz"] + cost["elementwise"]
    compute = "1" if arm == "baseline" else _compute(row) if "compute" in row else ""
    cells = [
        row["name"],
        len(row["losses"]) if len(row["losses"]) == most else f"{len(row['losses'])} of {most}",
        f"{row['mean']:.4f}" + (f" ± {row['std']:.4f}" if len(row["losses"]) > 1 else ""),
        f"{row['above_v4']:+.3f}" if "above_v4" in row else "",
        f"{cost['total'] / 1e3:,.0f}",
        f"{optimizer / cost['total']:.1%}",
        f"{cost['active']:,}",
        compute,
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _compute(row: dict[str, Any]) -> str:
    return f"{row['bound']} {row['compute']:.2f}".strip()


def _share(row: dict[str, Any]) -> str:
    return f"{row['bound']} {row['tokens']:.0%}".strip()


def _budgets(result: dict[str, Any]) -> list[str]:
    shares = "| V4 with this share of the tokens | " + " | ".join(f"{b['share']:.0%}" for b in result["budgets"]) + " |"
    losses = "| final held-out loss | " + " | ".join(f"{b['loss']:.4f}" for b in result["budgets"]) + " |"
    return [shares, "| --- |" + " ---: |" * len(result["budgets"]), losses]


def _verdict(result: dict[str, Any]) -> list[str]:
    row, goal = result["arms"]["v4"], result["goal"]
    saved = 1 - row["compute"]
    words = {"": f"{saved:.1%} less compute", "at most": f"at least {saved:.1%} less compute", "more than": "not within its longest run"}
    seeds = ", ".join(_compute(one) for one in row["by_seed"].values())
    lines = [
        f"V4 reaches the baseline's final loss of {goal:.4f} with {_share(row)} of its tokens: {words[row['bound']]}, "
        f"optimizer and mixing of streams included (without the optimizer {row['compute_without_optimizer']:.2f} of the baseline's).",
        f"Seed by seed: {seeds} of the baseline's compute.",
    ]
    if row["bound"] == "more than":
        lines[0] = f"V4 does not reach the baseline's final loss of {goal:.4f} within its longest run."
    return lines
