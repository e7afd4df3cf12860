"""When a run is taken for one that hangs, and what is said of it. Processes that talk to each other are in `test_lifeline`."""

import subprocess
import sys
import threading
import time

import pytest

from v4train.train import watchdog


def where(count: int, seconds: float, *, section: str = "data", timed: bool = True) -> watchdog.Where:
    return watchdog.Where(count, section, 5, seconds, timed, f"the stack of {count}")


def judge(**found: watchdog.Where | None) -> str | None:
    return watchdog.judge(found, seconds=60, count=len(found))


def test_those_farthest_behind_hang_and_the_others_wait_for_them():
    text = judge(a=where(9, 200, section="step"), b=where(8, 61), c=where(8, 70), d=where(9, 90, section="step"))
    assert text is not None
    first, waiting, stack = text.splitlines()
    assert first.startswith(
        "b, c hang, and all 4 hosts stop (train.stall_seconds: 60): in section 'data' of step 5 for 61 s. The same command"
    )
    assert waiting == "waiting for it: a in section 'step' of step 5 for 200 s, d in section 'step' of step 5 for 90 s"
    assert stack == "the stack of 8"


@pytest.mark.parametrize(
    "behind",
    [where(8, 59), where(8, 3000, section="compilation", timed=False), where(9, 1, section="step")],
    ids=["slow", "compiles", "has just come"],
)
def test_it_is_no_hang_while_the_one_farthest_behind_has_time(behind):
    assert judge(a=where(9, 200, section="step"), b=behind) is None


def test_who_does_not_answer_hangs_wherever_the_others_are():
    text = judge(a=where(9, 61, section="step"), b=None)
    assert text is not None
    assert text.startswith("b hangs, and all 2 hosts stop (train.stall_seconds: 60): no answer; the process is stopped")
    assert text.endswith("\nwaiting for it: a in section 'step' of step 5 for 61 s")


def test_many_that_wait_are_counted():
    text = judge(b=where(1, 99), **{f"h{i}": where(2, 99) for i in range(511)})
    assert text is not None
    assert " and 508 more" in text
    assert len(text) < 1000


def test_without_a_limit_there_is_no_thread():
    dog, before = watchdog.Watchdog(None), threading.active_count()
    with dog.watching(lambda: pytest.fail("there is no limit")):
        dog.at("data", 1)
        assert threading.active_count() == before
        assert (dog.where().section, dog.where().step, dog.where().count) == ("data", 1, 1)


def test_it_calls_again_and_not_after_the_end():
    dog, calls = watchdog.Watchdog(1.0), []
    with dog.watching(lambda: calls.append(dog.where().section)):
        for _ in range(4):
            dog.at("step", 1)
            time.sleep(0.4)
        assert not calls
        dog.at("evaluation", 1)
        time.sleep(2.6)
    assert calls == ["evaluation"] * 2
    time.sleep(1.2)
    assert len(calls) == 2


class Hook:
    def __init__(self, dog):
        self.dog, self.seen = dog, []

    def before(self, step, state):
        self.seen.append(("before", step, state, self.dog.where().section, self.dog.where().timed))

    def after(self, step, report):
        self.seen.append(("after", step, report, self.dog.where().section))


def test_a_hook_under_watch_is_the_same_hook():
    dog = watchdog.Watchdog(None)
    hook = Hook(dog)
    watched = dog.over("save", hook, timed=False)
    watched.before(3, "state")
    assert dog.where().timed, "what hooks that are not watched wait for, such as the first step's result, is not the compilation"
    assert (dog.where().section, dog.where().step) == ("step", 3)
    watched.after(4, "report")
    assert dog.where().timed
    assert hook.seen == [("before", 3, "state", "save", False), ("after", 4, "report", "reports")]


HELD = """
import ctypes, time
from v4train.train import watchdog
watchdog._LAST_RESORT_SECONDS = 0.5
dog = watchdog.Watchdog(1.0)
def hang():
    ctypes.PyDLL(None).sleep(60)  # keeps Python's lock
with dog.watching(lambda: print("called")):
    dog.at("step", 1)
    time.sleep(0.3)
    hang()
"""


def test_native_code_that_keeps_pythons_lock_is_ended_with_the_stack():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=50)
    assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (1, "")
    assert "in hang" in done.stderr
