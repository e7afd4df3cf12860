"""The report: what is read from a run, what the figures are, and that the page shows just that, by itself."""

import argparse
import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from v4train.cli import report
from v4train.cli.html_page import scale, style
from v4train.cli.report_page import charts, curves, figures, heat_map, line_chart, page, runs

STEPS = 40


def _train(step, **changes):
    line = {
        "kind": "train",
        "step": step,
        "tokens": 100 * step,
        "seconds": 2.0 * step,
        "loss": 5.0 - step / 20,
        "loss/text": 6.0 - step / 20,
    }
    line |= {"loss/mtp": 7.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 50.0, "mfu": None, "skipped": 0}
    return line | changes


def _eval(step, **changes):
    return {
        "kind": "eval",
        "step": step,
        "tokens": 100 * step,
        "seconds": 2.0 * step,
        "loss/text": 6.0 - step / 20,
        "loss/trio": 5.5,
    } | changes


def _experts(step, load):
    return {"kind": "experts", "step": step, "load": load, "layers": [f"{i} csa" for i in range(len(next(iter(load.values()))))]}


def _log():
    """A run of 40 steps, evaluated at its ends, with expert loads twice."""
    even, skewed = [[1.0, 1.0, 1.0, 1.0]] * 2, [[0.0, 0.5, 1.0, 2.5], [1.0, 1.0, 1.0, 1.0]]
    experts = [_experts(20, {"text": skewed, "all": skewed}), _experts(40, {"text": skewed, "all": even})]
    return [_eval(0), *(_train(step) for step in range(1, STEPS + 1)), _eval(STEPS), *experts]


@pytest.fixture
def write(tmp_path):
    """Writes a run directory and returns its path."""

    def write(lines=None, *, name="run", summary=None, recipe=None, tail="", text="a: 1\n"):
        path = tmp_path / name
        path.mkdir(parents=True)
        rows = [line if isinstance(line, str) else json.dumps(line) for line in (_log() if lines is None else lines)]
        (path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows) + tail, encoding="utf-8")
        (path / "recipe.yaml").write_text(text, encoding="utf-8")
        (path / "recipe.json").write_text(json.dumps({"a": 1} if recipe is None else recipe), encoding="utf-8")
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return path

    return write


def _read(path):
    return runs.read_runs([path])[0]


def _run(*arguments):
    parser = argparse.ArgumentParser()
    report.configure(parser)
    return report.run(parser.parse_args([str(argument) for argument in arguments]))


class _Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects what a test asks for."""

    VOID = frozenset({"meta", "link", "input", "path", "rect", "circle"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.titles, self.elements, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def test_a_resumed_run_keeps_the_last_line_of_each_step_and_says_so(write):
    lines = [_train(1, loss=5.0), _train(2, loss=4.0), _train(3, loss=3.0), _train(2, loss=44.0), _train(3, loss=33.0), _train(4, loss=2.0)]
    run = _read(write(lines))
    assert run.train.steps.tolist() == [1, 2, 3, 4]
    assert run.train.column("loss").tolist() == [5.0, 44.0, 33.0, 2.0]
    assert any("2 train lines repeated an earlier step" in note for note in run.notes)


def test_a_cut_last_line_is_left_out_and_a_broken_one_in_the_middle_is_named(write):
    run = _read(write([_train(1), '{"kind":"tra', "[1]", '{"kind":"train"}', _train(2)], tail='{"kind":"train","step":3,"lo'))
    assert run.train.steps.tolist() == [1, 2]
    assert any("last line of metrics.jsonl is cut off" in note for note in run.notes)
    assert any("3 unreadable lines left out (line 2, 3, 4)" in note for note in run.notes)


def test_non_finite_values_become_gaps_and_are_counted(write):
    lines = [_train(1), _train(2, loss=None), _train(3, grad_norm=None), '{"kind":"train","step":4,"loss":NaN}', _train(5, loss="high")]
    run = _read(write(lines))
    assert np.isnan(run.train.column("loss")).tolist() == [False, True, False, True, True]
    assert "3 values of loss are not finite (first at step 2)." in run.notes
    assert "1 value of grad_norm is not finite (first at step 3)." in run.notes
    assert np.isnan(run.train.column("no such field")).all()


def test_the_clock_of_a_resumed_run_adds_up_and_is_interpolated_for_lines_without_one(write):
    lines = [_train(10, seconds=20.0), _train(20, seconds=40.0), _train(30, seconds=5.0), _train(40, seconds=9.0)]
    run = _read(write(lines))
    assert runs.clock(run, steps=np.array([10, 15, 20, 30, 40]), field="seconds").tolist() == [20.0, 30.0, 40.0, 45.0, 49.0]
    assert np.isnan(runs.clock(run, steps=np.array([1]), field="nothing")).all()


def test_sources_are_what_the_lines_name_without_the_other_terms(write):
    run = _read(write([_eval(0, **{"loss/web-fr": 3.0, "loss/audio": 2.0}), _train(1, **{"loss/balance": 1.0, "loss/indexer": 0.1})]))
    assert runs.sources([run]) == ["text", "audio", "trio", "web-fr"]


def test_malformed_expert_lines_and_json_files_are_survived(write):
    path = write([_train(1), {"kind": "experts", "step": 1}, {"kind": "experts", "step": 2, "load": {"all": [[1], [1, 2]]}}])
    (path / "summary.json").write_text("[]")
    run = _read(path)
    assert run.experts == ()
    assert "summary.json is not a JSON object and is left out." in run.notes


def test_runs_are_named_by_the_shortest_distinct_paths(write):
    paths = [write(name="a/seed0"), write(name="b/seed0"), write(name="c")]
    assert [run.name for run in runs.read_runs(paths[1:])] == ["seed0", "c"]
    assert [run.name for run in runs.read_runs(paths[:2])] == ["a/seed0", "b/seed0"]
    assert len(runs.read_runs([paths[0], paths[0]])) == 1


def test_evaluations_have_charts_of_their_own(write):
    """Bits per byte by source and modality, and shares of right answers; not every record has all."""
    asked = {"bpb/text": 2.0, "modality_bpb/image": 3.0, "questions/accuracy": 0.25, "questions/accuracy_error": 0.1}
    needle = {"needle/right": 0.5, "needle/128/0.5/right": 1.0}
    lines = [_eval(0, **asked), _train(1), _eval(10, **asked, **needle), {"kind": "eval", "step": 20, "tokens": 1, **needle}]
    run = _read(write(lines))
    found = {chart.title: chart for chart in charts.build([run]).asked}
    keys = {"Held-out text": ["text"], "Held-out text by what its documents hold": ["image"], "Right answers": ["questions", "needle"]}
    assert {title: [curve.key for curve in chart.curves] for title, chart in found.items()} == keys
    np.testing.assert_array_equal(found["Right answers"].curves[1].values, [np.nan, 0.5, 0.5])
    assert figures.of(run).held_out["text"].last == 5.5, "the last record that has a loss"
    two = charts.build(runs.read_runs([write(lines, name="a"), write(lines, name="b")])).asked
    assert [chart.title for chart in two][-2:] == ["Right answers: questions", "Right answers: needle"]
    assert [curve.key for curve in two[0].curves] == ["a", "b"]


def test_errors_name_the_path_and_the_remedy(write, tmp_path):
    with pytest.raises(ValueError, match=r"absent: no such run directory; give the directory"):
        _run(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: is a file, not a run directory; give the directory"):
        _run(tmp_path / "file")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other: not a run directory: it holds neither metrics.jsonl nor recipe.yaml"):
        _run(tmp_path / "other")
    (tmp_path / "other" / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match=r"other: no metrics: metrics.jsonl is missing; start the run"):
        _run(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cut: no metrics: metrics.jsonl holds no readable line; wait"):
        _run(write(["{"], name="cut"))
    with pytest.raises(ValueError, match=r"is a directory; give a file"):
        _run(write(name="good"), "--out", tmp_path)
    with pytest.raises(ValueError, match=r"cannot write the page .*; give a writable path with --out"):
        _run(tmp_path / "good", "--out", tmp_path / "file" / "page.html")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2000), (2.6, 9.1), (-3e-5, 7e-5), (0, 3.3e11), (0.999, 1.001)])
@pytest.mark.parametrize("wanted", [3, 5, 9])
def test_ticks_are_the_finest_nice_ones_that_fit(low, high, wanted):
    steps = sorted(float(f"{factor}e{power}") for factor in (1, 2, 5) for power in range(-12, 14))
    step = next(step for step in steps if (high - low) / step <= wanted * (1 + 1e-9))
    expected = [
        i * step
        for i in range(math.floor(low / step) - 1, math.ceil(high / step) + 2)
        if low - 1e-9 * step <= i * step <= high * (1 + 1e-9)
    ]
    ticks = scale.nice_ticks(low, high, wanted=wanted)
    np.testing.assert_allclose(ticks, expected, rtol=1e-9, atol=1e-15)
    assert len(set(scale.tick_labels(ticks))) == len(ticks)


def test_log_ticks_are_round_and_inside():
    assert scale.log_ticks(1, 2000, wanted=12) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    assert scale.log_ticks(1, 2000, wanted=8) == [1, 10, 100, 1000]
    assert scale.log_ticks(3, 8, wanted=5) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "ticks, labels",
    [
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0, 0.05, 0.1], ["0.00", "0.05", "0.10"]),
        ([0, 2e-4, 1e-3], ["0", "2e-4", "1e-3"]),
        ([0, 5e6, 1e7], ["0", "5M", "10M"]),
        ([5e3, 1e4, 1.25e6], ["5K", "10K", "1.25M"]),
    ],
)
def test_tick_labels(ticks, labels):
    assert scale.tick_labels(ticks) == labels


def test_words_for_numbers():
    assert [scale.count(x) for x in (None, 0, 999, 49152, 1.6e12, 999_999)] == ["–", "0", "999", "49.2K", "1.60T", "1.00M"]
    assert [scale.duration(x) for x in (7.31, 59.99, 185, 3599.7, 8040, 273_600)] == [
        "7.3 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 14 min",
        "3 d 4 h",
    ]
    assert [scale.size(x) for x in (512, 3.4e9, float("nan"), "big")] == ["512 B", "3.17 GiB", "–", "–"]
    assert [scale.plain(x) for x in (3.21049, 0.0, 12345.678, 3e-5, True)] == ["3.210", "0", "12,346", "3.000e-05", "–"]


def _smooth_plainly(values, half):
    """One pass at a time, from the definition: numerator and denominator are smoothed alike."""
    total, weight = np.where(np.isfinite(values), values, 0.0), np.isfinite(values).astype(float)
    for _ in range(3):
        windows = [slice(i - min(i, half), i + min(i, half) + 1) for i in range(len(values))]
        total, weight = (np.array([array[window].sum() for window in windows]) for array in (total, weight))
    return total / weight


def test_smoothing_is_the_average_of_its_definition():
    values = np.random.default_rng(0).normal(size=120)
    values[[5, 60, 61]] = np.nan
    np.testing.assert_allclose(curves.smooth(values, half=4), _smooth_plainly(values, 4), rtol=1e-9)
    np.testing.assert_allclose(curves.smooth(np.full(50, 3.5), half=6), 3.5, rtol=1e-12)
    assert curves.smooth(values, half=4)[0] == pytest.approx(values[0])
    gap = np.r_[np.ones(20), np.full(30, np.nan), np.ones(20)]
    assert np.isnan(curves.smooth(gap, half=3)).sum() == 30 - 2 * 3


def test_thinning_keeps_every_spike_in_order():
    values = np.random.default_rng(1).normal(size=10_000)
    values[3000], values[7001] = 99.0, -99.0
    values[5000:5100] = np.nan
    thinned, kept = curves.thin(values), curves.kept(len(values))
    assert 0.8 * curves.BUCKETS < len(thinned) / 2 == len(kept) / 2 <= curves.BUCKETS
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert np.nanmax(thinned) == 99.0
    assert np.nanmin(thinned) == -99.0
    assert abs(kept[np.nanargmax(thinned)] - 3000) <= 1.5 * len(values) / curves.BUCKETS
    assert {0, 1, 2, 3} <= set(kept)
    for pair in range(len(kept) // 2):
        bucket = values[kept[2 * pair] : kept[2 * pair + 1] + 1]
        if np.isnan(bucket).any():
            continue
        assert thinned[2 * pair : 2 * pair + 2].tolist() == [bucket[i] for i in sorted((bucket.argmin(), bucket.argmax()))]
    assert np.array_equal(curves.thin(values[:100]), values[:100])


def test_a_spike_does_not_flatten_the_rest_and_is_said_to_be_cut():
    values = np.sin(np.arange(400.0)) + 3
    values[200] = 500.0
    chart = curves.chart("t", unit="u", curves=[curves.Curve("c", "c", 0, "raw", 0, values)])
    assert chart is not None
    assert chart.high < 5
    assert chart.remark == "1 extreme value lies outside the range shown."
    logarithmic = curves.chart("t", unit="u", curves=[curves.Curve("c", "c", 0, "raw", 0, values)], may_log=True)
    assert logarithmic is not None
    assert logarithmic.log
    assert logarithmic.high > 500
    assert curves.chart("t", unit="u", curves=[curves.Curve("c", "c", 0, "line", 0, np.array([1.0, np.nan]))]) is None


def test_figures_come_from_the_summary_or_else_from_the_metrics(write):
    summary = {"steps": STEPS, "tokens": 7, "seconds": 8.0, "status": "stopped", "parameters_total": 5e6, "parameters_active": 1e6}
    summary |= {"heldout_first": {"text": 6.5}, "heldout_last": {"text": 1.3}}
    done, going = figures.of(_read(write(summary=summary, name="a"))), figures.of(_read(write(name="b")))
    assert (done.status, done.tokens, done.seconds, done.parameters) == ("stopped", 7, 8.0, 5e6)
    assert done.held_out["text"] == figures.HeldOut(6.5, 1.3)
    assert done.held_out["text"].ratio == pytest.approx(0.2)
    assert (going.status, going.steps, going.tokens, going.seconds, going.parameters) == ("unfinished", STEPS, 4000.0, 80.0, None)
    assert going.held_out == {"text": figures.HeldOut(6.0, 4.0), "trio": figures.HeldOut(5.5, 5.5)}
    assert going.speed == 50.0


def test_a_summary_older_than_the_metrics_is_not_believed(write):
    run = _read(write(summary={"steps": 10, "tokens": 7, "status": "stopped", "parameters_total": 5e6}))
    assert figures.of(run).status == "unfinished"
    assert figures.of(run).tokens == 4000.0
    assert figures.of(run).parameters == 5e6
    assert any("summary.json is older than the metrics" in note for note in run.notes)


@pytest.mark.parametrize(
    "skipped, said", [([0, 1, 0, 1], "2 updates"), ([0, 1, 1, 3], "3 updates"), ([0, 0, 1, 1], "1 update "), ([0] * 4, "")]
)
def test_skipped_updates_are_counted_from_flags_and_from_running_counts(write, skipped, said):
    run = _read(write([_train(i, skipped=value) for i, value in enumerate(skipped)]))
    remark = next(chart for chart in charts.build([run]).training if chart.title == "Gradient norm").remark
    assert said in remark
    assert bool(remark) == bool(said)


def test_a_drawn_curve_has_the_logged_values_at_its_pixels(write):
    run = _read(write())
    drawn = charts.build([run])
    chart = next(chart for chart in drawn.terms if chart.title == "Total training loss")
    text = line_chart.figure(chart, number=0, abscissas=drawn.abscissas, choices=line_chart.axes(drawn.abscissas), wide=False)
    path = re.search(r'class="c0 line" d="M([^"]+)"', text)
    assert path is not None
    x, y = np.array([point.split(",") for point in path[1].split("L")], float).T
    left, right = line_chart.LEFT, line_chart.NARROW - line_chart.RIGHT
    bottom, top = line_chart.HEIGHT - line_chart.BOTTOM, line_chart.TOP
    np.testing.assert_allclose((x - left) / (right - left) * STEPS, np.arange(1, STEPS + 1), atol=0.02)
    np.testing.assert_allclose(
        chart.low + (bottom - y) / (bottom - top) * (chart.high - chart.low), 5 - np.arange(1, STEPS + 1) / 20, atol=0.01
    )


@pytest.mark.parametrize("count, joined", [(2, False), (line_chart.JOINED - 1, False), (line_chart.JOINED, True)])
def test_few_held_out_points_are_not_joined(write, count, joined):
    text = page.write([_read(write([_train(1), _train(9), *(_eval(step, **{"loss/text": 3.0 - step / 9}) for step in range(count))]))])
    assert (re.search(r'<path class="c\d points"', text) is not None) == joined
    assert f'"joined":{line_chart.JOINED}' in text


def test_the_data_in_the_page_are_the_logged_ones(write):
    text = page.write([_read(write([*_log(), _train(STEPS + 1, loss=None)]))])
    data = json.loads(re.search(r'id="charts">(.*?)</script>', text)[1])
    loss = next(c for chart in data["charts"] for c in chart["curves"] if c["label"] == "total training loss")
    assert loss["values"] == [*(round(5 - step / 20, 4) for step in range(1, STEPS + 1)), None]
    assert data["abscissas"][loss["abscissa"]]["tokens"] == [100 * step for step in range(1, STEPS + 2)]
    assert set(data["choices"]) == {"step", "tokens", "seconds"}
    assert data["choices"]["step"]["linear"]["high"] == STEPS + 1
    assert data["choices"]["step"]["log"]["low"] == 1


def test_heat_map_classes_are_centred_at_the_uniform_load():
    middle = heat_map.STEPS // 2
    assert heat_map.cell_class(1.0) == f"h{middle}"
    for load in (1.3, 2.0, 4.0, 9.0):
        above, below = (int(heat_map.cell_class(x)[1:]) for x in (load, 1 / load))
        assert above - middle == middle - below > 0
    places = [int(heat_map.cell_class(x)[1:]) for x in np.geomspace(0.1, 10, 50)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, heat_map.STEPS - 1)
    assert (heat_map.cell_class(0.0), heat_map.cell_class(math.nan)) == ("never", "gap")


def test_every_cell_of_the_heat_map_says_its_layer_expert_and_load(write):
    found = _Page(heat_map.figure(_read(write()), title="t", number=0))
    assert found.titles == [f"{layer} csa, expert {expert}: 1.00×" for layer in range(2) for expert in range(4)]
    data = json.loads(re.search(r"json\">(.*?)</script>", heat_map.figure(_read(write(name="again")), title="t", number=0))[1])
    assert data["load"]["text"][0] == [0.0, 0.5, 1.0, 2.5]
    assert data["classes"]["text"][0][0] == "never"
    assert data["captions"]["text"] == "Busiest: layer 0 csa, expert 3, at 2.50 times the uniform load. Never chosen: 1 of 8 experts."
    assert [element["value"] for tag, element in found.elements if tag == "input"] == ["all", "text"]


def test_many_experts_share_cells_that_show_the_busiest(write):
    load = np.random.default_rng(2).gamma(2, size=(3, 300))
    text = heat_map.figure(_read(write([_train(1), _experts(1, {"all": load.tolist()})])), title="t", number=0)
    found = _Page(text)
    assert len(found.titles) == 3 * 100
    assert found.titles[1] == f"0 csa, experts 3 to 5, busiest: {load[0, 3:6].max():.2f}×"
    assert "Each cell is the busiest of 3 neighbouring experts." in text


def test_expert_balance_is_the_busiest_load_of_worst_and_median_layer(write):
    worst, median = charts.build([_read(write())]).experts
    values = {curve.key: curve.values.tolist() for curve in worst.curves}
    assert values == {"text": [2.5, 2.5], "all": [2.5, 1.0]}
    assert {curve.key: curve.values.tolist() for curve in median.curves} == {"text": [1.75, 1.75], "all": [1.75, 1.0]}


def _luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page_rules, palette", [(style.LIGHT_PAGE, style.LIGHT), (style.DARK_PAGE, style.DARK)])
def test_colours_have_the_contrast_that_readers_need(page_rules, palette):
    colour = {name: "#" + (digits * 2 if len(digits) == 3 else digits) for name, digits in re.findall(r"--(\w+):#(\w+);", page_rules)}

    def contrast(a, b):
        low, high = sorted((_luminance(a), _luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(colour[text], colour[ground]) >= 4.5 for text in ("ink", "soft") for ground in ("page", "panel"))
    assert all(contrast(hue, colour["page"]) >= 3 for hue in palette)
    assert len(palette) == line_chart.STYLES == len(line_chart.MARKERS)


def test_one_run_makes_a_page_next_to_it(write, capsys):
    path = write(summary={"steps": STEPS, "status": "finished", "heldout_first": {"text": 6.0}, "heldout_last": {"text": 4.0}})
    assert _run(path) == 0
    assert capsys.readouterr().out == f"{path / 'report.html'}\n"
    text = (path / "report.html").read_text(encoding="utf-8")
    found = _Page(text)
    words = " ".join(found.texts)
    for expected in (
        "Loss by source",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Expert load",
        "finished",
        "Resolved recipe",
        "0.667",
    ):
        assert expected in words
    assert "utilisation" not in words, "no chart for a field without values"
    labels = [element["aria-label"] for tag, element in found.elements if tag == "svg" and element.get("role") == "img"]
    assert any(label.startswith("Total training loss (nats): total training loss from 4.950 to 3.000") for label in labels)


def test_the_page_asks_nothing_of_the_network(write):
    found = _Page(page.write([_read(write())]))
    references = [value for _, element in found.elements for name, value in element.items() if name in ("src", "href", "data", "action")]
    assert references == ["data:,"]
    addresses = set(re.findall(r"[a-z]+://[^\"' ]+|url\([^)]*\)|@import|fetch\(", page.write([_read(write(name="again"))])))
    assert {address for address in addresses if not address.startswith("url(#clip")} == {"http://www.w3.org/2000/svg"}


def test_hostile_names_stay_text(write):
    evil = "</script><script>alert(1)</script>"
    lines = [_train(1, **{f"loss/{evil}": 1.0}), _train(2, **{f"loss/{evil}": 2.0}), _experts(1, {evil: [[1.0]]})]
    lines.append({"kind": "experts", "step": 2, "load": {evil: [[1.0]], "all": [[2.0]]}, "layers": [evil]})
    paths = [write(lines, name="a<script>alert", text=evil, recipe={evil: evil}), write(lines, name="b", recipe={"x": 1})]
    for chosen in (paths[:1], paths):
        text = page.write(runs.read_runs(chosen))
        _Page(text)
        assert "<script>alert" not in text
        assert text.count("<script>") == 1


def test_a_run_with_one_line_makes_no_empty_boxes(write):
    text = page.write([_read(write([_eval(0)]))])
    found = _Page(text)
    assert not [tag for tag, _ in found.elements if tag in ("figure", "form")]
    assert "No curve yet" in text
    assert "Experts" not in text
    assert "last / first" not in text


def test_several_runs_are_compared(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slow, fast = [_train(i, tokens_per_second=50.0) for i in range(1, 5)], [_train(i, tokens_per_second=70.0) for i in range(1, 5)]
    one = write(slow, name="one", recipe={"model": {"width": 64, "layers": 2}, "seed": 0})
    two = write(fast, name="two", recipe={"model": {"width": 128, "layers": 2}, "extra": [1]})
    assert _run(one, two) == 0
    assert capsys.readouterr().out == "report.html\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    keys = re.findall(r"<th scope=\"row\"><code>(.*?)</code></th>((?:<td>.*?</td>)*)", text)
    values = {key: re.findall(r"<code>(.*?)</code>", cells) for key, cells in keys}
    assert values == {"extra": ["–", "[1]"], "model.width": ["64", "128"], "seed": ["0", "–"]}
    assert re.search(r'tokens/s, median</th><td>50</td><td class="best" title="best of the runs">70</td>', text)
    assert "Loss: text" in text
    assert (
        page.write(runs.read_runs([one, write(fast, name="three", recipe={"model": {"width": 64, "layers": 2}, "seed": 0})])).count(
            "are the same"
        )
        == 1
    )


def test_the_command_imports_no_accelerator_library():
    code = "import sys, v4train.cli.report; print([name for name in ('jax', 'matplotlib', 'yaml', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
