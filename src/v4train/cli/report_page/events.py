"""What happened to a run beside learning: rollbacks with the batches they left out, and changes of its batches, its model or its routing.

Each is a mark on the curves and a row of a table. A rollback is a band over the batches that were left out; a change is a line where the
first step of the new kind begins. The rollbacks come from `summary.json` if it describes the end of the metrics, else from the metrics,
where an attempt that was killed may have left one that the run that counts did not make.
"""

import dataclasses
import html
from collections.abc import Mapping
from typing import Literal

import numpy as np

from v4train.cli.html_page import frame, style, table
from v4train.cli.report_page import curves
from v4train.cli.report_page import runs as runs_lib

_ROWS = 40  # of a table, at most: a ramp of the batch has a change for each of its stairs
_REASONS = {"not_finite": "loss or gradient were not finite", "loss": "the loss", "gradient": "the gradient norm"}


@dataclasses.dataclass(frozen=True)
class Event:
    """One of them.

    Attributes:
        first, last: where its mark begins and ends, in steps done; the same for a change.
        kind: ``rollback`` or ``change``.
        what: in words.
        left_out: batches that a rollback left out.
    """

    first: int
    last: int
    kind: Literal["rollback", "change"]
    what: str
    left_out: int = 0


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event on the charts.

    Attributes:
        style: class of the mark; with several runs it has the colour of its run.
        label: what the reader sees when pointing at it.
        ends: where it begins and ends by each clock, f64[2].
    """

    style: str
    label: str
    ends: curves.Abscissa


def of(run: runs_lib.Run) -> list[Event]:
    """The events of a run in their order."""
    found = [_rollback(told) for told in _rollbacks(run)]
    found += [Event(told["step"], told["step"], "change", _change(told)) for told in run.changes]
    return sorted((event for event in found if event is not None), key=lambda event: event.last)


def marks(runs: list[runs_lib.Run]) -> list[Mark]:
    """The events of all runs, as marks."""
    found = []
    for i, run in enumerate(runs):
        for event in of(run):
            colour = f" c{i % style.HUES} of-run" if len(runs) > 1 else ""
            label = f"{f'{run.name}, ' if len(runs) > 1 else ''}step {event.last:,}: {event.what}"
            found.append(Mark(f"event {event.kind}{colour}", label, curves.abscissa(run, steps=np.array([event.first, event.last]))))
    return found


def section(runs: list[runs_lib.Run]) -> str:
    """The table of all events, with what the marks mean; "" if there are none."""
    lines = [(run, event) for run in runs for event in of(run)]
    if not lines:
        return ""
    several = len(runs) > 1
    rows = []
    for run, event in lines[:_ROWS]:
        named = [table.cell(run.name)] if several else []
        out = f"{event.left_out:,}" if event.left_out else ""
        rows.append([table.head(f"{event.last:,}"), *named, table.cell(event.kind), table.cell(event.what), table.cell(out)])
    heads = ["from step", *(["run"] if several else []), "event", "what", "batches left out"]
    total = sum(event.left_out for _, event in lines)
    rollbacks = sum(event.kind == "rollback" for _, event in lines)
    told = [f"The first {_ROWS} of {len(lines)} events are listed."] if len(lines) > _ROWS else []
    if rollbacks:
        told.append(f"{rollbacks} rollback{'s' if rollbacks > 1 else ''}, {total:,} batches left out: bands in the charts.")
    if rollbacks < len(lines):
        told.append("Changes are lines in the charts.")
    remark = f'<p class="remark">{html.escape(" ".join(told))}</p>'
    return frame.section("Rollbacks and changes", table.table(heads, rows, caption="What happened, in steps done", text=True) + remark)


def _rollbacks(run: runs_lib.Run) -> list[Mapping]:
    known = run.finished_summary.get("rollbacks")
    return [told for told in known if isinstance(told, dict)] if isinstance(known, list) else list(run.rollbacks)


def _rollback(told: Mapping) -> Event | None:
    """None for a line that does not say which batches were left out."""
    places = [told.get(name) for name in ("first_batch", "last_batch", "spike", "snapshot")]
    known = [place for place in places if isinstance(place, int)]
    if len(known) < len(places):
        return None
    first, last, spike, snapshot = known
    reason = _REASONS.get(str(told.get("reason")), str(told.get("reason")))
    value, limit = told.get("value"), told.get("limit")
    if isinstance(value, int | float) and isinstance(limit, int | float):
        reason = f"{reason} was {value:.4g}, above {limit:.4g}"
    batches = f"batches {first:,} to {last:,}" if last > first else f"batch {first:,}"
    what = f"{reason} at step {spike:,}; back to the state of step {snapshot:,}, without {batches}"
    return Event(first, last + 1, "rollback", what, last + 1 - first)


def _change(told: Mapping) -> str:
    if told["kind"] == "anticipate":
        return "routing is anticipated" if told.get("on") else "routing is the usual one again"
    return str(told.get("what", "")) or "the step changed"
