"""What a person sees while training: a live line on a terminal, plain lines elsewhere."""

import collections
import sys
import time

from rich import console as rich_console
from rich import progress as rich_progress

from v4train.train.hooks import record


class Progress:
    """A sink of records that shows step, loss, speed and MFU over the last ``log_every`` steps, and the time left."""

    def __init__(self, *, steps: int, start: int, log_every: int):
        self._steps, self._start, self._log_every = steps, start, log_every
        self._began: float | None = None
        self._recent = collections.deque[tuple[float, float, float]](maxlen=log_every)
        self._console = rich_console.Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: rich_progress.Progress | None = None
        if self._console.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("compiling", total=steps, completed=start)
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)
        self._console.file.flush()

    def __call__(self, r: record.Record) -> None:
        """Shows a record."""
        if r["kind"] == "eval":
            losses = "  ".join(f"{name.removeprefix('loss/')} {value:.3f}" for name, value in r.items() if name.startswith("loss/"))
            by = f" by {r['attention']} attention" if r.get("attention") else ""
            if losses:
                self.say(f"step {r['step']:>6}  held-out loss{by}: {losses}")
            shares = {
                name.removesuffix(end): r[name]
                for end in ("/accuracy", "/right")
                for name in r
                if name.endswith(end) and name.count("/") == 1
            }
            if shares:
                self.say(f"step {r['step']:>6}  right{by}: {'  '.join(f'{name} {share:.1%}' for name, share in shares.items())}")
        elif r["kind"] == "train":
            self._train(r)

    def _train(self, r: record.Record) -> None:
        step, now = r["step"], time.perf_counter()
        if self._began is None:
            self._began, self._first = now, step
        left = "" if step == self._first else f"  {duration((now - self._began) / (step - self._first) * (self._steps - step))} left"
        self._recent.append((r["step_seconds"], r["step_seconds"] * r["tokens_per_second"], r["step_seconds"] * (r["mfu"] or 0)))
        seconds, tokens, used = (sum(each) for each in zip(*self._recent, strict=True))
        mfu = "" if r["mfu"] is None else f"  MFU {used / seconds:.1%}"
        dropped = f"  dropped {r['experts/dropped']:.2%}" if r.get("experts/dropped") else ""
        text = f"loss {r['loss']:.3f}  {tokens / seconds:,.0f} tok/s{mfu}{dropped}{left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step % self._log_every == 0 or step in (self._start + 1, self._steps):
            self.say(f"step {step:>6}/{self._steps}  {text}  grad norm {r['grad_norm']:.2f}  lr {r['learning_rate']:.2e}")

    def close(self) -> None:
        """Takes the live line away."""
        if self._bar is not None:
            self._bar.stop()


class Silent(Progress):
    """Shows nothing: what the processes have that do not speak."""

    def __init__(self):
        pass

    def say(self, text: str) -> None:
        """Nothing."""

    def __call__(self, r: record.Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def duration(seconds: float) -> str:
    """``45s``, ``12m30s``, ``3h05m``, ``2d04h``."""
    total = max(round(seconds), 0)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3600:02d}h"
