"""Put the page together."""

import html

from v4train.cli.html_page import frame
from v4train.cli.report_page import charts, curves, events, figures, heat_map, line_chart, script, style, tables
from v4train.cli.report_page import runs as runs_lib


def write(runs: list[runs_lib.Run]) -> str:
    """The report on these runs: one HTML document that refers to nothing outside itself."""
    known = [figures.of(run) for run in runs]
    drawn = charts.build(runs)
    choices, marks = line_chart.axes(drawn.abscissas), events.marks(runs)
    title = runs[0].name if len(runs) == 1 else ", ".join(run.name for run in runs)
    top = _single(runs[0], known=known[0]) if len(runs) == 1 else _several(runs, known=known)
    sections, number = [], 0
    parts = (
        ("Loss", drawn.loss),
        ("Terms of the objective", drawn.terms),
        ("Evaluations", drawn.asked),
        ("Optimisation and speed", drawn.training),
    )
    for heading, part in parts:
        sections.append(frame.section(heading, _grid(part, first=number, drawn=drawn, choices=choices, marks=marks)))
        number += len(part)
    maps = "".join(
        heat_map.figure(run, title="Expert load" if len(runs) == 1 else f"Expert load: {run.name}", number=i) for i, run in enumerate(runs)
    )
    sections.append(frame.section("Experts", _grid(drawn.experts, first=number, drawn=drawn, choices=choices, marks=marks) + maps))
    body = "".join([top, events.section(runs), _controls(choices) if drawn.all else _too_early(), *sections, _recipes(runs)])
    data = line_chart.page_data(drawn.all, abscissas=drawn.abscissas, choices=choices, marks=marks)
    return frame.document(body, title=f"Training report: {title}", sheet=style.sheet(), script=script.SOURCE, data={"charts": data})


def _single(run: runs_lib.Run, *, known: figures.Figures) -> str:
    return (
        f"<header><h1>{html.escape(run.name)}</h1>{_status(known)}"
        f'<p class="sub">Training report. Metrics up to step {run.last_step:,}, written {run.written:%Y-%m-%d %H:%M} UTC.</p></header>'
        f"{frame.notes(run.notes)}{tables.tiles(known)}{tables.held_out(known)}"
    )


def _several(runs: list[runs_lib.Run], *, known: list[figures.Figures]) -> str:
    newest = max(run.written for run in runs)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return (
        f'<header><h1>{len(runs)} runs compared</h1><p class="sub">Training report. Metrics up to {newest:%Y-%m-%d %H:%M} UTC.</p></header>'
        f"{frame.notes(notes)}{tables.comparison(runs, known=known)}{tables.recipe_differences(runs)}"
    )


def _status(known: figures.Figures) -> str:
    return f'<span class="status {html.escape(known.status)}">{html.escape(known.status)}</span>'


def _too_early() -> str:
    return '<p class="remark">No curve yet: a chart appears as soon as its quantity has been logged twice.</p>'


def _controls(choices: dict[str, dict]) -> str:
    """The choice of the abscissa, shown by the script."""
    names = {clock: {"seconds": "time"}.get(clock, clock) for clock in choices}
    parts = []
    if len(choices) > 1:
        parts.append(frame.radio("clock", names, label="Horizontal axis"))
    parts.append(frame.radio("log", {"linear": "linear", "log": "logarithmic"}, label="Scale"))
    return f'<form class="controls" hidden>{"".join(parts)}</form>'


def _grid(part: list[curves.Chart], *, first: int, drawn: charts.Charts, choices: dict[str, dict], marks: list[events.Mark]) -> str:
    """Two charts a row; one left over takes the whole row."""
    cells = [
        line_chart.figure(
            chart,
            number=first + i,
            abscissas=drawn.abscissas,
            choices=choices,
            marks=marks,
            wide=i == len(part) - 1 and len(part) % 2 == 1,
        )
        for i, chart in enumerate(part)
    ]
    return f'<div class="grid2">{"".join(cells)}</div>' if cells else ""


def _recipes(runs: list[runs_lib.Run]) -> str:
    items = [
        f"<details><summary>Resolved recipe{f' of {html.escape(run.name)}' if len(runs) > 1 else ''}</summary>"
        f'<pre tabindex="0">{html.escape(run.recipe_text)}</pre></details>'
        for run in runs
        if run.recipe_text
    ]
    return frame.section("Recipe", "".join(items))
