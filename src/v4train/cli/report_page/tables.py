"""Tiles and tables, as HTML."""

import html
import json

from v4train.cli.html_page import scale, table
from v4train.cli.report_page import figures, line_chart
from v4train.cli.report_page import runs as runs_lib

ABSENT = "–"


def tiles(run: figures.Figures) -> str:
    """The row of summary figures of a single run; unknown figures have no tile."""
    candidates = [
        ("Steps", f"{run.steps:,}", ""),
        ("Tokens", scale.count(run.tokens), ""),
        ("Training time", scale.duration(run.seconds), "without compilation"),
        ("Throughput", scale.count(run.speed), "tokens/s, median"),
        ("MFU", "–" if run.mfu is None else f"{run.mfu:.1%}", "median"),
        ("Parameters", scale.count(run.parameters), "" if run.active is None else f"{scale.count(run.active)} active"),
        ("Train loss", scale.plain(run.train_loss), "nats, at the end"),
        ("Peak memory", scale.size(run.memory), "of one process"),
        ("Compilation", scale.duration(run.compilation), "" if run.first_step is None else f"first step {scale.duration(run.first_step)}"),
    ]
    shown = [(name, value, note) for name, value, note in candidates if value != ABSENT]
    return table.tiles(shown)


def held_out(run: figures.Figures) -> str:
    """Held-out loss by source: first, last, ratio. "" if nothing was evaluated."""
    if not run.held_out:
        return ""
    again = any(h.ratio is not None for h in run.held_out.values())
    head = ["source", "first, nats", *(["last, nats", "last / first", ""] if again else [])]
    rows = []
    for name, h in run.held_out.items():
        later = [_number(h.last), _number(h.ratio, digits=3), _bar(h.ratio)] if again else []
        rows.append([table.head(name), _number(h.first), *later])
    return table.table(head, rows, caption="Held-out loss by source")


def comparison(runs: list[runs_lib.Run], *, known: list[figures.Figures]) -> str:
    """One column a run, one row a figure that any run has. The best of a row is marked where one direction is better."""
    sources = dict.fromkeys(name for run in known for name in run.held_out)
    lines: list[tuple[str, list[float | None], str, int]] = [  # head, values, notation, better direction
        ("steps", [run.steps for run in known], "whole", 0),
        ("tokens", [run.tokens for run in known], "count", 0),
        ("training time", [run.seconds for run in known], "duration", 0),
        ("tokens/s, median", [run.speed for run in known], "count", 1),
        ("MFU, median", [run.mfu for run in known], "percent", 1),
        ("parameters", [run.parameters for run in known], "count", 0),
        ("active parameters", [run.active for run in known], "count", 0),
        ("peak memory of one process", [run.memory for run in known], "size", 0),
        ("train loss at the end", [run.train_loss for run in known], "plain", -1),
        *((f"held-out loss, {name}", [_last(run, name) for run in known], "plain", -1) for name in sources),
    ]
    rows = [[table.head("status"), *(f"<td>{html.escape(run.status)}</td>" for run in known)]]
    for head, values, notation, direction in lines:
        if all(value is None for value in values):
            continue
        best = _best(values, direction=direction)
        mark = ' class="best" title="best of the runs"'
        cells = (
            f"<td{mark if value is not None and value == best else ''}>{html.escape(_write(value, notation))}</td>" for value in values
        )
        rows.append([table.head(head), *cells])
    heads = [f"{line_chart.swatch(i)}{html.escape(run.name)}" for i, run in enumerate(runs)]
    return table.table(["run", *heads], rows, caption="Runs compared; losses in nats, best in bold")


def recipe_differences(runs: list[runs_lib.Run]) -> str:
    """The recipe keys whose values are not the same in all runs, one row a key."""
    flat = [_flatten(run.recipe) for run in runs]
    keys = sorted({key for recipe in flat for key in recipe})
    rows = []
    for key in keys:
        values = [_value(recipe[key]) if key in recipe else ABSENT for recipe in flat]
        if len(set(values)) > 1:
            rows.append(
                [
                    f'<th scope="row"><code>{html.escape(key)}</code></th>',
                    *(f"<td><code>{html.escape(value)}</code></td>" for value in values),
                ]
            )
    if not any(flat):
        return '<p class="remark">No run has a recipe.json to compare.</p>'
    if not rows:
        return '<p class="remark">The resolved recipes are the same.</p>'
    heads = [f"{line_chart.swatch(i)}{html.escape(run.name)}" for i, run in enumerate(runs)]
    return table.table(["key", *heads], rows, caption="Recipe keys that differ", text=True)


def _last(run: figures.Figures, name: str) -> float | None:
    return run.held_out[name].last if name in run.held_out else None


def _best(values: list[float | None], *, direction: int) -> float | None:
    known = [value for value in values if value is not None]
    if not direction or len(set(known)) < 2:
        return None
    return max(known) if direction > 0 else min(known)


def _flatten(value: object, *, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found = {}
    for key, inner in value.items():
        found |= _flatten(inner, path=f"{path}.{key}" if path else str(key))
    return found


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _write(value: float | None, notation: str) -> str:
    match notation:
        case "whole":
            return ABSENT if value is None else f"{value:,.0f}"
        case "percent":
            return ABSENT if value is None else f"{value:.1%}"
        case "count":
            return scale.count(value)
        case "duration":
            return scale.duration(value)
        case "size":
            return scale.size(value)
    return scale.plain(value)


def _bar(ratio: float | None) -> str:
    """The ratio as a bar, full at 1."""
    width = 0 if ratio is None else round(100 * min(max(ratio, 0.0), 1.0))
    return f'<td class="bar" aria-hidden="true"><i style="width:{width}%"></i></td>'


def _number(value: float | None, *, digits: int = 4) -> str:
    return f"<td>{html.escape(scale.plain(value, digits=digits))}</td>"
