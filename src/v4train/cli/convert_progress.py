"""What a person sees during a conversion: a bar on a terminal, a plain line now and then elsewhere. Both on stderr, results on stdout."""

import sys
import time

from rich import console as rich_console
from rich import progress as rich_progress

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts tensors and bytes of one phase. Use it as a context manager, and call it with the bytes of each tensor that is done."""

    def __init__(self, phase: str, *, nbytes: int):
        self._phase, self._total = phase, max(nbytes, 1)
        self._tensors, self._bytes = 0, 0
        self._began = self._said = time.monotonic()
        self._console = rich_console.Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._bar: rich_progress.Progress | None = None

    @property
    def summary(self) -> str:
        """What was done, and how fast."""
        seconds = time.monotonic() - self._began
        return f"{self._bytes / 1e9:,.2f} GB in {seconds:,.1f} s, {self._bytes / 1e6 / max(seconds, 1e-9):,.0f} MB/s"

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.DownloadColumn(),
                rich_progress.TransferSpeedColumn(),
                rich_progress.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._phase, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, nbytes: int) -> None:
        """One more tensor of this size."""
        self._tensors += 1
        self._show(self._bytes + nbytes)

    def reached(self, done: int, total: int) -> None:
        """For work that counts its bytes itself."""
        self._total = max(total, 1)
        self._show(done)

    def _show(self, done: int) -> None:
        self._bytes, now = done, time.monotonic()
        tensors = f" {self._tensors:,} tensors" if self._tensors else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, description=f"{self._phase}{tensors}")
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            speed = done / max(now - self._began, 1e-9)
            left = (self._total - done) / max(speed, 1.0)
            figures = f"{done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB, {speed / 1e6:,.0f} MB/s, {left:,.0f} s left"
            print(f"{self._phase}{tensors}, {figures}", file=sys.stderr, flush=True)
