"""Notices a run that hangs without dying: a disk that stalls, a device or a network that does not answer, a process that was stopped.

The code that trains says which *section* it enters (reading data, the step, an evaluation, a save, ...), and a thread looks whether one has
taken longer than `train.stall_seconds`. With one process that is the end of it. Among several, those who wait for a hanging one in a
collective look no different from it, and may have waited longer. So nobody ends on his own: process 0 asks all where they are
(`lifeline`), and `judge` blames those that are farthest behind, because the others can only wait for them. Sections are counted, and all
processes enter the same ones in the same order, so "behind" is a comparison of two integers.

It is no hang while the one farthest behind has not used up *its* time: it may be slow, or compiling (which is not timed: one host may
have the program in its cache, and another need an hour). A process that does not even answer hangs as a whole.

Native code that holds Python's lock stops this thread, too. Against that stands a timer of `faulthandler` in a thread without Python,
which this one winds up again as long as it runs. (Rejected: heartbeats between processes. A hang in the main thread leaves them beating;
what counts is that the work goes on.)
"""

import contextlib
import dataclasses
import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4train.train import loop

EXIT_CODE = 1
"""Of all processes of a run that hangs: launchers start it again."""
_LAST_RESORT_SECONDS = 60.0
"""After the time is over, for a process in which not even this thread runs."""
_SILENT = "no answer; the process is stopped, its machine is out of memory, or native code holds the interpreter"
_FRAMES = 8
_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Where:
    """What a process is at.

    Attributes:
        count: of sections that were entered, this one included.
        section: its name.
        step: the step in progress, or the steps done at an evaluation or a save.
        seconds: since it began.
        timed: whether it may take too long.
        stack: of the main thread, innermost call last.
    """

    count: int
    section: str
    step: int
    seconds: float
    timed: bool
    stack: str = ""

    def __str__(self) -> str:
        return f"section '{self.section}' of step {self.step} for {self.seconds:.0f} s"


class Watchdog:
    """Knows which section the main thread is in. Costs one assignment a section; without ``seconds`` it only keeps that."""

    def __init__(self, seconds: float | None):
        """``seconds``: what a section may take (`train.stall_seconds`)."""
        self.seconds = seconds
        self._began, self._ended = time.monotonic(), threading.Event()
        self._now = (0, "start", 0, self._began, False)

    def at(self, section: str, step: int, *, timed: bool = True) -> None:
        """A section begins, and the one before it has ended. ``timed``: false for what may take any time."""
        self._now = (self._now[0] + 1, section, step, time.monotonic(), timed)

    def over(self, section: str, hook: "loop.Hook", *, timed: bool = True) -> "loop.Hook":
        """The same hook, whose reading of the state is a section; what hooks do with a report is the section ``reports``."""
        return _Watched(self, section, hook, timed)

    def where(self) -> Where:
        """What the main thread is at. Any thread may ask."""
        count, section, step, since, timed = self._now
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "" if frame is None else "".join(traceback.format_stack(frame)[-_FRAMES:])
        return Where(count, section, step, time.monotonic() - since, timed, stack)

    @contextlib.contextmanager
    def watching(self, stalled: Callable[[], None]) -> Iterator[None]:
        """Calls ``stalled`` from a thread when a section takes too long, and again after as long a time."""
        if self.seconds is None:
            yield
            return
        watcher = threading.Thread(target=self._watch, args=(self.seconds, stalled), name="watchdog", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self.at("end", self._now[2], timed=False)
            self._ended.set()
            watcher.join()

    def _watch(self, seconds: float, stalled: Callable[[], None]) -> None:
        told = self._began
        while not self._ended.wait(min(seconds / 10, 5.0)):
            _, _, _, since, timed = self._now
            if timed:
                faulthandler.dump_traceback_later(seconds + _LAST_RESORT_SECONDS, exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()
            if timed and time.monotonic() - max(since, told) >= seconds:
                told = time.monotonic()
                stalled()
        faulthandler.cancel_dump_traceback_later()


class _Watched:
    """A hook that says what it is at."""

    def __init__(self, dog: Watchdog, section: str, hook: "loop.Hook", timed: bool):
        self._dog, self._section, self._hook, self._timed = dog, section, hook, timed

    def before(self, step: int, state: Any) -> None:
        """The hook's."""
        self._dog.at(self._section, step, timed=self._timed)
        self._hook.before(step, state)
        self._dog.at("step", step)  # whose result the next hooks may wait for

    def after(self, step: int, report: Any) -> None:
        """The hook's."""
        self._dog.at("reports", step)
        self._hook.after(step, report)


def alone(where: Where, *, seconds: float) -> str:
    """What to say of a run with one process."""
    return _told("the run hangs and is ended", f"in {where}", seconds=seconds) + f"\n{where.stack}"


def judge(found: Mapping[str, Where | None], *, seconds: float, count: int) -> str | None:
    """What to say of a run with several processes, or None if it does not hang.

    Args:
        found: what each process is at, by the name it has for people; None: it has not answered.
        seconds: `train.stall_seconds`.
        count: of processes; some may have ended already.
    """
    at = {name: where for name, where in found.items() if where is not None}
    behind, what, stack = [name for name, where in found.items() if where is None], _SILENT, ""
    if not behind:
        last = min(at.values(), key=lambda where: (where.count, where.seconds))  # of equals the one that came last
        if not last.timed or last.seconds < seconds:
            return None
        behind = [name for name, where in at.items() if where.count == last.count]
        what, stack = f"in {last}", f"\n{last.stack}"
    hang = f"hang{'s' if len(behind) == 1 else ''}, and all {count} hosts stop"
    if waiting := [f"{name} in {where}" for name, where in at.items() if name not in behind]:
        return _told(f"{_listed(behind)} {hang}", what, seconds=seconds) + f"\nwaiting for it: {_listed(waiting)}{stack}"
    what += "; all are at the same place, so a device or the network between them does not answer"
    return _told(f"all {count} hosts hang, and are ended", what, seconds=seconds) + stack


def _told(who: str, what: str, *, seconds: float) -> str:
    return f"{who} (train.stall_seconds: {seconds:g}): {what}. The same command goes on from the newest finished checkpoint."


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
