"""Ends a run when it is asked to: SIGTERM (a scheduler's notice) and Ctrl-C let the step finish and the state be saved."""

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """Whether, and by which signal, the run was asked to end."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals(*, grace_seconds: float) -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT into a flag. A second SIGINT interrupts at once.

    After the first signal the process has ``grace_seconds`` to save; then SIGALRM ends it, so that a hung disk cannot keep a node.
    """
    stop = Stop()

    def ask(number: int, _) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
