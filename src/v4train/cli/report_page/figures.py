"""The figures of a run: what the tiles and tables state.

From `summary.json` if it describes the end of the run, else from the metrics so far. None stands for unknown.
"""

import dataclasses

import numpy as np

from v4train.cli.html_page import scale
from v4train.cli.report_page import curves
from v4train.cli.report_page import runs as runs_lib


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out loss of one source; ``last`` is None until there has been a second evaluation."""

    first: float | None
    last: float | None

    @property
    def ratio(self) -> float | None:
        return self.last / self.first if self.last is not None and self.first else None


@dataclasses.dataclass(frozen=True)
class Figures:
    """Units: seconds, bytes, tokens per second (median of the second half of the run), nats."""

    status: str
    steps: int
    tokens: float | None
    seconds: float | None
    speed: float | None
    mfu: float | None
    parameters: float | None
    active: float | None
    memory: float | None
    compilation: float | None
    first_step: float | None
    train_loss: float | None
    held_out: dict[str, HeldOut]


def of(run: runs_lib.Run) -> Figures:
    """The figures of a run."""
    summary, last = run.finished_summary, np.array([run.last_step])
    tokens, seconds = (
        _known(summary.get(field)) or _known(runs_lib.clock(run, steps=last, field=field)[0]) for field in ("tokens", "seconds")
    )
    loss = run.train.column("loss")
    loss = curves.smooth(loss, half=curves.half_window(len(loss)))
    loss = loss[np.isfinite(loss)]
    status = summary.get("status")
    return Figures(
        status=status if isinstance(status, str) else "unfinished",
        steps=int(summary.get("steps", run.last_step)),
        tokens=tokens,
        seconds=seconds,
        speed=_second_half(run.train.column("tokens_per_second")) or (tokens / seconds if tokens and seconds else None),
        mfu=_second_half(run.train.column("mfu")),
        parameters=_known(run.summary.get("parameters_total")),
        active=_known(run.summary.get("parameters_active")),
        memory=_known(summary.get("peak_memory_bytes")),
        compilation=_known(summary.get("compile_seconds")),
        first_step=_known(summary.get("first_step_seconds")),
        train_loss=float(loss[-1]) if loss.size else None,
        held_out=_held_out(run, summary=summary),
    )


def _held_out(run: runs_lib.Run, *, summary: dict) -> dict[str, HeldOut]:
    found = {}
    given = {field: value if isinstance(value := summary.get(field), dict) else {} for field in ("heldout_first", "heldout_last")}
    names = dict.fromkeys([*runs_lib.sources([run]), *given["heldout_first"], *given["heldout_last"]])
    for name in names:
        logged = run.evaluation.column(f"loss/{name}")
        logged = logged[np.isfinite(logged)]
        first, last = _known(given["heldout_first"].get(name)), _known(given["heldout_last"].get(name))
        first = float(logged[0]) if first is None and logged.size else first
        last = float(logged[-1]) if last is None and logged.size > 1 else last
        if first is not None or last is not None:
            found[name] = HeldOut(first, last)
    return found


def _known(value: object) -> float | None:
    return None if scale.unknown(value) else float(value)  # pyright: ignore[reportArgumentType]


def _second_half(values: np.ndarray) -> float | None:
    """Median of the second half: compilation and warm caches are behind it."""
    late = values[len(values) // 2 :]
    late = late[np.isfinite(late)]
    return float(np.median(late)) if late.size else None
