"""How far the preparation is: a bar in a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from typing import TextIO

from v4train.data.prepare import part

_LINE_SECONDS = 10.0


class Progress:
    """Shows records, tokens per second and the time left. Input bytes say how much is left, because they are known beforehand."""

    def __init__(self, *, total_bytes: int, done_bytes: int, stream: TextIO | None = None):
        """Begins to show.

        Args:
            total_bytes: of all input.
            done_bytes: of the input that an earlier run has finished.
            stream: where; by default stderr.
        """
        self._stream = stream or sys.stderr
        self._total, self._before = max(1, total_bytes), done_bytes
        self._finished, self._live = part.Advance(0, 0, 0), part.Advance(0, 0, 0)
        self._started = self._last = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from rich import console, progress

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TextColumn("{task.fields[text]}"))
            self._bar = progress.Progress(*columns, console=console.Console(file=self._stream), transient=True)
            self._task = self._bar.add_task("prepare", total=self._total, completed=done_bytes, text="")
            self._bar.start()

    def finish(self, report: part.Report) -> None:
        """Counts a finished part."""
        f = self._finished
        self._finished = part.Advance(f.records + report.records, f.tokens + report.tokens, f.size + report.size)
        self._show()

    def live(self, counts: part.Advance) -> None:
        """Takes the counts of the workers, finished parts included."""
        self._live = counts
        self._show()

    @property
    def tokens(self) -> int:
        """Written in this run."""
        return max(self._finished.tokens, self._live.tokens)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

    def text(self) -> str:
        """One line: records, tokens, tokens per second, time left."""
        records, seconds = max(self._finished.records, self._live.records), self.seconds
        gained = self._done() - self._before
        left = "time left unknown" if not gained else f"{_duration(seconds * (self._total - self._done()) / gained)} left"
        share = min(1.0, self._done() / self._total)
        return f"{share:4.0%}  {records:,} records  {self.tokens:,} tokens  {self.tokens / max(seconds, 1e-9):,.0f} tokens/s  {left}"

    def _done(self) -> int:
        return min(self._total, self._before + max(self._finished.size, self._live.size))

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(), text=self.text())
        elif time.monotonic() - self._last > _LINE_SECONDS:
            self.say(self.text())
            self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
