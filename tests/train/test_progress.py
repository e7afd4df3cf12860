"""Clocks of a run and what a person sees of it."""

import io
import re
import time
import types

from v4train.train import stages
from v4train.train import summary as summary_lib
from v4train.train.hooks import evaluation, progress


def test_the_clock_of_a_run_that_went_back():
    def line(step, seconds):
        return {"kind": "train", "step": step, "seconds": seconds}

    records = [line(1, 10.0), line(2, 20.0), line(3, 90.0), {"kind": "eval", "step": 3}, line(2, 22.0), line(3, 33.0)]
    assert [summary_lib.seconds_at(records, step) for step in (0, 1, 2, 3, 9)] == [0.0, 10.0, 22.0, 33.0, 33.0]


def test_an_evaluation_takes_no_time_from_the_step_before_it():
    """That is still at work when the evaluation wants its state: the wait is the step's, not the evaluation's."""

    class Pending:
        def block_until_ready(self):
            time.sleep(0.3)

    class Quick(evaluation.Evaluation):
        def losses(self, state, *, stage):
            return {}

        def _answers(self, state, asked, *, stage):
            return {}

    parts = types.SimpleNamespace(
        recipe=types.SimpleNamespace(train=types.SimpleNamespace(steps=4, eval_every=1, evals=()), data=types.SimpleNamespace(holdout=0.1)),
        data=types.SimpleNamespace(phases=types.SimpleNamespace(places_before=lambda step: 0)),
        stages=stages.Stages((0,), (stages.Stage("sparse", None),)),
    )
    told = []
    hook = Quick(parts, None, [].append, asked=types.SimpleNamespace(probes=()), done=told.append)
    started = time.perf_counter()
    hook.before(2, Pending())
    assert time.perf_counter() - started >= 0.3
    assert len(told) == 1
    assert told[0] < 0.2


def test_the_speed_that_a_person_sees_is_that_of_the_last_steps_together(capsys):
    """A step's own time says little: where a program runs within the call that starts it, its neighbour's report comes late."""
    show = progress.Progress(steps=4, start=0, log_every=2)
    usual = {"kind": "train", "loss": 1.0, "mfu": None, "grad_norm": 1.0, "learning_rate": 0.1}
    for step, seconds in enumerate((4.0, 7.99, 0.01, 2.0), 1):
        show({**usual, "step": step, "step_seconds": seconds, "tokens_per_second": 100 / seconds})
    out = capsys.readouterr().out
    assert re.findall(r"step +(\d)/4 .*? (\d+) tok/s", out) == [("1", "25"), ("2", "17"), ("4", "100")]
    for mfu in (0.2, 0.5):
        show({**usual, "step": 4, "step_seconds": 4.0 if mfu == 0.2 else 2.0, "tokens_per_second": 50.0, "mfu": mfu})
    assert "MFU 30.0%" in capsys.readouterr().out


def test_durations():
    found = [progress.duration(s) for s in (-1, 0.4, 59.4, 59.6, 3599, 3600, 86_399, 86_400, 187_200)]
    assert found == ["0s", "0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d00h", "2d04h"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_one_live_line(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    show = progress.Progress(steps=4, start=0, log_every=1)
    for step in (1, 2, 3, 4):
        show(
            {
                "kind": "train",
                "step": step,
                "loss": 2.5,
                "tokens_per_second": 1000.0,
                "step_seconds": 0.5,
                "mfu": 0.25,
                "grad_norm": 1.0,
                "learning_rate": 1.0,
            }
        )
    show({"kind": "eval", "step": 4, "tokens": 9, "loss/text": 1.25})
    time.sleep(0.2)
    show.close()
    show.close()
    text = screen.getvalue()
    assert "step      4  held-out loss: text 1.250" in text
    assert "loss 2.500" in text
    assert "MFU 25.0%" in text
    assert "grad norm" not in text, "plain lines are for pipes"


def test_processes_that_do_not_speak_show_nothing(capsys):
    silent = progress.Silent()
    silent.say("x")
    silent({"kind": "eval", "step": 1})
    silent.close()
    assert capsys.readouterr() == ("", "")
