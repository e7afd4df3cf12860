"""Which charts a report shows.

With one run, colour tells the data sources apart; with several, colour tells the runs apart and every source gets a chart of its
own. Everything else follows from what was logged: a field that no run has makes no chart, and a section without charts is left out.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from v4train.cli.report_page import curves
from v4train.cli.report_page import runs as runs_lib

NATS = "nats"
NEUTRAL = 7  # style without a hue
TERMS = {
    "loss": ("Total training loss", NATS),
    "loss/mtp": ("Multi-token prediction", NATS),
    "loss/indexer": ("Indexer alignment", NATS),
    "loss/balance": ("Balance loss", "mean over learned routers, 1 = uniform"),
}


@dataclasses.dataclass(frozen=True)
class Charts:
    """The line charts of a page, by section, and the abscissas that their curves refer to."""

    loss: list[curves.Chart]
    terms: list[curves.Chart]
    asked: list[curves.Chart]
    training: list[curves.Chart]
    experts: list[curves.Chart]
    abscissas: list[curves.Abscissa]

    @property
    def all(self) -> list[curves.Chart]:
        """In the order of the page."""
        return [*self.loss, *self.terms, *self.asked, *self.training, *self.experts]


def build(runs: list[runs_lib.Run]) -> Charts:
    """All charts for these runs."""
    abscissas = []
    for run in runs:
        train_steps = run.train.steps[curves.kept(len(run.train.steps))]
        expert_steps = np.array([load.step for load in run.experts], np.int64)
        abscissas += [curves.abscissa(run, steps=steps) for steps in (train_steps, run.evaluation.steps, expert_steps)]
    return Charts(
        loss=_present(_loss(runs)),
        terms=_present([_by_run(runs, field, title=title, unit=unit) for field, (title, unit) in TERMS.items()]),
        asked=_present(_asked(runs)),
        training=_present(_training(runs)),
        experts=_present(_experts(runs)),
        abscissas=abscissas,
    )


def _present(charts: list[curves.Chart | None]) -> list[curves.Chart]:
    return [chart for chart in charts if chart is not None]


def _loss(runs: list[runs_lib.Run]) -> list[curves.Chart | None]:
    sources = runs_lib.sources(runs)
    smoothed = any(curves.half_window(len(run.train.steps)) for run in runs)
    markers = "Markers: held-out." if any(len(run.evaluation.steps) for run in runs) else ""
    remark = f"Lines: training{' (faint as logged, solid smoothed)' if smoothed else ''}. {markers}".rstrip()
    trained = {name for run in runs for name in run.train.columns}
    if len(runs) > 1:
        return [
            curves.chart(
                f"Loss: {source}",
                unit=NATS,
                remark=remark if f"loss/{source}" in trained else markers,
                curves=[curve for i, run in enumerate(runs) for curve in _source(run, source, number=i, key=run.name, style=i)],
            )
            for source in sources
        ]
    every = [curve for style, source in enumerate(sources) for curve in _source(runs[0], source, number=0, key=source, style=style)]
    return [curves.chart("Loss by source", unit=NATS, curves=every, remark=remark)]


def _source(run: runs_lib.Run, source: str, *, number: int, key: str, style: int) -> list[curves.Curve]:
    held_out = run.evaluation.column(f"loss/{source}")
    train = _logged(run, f"loss/{source}", number=number, key=key, style=style, label=f"{key}, train")
    return [*train, curves.Curve(f"{key}, held-out", key, style, "points", 3 * number + 1, held_out)]


def _logged(run: runs_lib.Run, field: str, *, number: int, key: str, style: int, label: str, smoothed: bool = True) -> list[curves.Curve]:
    """A field of the train lines: as logged, and smoothed on top if the curve is long enough to be smoothed."""
    values = run.train.column(field)
    half = curves.half_window(len(values)) if smoothed else 0
    if not half:
        return [curves.Curve(label, key, style, "line", 3 * number, curves.thin(values))]
    soft = curves.smooth(values, half=half)[curves.kept(len(values))]
    return [
        curves.Curve(f"{label}, as logged", key, style, "raw", 3 * number, curves.thin(values)),
        curves.Curve(label, key, style, "line", 3 * number, soft),
    ]


def _by_run(runs: list[runs_lib.Run], field: str, *, title: str, unit: str, smoothed: bool = True, **options) -> curves.Chart | None:
    """One chart of a field of the train lines, a colour per run."""
    every = []
    for i, run in enumerate(runs):
        label = run.name if len(runs) > 1 else title.lower()
        every += _logged(run, field, number=i, key=run.name, style=i, label=label, smoothed=smoothed)
    return curves.chart(title, unit=unit, curves=every, **options)


def _asked(runs: list[runs_lib.Run]) -> list[curves.Chart | None]:
    """Of the evaluations: bits per byte, and shares of right answers; a chart a group, or with several runs a chart a quantity."""
    fields = list(dict.fromkeys(name for run in runs for name in run.evaluation.columns))
    shares = [name for name in fields if name.count("/") == 1 and name.endswith(("/accuracy", "/right"))]
    groups = (
        ("Held-out text", "bits per byte", [name for name in fields if name.startswith("bpb/")]),
        ("Held-out text by what its documents hold", "bits per byte", [name for name in fields if name.startswith("modality_bpb/")]),
        ("Right answers", "share", shares),
    )

    def curve(run: runs_lib.Run, field: str, *, number: int, key: str, style: int) -> curves.Curve:
        return curves.Curve(key, key, style, "marked", 3 * number + 1, run.evaluation.column(field))

    charts = []
    for title, unit, names in groups:
        short = {name: name.partition("/")[0 if unit == "share" else 2] for name in names}
        if len(runs) == 1:
            every = [curve(runs[0], name, number=0, key=short[name], style=i) for i, name in enumerate(names)]
            charts.append(curves.chart(title, unit=unit, curves=every, from_zero=unit == "share"))
        else:
            for name in names:
                every = [curve(run, name, number=i, key=run.name, style=i) for i, run in enumerate(runs)]
                charts.append(curves.chart(f"{title}: {short[name]}", unit=unit, curves=every, from_zero=unit == "share"))
    return charts


def _training(runs: list[runs_lib.Run]) -> list[curves.Chart | None]:
    return [
        _by_run(runs, "learning_rate", title="Learning rate", unit="", smoothed=False, from_zero=True),
        _by_run(runs, "grad_norm", title="Gradient norm", unit="global L2 norm", from_zero=True, may_log=True, remark=_skipped(runs)),
        _by_run(runs, "tokens_per_second", title="Throughput", unit="tokens per second", from_zero=True),
        _by_run(runs, "mfu", title="Model FLOPs utilisation", unit="fraction of peak", from_zero=True),
    ]


def _skipped(runs: list[runs_lib.Run]) -> str:
    """How many updates were skipped. The field is a flag of the step, or a running count: one that never falls or exceeds 1."""
    parts = []
    for run in runs:
        values = run.train.column("skipped")
        values = values[np.isfinite(values)]
        if not values.size or not values.any():
            continue
        rises = np.diff(values, prepend=0.0)
        total = int(np.maximum(rises, 0).sum() if values.max() > 1 or (rises >= 0).all() else values.sum())
        parts.append(f"{f'{run.name}: ' if len(runs) > 1 else ''}{total:,} update{'s' if total > 1 else ''} skipped.")
    return " ".join(parts)


def _experts(runs: list[runs_lib.Run]) -> list[curves.Chart | None]:
    """Load of the busiest expert over time, for the worst and for the median layer."""
    if len(runs) > 1:
        wanted = [(run.name, modality, i, i) for i, run in enumerate(runs) for modality in _whole(run)]
    else:
        wanted = [(name, name, 0, style) for name, style in _modality_styles(runs[0]).items()]
    charts = []
    for title, reduce in (("Busiest expert, worst layer", np.max), ("Busiest expert, median layer", np.median)):
        every = []
        for key, modality, number, style in wanted:
            values = np.array([_busiest(load, modality, reduce=reduce) for load in runs[number].experts])
            every.append(curves.Curve(key, key, style, "marked", 3 * number + 2, values))
        charts.append(curves.chart(title, unit="multiple of the uniform load", curves=every))
    return charts


def _modality_styles(run: runs_lib.Run) -> dict[str, int]:
    """Modality -> style: the colour that the source of this name has in the chart of losses; neutral for all tokens."""
    styles = {name: style for style, name in enumerate(runs_lib.sources([run]))}
    names = dict.fromkeys(name for load in run.experts for name in load.load)
    for name in names:
        styles.setdefault(name, NEUTRAL if name == "all" else len(styles))
    return {name: style for name, style in styles.items() if name in names}


def _whole(run: runs_lib.Run) -> list[str]:
    """The load over all tokens, or the first there is."""
    names = list(run.experts[-1].load) if run.experts else []
    return ["all"] if "all" in names else names[:1]


def _busiest(load: runs_lib.ExpertLoad, modality: str, *, reduce: Callable[[np.ndarray], np.floating]) -> float:
    table = load.load.get(modality)
    if table is None or not np.isfinite(table).any():
        return np.nan
    return float(reduce(np.nanmax(table[np.isfinite(table).any(axis=1)], axis=1)))
