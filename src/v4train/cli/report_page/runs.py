"""Read a run directory into arrays.

`metrics.jsonl` is written by a process that may die at any byte and be resumed from an older checkpoint, so the file is a log and
not a table: steps can occur twice, a line can be cut, the clock can start again. Reading makes it a table and keeps a *note* for
each liberty taken, which the page prints. The rules:

- of several lines of one kind and step, the last one counts (the attempt that the run continued from);
- a line that is not a JSON object with a kind and a whole step is dropped;
- `null` is how the trainer writes a non-finite number; it becomes NaN, and NaN becomes a gap in the curve;
- a clock that goes back was restarted: its time is added to that of the attempts before.

A missing field is never an error: runs outlive the trainers that wrote them.
"""

import collections
import dataclasses
import datetime
import json
import math
import pathlib

import numpy as np

METRICS = "metrics.jsonl"
AUXILIARY = ("mtp", "indexer", "balance")  # names after "loss/" that are terms of the objective, not data sources
MODALITIES = ("text", "image", "audio")  # sources of these names come first, in this order


@dataclasses.dataclass(frozen=True)
class Lines:
    """All lines of one kind, one row a step.

    Attributes:
        steps: i64[n], ascending, each once.
        columns: field name -> f64[n], NaN where the field is missing, null or not a number.
    """

    steps: np.ndarray
    columns: dict[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """f64[n]; all NaN if no line has the field."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))


@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """Load of the routed experts at one step, as a multiple of the uniform share.

    Attributes:
        load: modality -> f64[layers, experts].
        layers: one label per layer.
    """

    step: int
    load: dict[str, np.ndarray]
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a report says about one run. ``summary`` is empty until the run has ended; ``rollbacks`` and ``changes`` are as logged."""

    name: str
    train: Lines
    evaluation: Lines
    experts: tuple[ExpertLoad, ...]
    rollbacks: tuple[dict, ...]
    changes: tuple[dict, ...]
    summary: dict
    recipe: dict
    recipe_text: str
    notes: tuple[str, ...]
    written: datetime.datetime

    @property
    def last_step(self) -> int:
        return max([int(lines.steps[-1]) for lines in (self.train, self.evaluation) if len(lines.steps)], default=0)

    @property
    def finished_summary(self) -> dict:
        """The summary if it describes the end of the metrics, else nothing: a resumed run still holds the one of its first attempt."""
        steps = self.summary.get("steps")
        return self.summary if isinstance(steps, int | float) and steps >= self.last_step else {}


def read_runs(paths: list[pathlib.Path]) -> list[Run]:
    """Reads run directories; one given twice is read once.

    Raises:
        ValueError: a path is missing, is not a run directory or has no metrics yet.
    """
    directories = list(dict.fromkeys(_run_directory(path) for path in paths))
    return [_read_run(directory, name=name) for directory, name in zip(directories, _names(directories), strict=True)]


def sources(runs: list[Run]) -> list[str]:
    """Names of the data sources that any run has a loss for: known modalities first, then in order of appearance."""
    columns = [name for run in runs for lines in (run.train, run.evaluation) for name in lines.columns]
    names = [name.removeprefix("loss/") for name in columns if name.startswith("loss/")]
    found = [name for name in dict.fromkeys(names) if name not in AUXILIARY]
    return [name for name in MODALITIES if name in found] + [name for name in found if name not in MODALITIES]


def clock(run: Run, *, steps: np.ndarray, field: str) -> np.ndarray:
    """``tokens`` or ``seconds`` at the given steps, f64[n]: as logged, between log lines interpolated, NaN if never logged."""
    pairs: dict[int, float] = {}
    for lines in (run.evaluation, run.train):
        pairs.update((int(step), float(value)) for step, value in zip(lines.steps, lines.column(field), strict=True) if np.isfinite(value))
    if not pairs:
        return np.full(len(steps), np.nan)
    known = np.array(sorted(pairs), float)
    values = np.array([pairs[int(step)] for step in known])
    change = np.diff(values, prepend=0.0)
    return np.interp(steps, known, np.cumsum(np.where(change < 0, values, change)))


def _run_directory(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise ValueError(f"{path}: no such run directory; give the directory that `v4train train` wrote (it holds {METRICS})")
    if not path.is_dir():
        raise ValueError(f"{path}: is a file, not a run directory; give the directory that holds {METRICS}")
    if not (path / METRICS).is_file():
        if not any((path / name).is_file() for name in ("recipe.yaml", "recipe.json")):
            raise ValueError(
                f"{path}: not a run directory: it holds neither {METRICS} nor recipe.yaml; give one that `v4train train` wrote"
            )
        raise ValueError(f"{path}: no metrics: {METRICS} is missing; start the run, or wait until it has logged its first step")
    return path.resolve()


def _names(directories: list[pathlib.Path]) -> list[str]:
    """The shortest trailing parts of the paths that tell the runs apart."""
    for depth in range(1, max(len(path.parts) for path in directories) + 1):
        names = ["/".join(path.parts[-depth:]) for path in directories]
        if len(set(names)) == len(directories):
            break
    return names


def _read_run(path: pathlib.Path, *, name: str) -> Run:
    notes: list[str] = []
    by_kind = _read_log(path / METRICS, notes=notes)
    if not any(by_kind.values()):
        raise ValueError(f"{path}: no metrics: {METRICS} holds no readable line; wait until the run has logged its first step")
    summary = _read_json(path / "summary.json", notes=notes)
    recipe = _read_json(path / "recipe.json", notes=notes)
    recipe_file = path / "recipe.yaml"
    text = (
        recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else json.dumps(recipe, indent=2, sort_keys=True)
    )
    run = Run(
        name=name,
        train=_table(by_kind["train"]),
        evaluation=_table(by_kind["eval"]),
        experts=tuple(load for load in map(_expert_load, by_kind["experts"].values()) if load is not None),
        rollbacks=tuple(by_kind["rollback"].values()),
        changes=tuple(by_kind["change"].values()) + tuple(by_kind["anticipate"].values()),
        summary=summary,
        recipe=recipe,
        recipe_text=text if recipe or recipe_file.is_file() else "",
        notes=(),
        written=datetime.datetime.fromtimestamp((path / METRICS).stat().st_mtime, datetime.UTC),
    )
    return dataclasses.replace(run, notes=(*notes, *_notes_on(run, train=by_kind["train"])))


def _read_log(path: pathlib.Path, *, notes: list[str]) -> dict[str, dict[int, dict]]:
    """Kind -> step -> line, steps ascending."""
    found: dict[str, dict[int, dict]] = {kind: {} for kind in ("train", "eval", "experts", "rollback", "change", "anticipate")}
    repeated: collections.Counter = collections.Counter()
    unreadable: list[int] = []
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        line = _parse(row)
        if line is None:
            unreadable.append(number)
        elif line["kind"] in found:
            steps = found[line["kind"]]
            repeated[line["kind"]] += line["step"] in steps
            steps[line["step"]] = line
    if unreadable and unreadable[-1] == len(rows):
        unreadable.pop()
        notes.append(f"The last line of {METRICS} is cut off (the process was probably killed while writing) and is left out.")
    if unreadable:
        where = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
        notes.append(f"{METRICS}: {_count(len(unreadable), 'unreadable line')} left out (line {where}).")
    if repeated.total():
        kinds = ", ".join(_count(count, f"{kind} line") for kind, count in sorted(repeated.items(), reverse=True) if count)
        notes.append(f"The run was resumed: {kinds} repeated an earlier step; the last line of each step is shown.")
    return {kind: dict(sorted(steps.items())) for kind, steps in found.items()}


def _parse(row: str) -> dict | None:
    try:
        line = json.loads(row)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    step = _number(line.get("step"))
    return line | {"step": int(step)} if step.is_integer() else None


def _number(value: object) -> float:
    """A float; NaN for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _table(lines: dict[int, dict]) -> Lines:
    names = dict.fromkeys(name for line in lines.values() for name in line if name not in ("kind", "step"))
    columns = {name: np.array([_number(line.get(name)) for line in lines.values()]) for name in names}
    return Lines(steps=np.array(list(lines), np.int64), columns=columns)


def _expert_load(line: dict) -> ExpertLoad | None:
    """None if the line holds no rectangular table of loads."""
    given = line.get("load")
    load = {}
    for modality, rows in (given if isinstance(given, dict) else {}).items():
        try:
            table = np.array(rows, float)
        except (TypeError, ValueError):
            continue
        if table.ndim == 2 and table.size:
            load[modality] = np.where(np.isfinite(table), table, np.nan)
    if not load:
        return None
    depth = next(iter(load.values())).shape[0]
    named = line.get("layers")
    layers = tuple(map(str, named)) if isinstance(named, list) and len(named) == depth else tuple(f"layer {i}" for i in range(depth))
    return ExpertLoad(step=line["step"], load={name: table for name, table in load.items() if len(table) == depth}, layers=layers)


def _read_json(path: pathlib.Path, *, notes: list[str]) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object and is left out.")
        return {}
    return value


def _notes_on(run: Run, *, train: dict[int, dict]) -> list[str]:
    notes = []
    if not run.summary:
        notes.append("No summary.json: the run is still going on or was killed; figures are taken from the metrics so far.")
    elif not run.finished_summary:
        notes.append("summary.json is older than the metrics (the run was resumed); figures are taken from the metrics so far.")
    for field in ("loss", "grad_norm"):
        steps = [step for step, line in train.items() if field in line and math.isnan(_number(line[field]))]
        if steps:
            word = "is" if len(steps) == 1 else "are"
            notes.append(f"{_count(len(steps), f'value of {field}', f'values of {field}')} {word} not finite (first at step {steps[0]:,}).")
    return notes


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
