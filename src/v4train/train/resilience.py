"""Ends a run when it is asked to: SIGTERM (a scheduler's notice) and Ctrl-C let the step finish and the state be saved.

A hung disk, or a compilation that takes an hour, must not keep the node beyond its notice: a thread waits for the end of the grace period,
says why and ends the process. If even that thread cannot run, because native code holds Python's lock, the kernel's SIGALRM ends the
process a little later without a word. (The rejected alternative, a Python handler for SIGALRM, would run between two instructions of the
very thread that hangs.)
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 1
"""Of a process that did not end in time."""
_LAST_RESORT_SECONDS = 5.0


class Stop:
    """Whether, and by which signal, the run was asked to end."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals(*, grace_seconds: float) -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT into a flag. A SIGINT after that interrupts at once; another SIGTERM changes nothing.

    Args:
        grace_seconds: from the first signal to the end of the ``with`` block; a process that takes longer ends with `EXIT_CODE`.
    """
    stop = Stop()
    asked, ended = threading.Event(), threading.Event()

    def ask(number: int, _) -> None:
        if stop.signal is None:
            stop.signal = signal.Signals(number)
            signal.setitimer(signal.ITIMER_REAL, grace_seconds + _LAST_RESORT_SECONDS)
            asked.set()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def watch() -> None:
        asked.wait()
        if not ended.wait(grace_seconds):
            _give_up(stop, grace_seconds)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    watcher = threading.Thread(target=watch, name="grace", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        # Only now: a handler that interrupts `asked.set` and calls it again would wait for itself.
        ended.set()
        asked.set()
        watcher.join()


def _give_up(stop: Stop, grace_seconds: float) -> None:
    assert stop.signal is not None
    print(
        f"v4train: the run had not ended {grace_seconds:g} s after {stop.signal.name} (train.grace_seconds) and is ended now; "
        "the same command goes on from the newest finished checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_CODE)
