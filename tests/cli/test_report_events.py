"""What happened to a run, as the report shows it: marks at the right places on every curve, and a table."""

import json
import re

import numpy as np

from tests.cli import test_report as base
from v4train.cli.report_page import charts, events, line_chart, page, runs

write = base.write


def _rollback(step, **changes):
    told = {"kind": "rollback", "step": step, "spike": step - 1, "reason": "loss", "value": 9.0, "limit": 4.5, "median": 4.0}
    return told | {"snapshot": step - 4, "first_batch": step - 4, "last_batch": step - 1} | changes


def _change(step, what):
    return {"kind": "change", "step": step, "what": what, "rows": 8, "sequence_length": 64}


def test_rollbacks_and_changes_are_marked_on_every_curve_and_listed(write):
    never = _rollback(12, reason="gradient")  # of an attempt that was killed: the summary does not know it
    more = [_change(20, "16 rows of 96 tokens a step"), _rollback(30), never, {"kind": "anticipate", "step": 30, "on": 1}]
    rollbacks = [_rollback(30), _rollback(36, reason="not_finite", value=None, limit=None, first_batch=35, last_batch=35)]
    run = base._read(write([*base._log(), *more], summary={"steps": base.STEPS, "rollbacks": rollbacks}))
    assert [(event.first, event.last, event.kind, event.left_out) for event in events.of(run)] == [
        (20, 20, "change", 0),
        (26, 30, "rollback", 4),
        (30, 30, "change", 0),
        (35, 36, "rollback", 1),
    ]
    text = page.write([run])
    words = " ".join(base._Page(text).texts)
    assert "2 rollbacks, 5 batches left out: bands in the charts." in words
    assert "the loss was 9, above 4.5 at step 29; back to the state of step 26, without batches 26 to 29" in words
    assert "loss or gradient were not finite at step 35; back to the state of step 32, without batch 35" in words
    assert "16 rows of 96 tokens a step" in words
    assert "routing is anticipated" in words
    drawn = re.findall(r'<path class="event (\w+)" d="M([\d.]+),(\d+)H([\d.]+)V(\d+)H[\d.]+Z"><title>step (\d+): ', text)
    assert len(drawn) == 4 * len(charts.build([run]).all)
    wide = next(group for group in re.findall(r'<svg viewBox="0 0 (\d+) 270".*?<g class="events">(.*?)</g>', text))
    left, right = line_chart.LEFT, int(wide[0]) - line_chart.RIGHT
    ends = [[(float(x) - left) / (right - left) * base.STEPS for x in pair] for pair in re.findall(r'd="M([\d.]+),12H([\d.]+)V', wide[1])]
    np.testing.assert_allclose(ends, [[20, 20], [26, 30], [30, 30], [35, 36]], atol=0.02)
    data = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    assert data["marks"][1]["ends"] == {"step": [26, 30], "tokens": [2600, 3000], "seconds": [52, 60]}


def test_without_a_summary_the_rollbacks_are_those_of_the_metrics_and_broken_ones_are_left_out(write):
    run = base._read(write([*base._log(), _rollback(30), _rollback(33, first_batch="x")]))
    assert [event.last for event in events.of(run)] == [30]
    assert "Rollbacks and changes" not in page.write([base._read(write(name="calm"))])


def test_the_events_of_several_runs_name_and_colour_their_run(write):
    paths = [write([*base._log(), _rollback(30)], name="one"), write([*base._log(), _change(9, "<b>")], name="two")]
    text = page.write(runs.read_runs(paths))
    told = "the loss was 9, above 4.5 at step 29; back to the state of step 26, without batches 26 to 29"
    marks = {("event rollback c0 of-run", f"one, step 30: {told}"), ("event change c1 of-run", "two, step 9: &lt;b&gt;")}
    assert set(re.findall(r'<path class="(event [^"]*)"[^>]*><title>([^<]*)</title>', text)) == marks
