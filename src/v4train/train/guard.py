"""Brings a run over a spike: back to a state from before it, on with the batches after it, and at an end if that does not help.

::

    batches     0 ....... s ............... d-1  d  d+1
    snapshots   ^         ^
    step d finds a spike in its report; step d+1 is in flight by then
    -> the state of snapshot s, with d+1 batches consumed; batches s .. d are left out for good and listed

**Where it goes back to.** The loss of step d was computed with the parameters that step d-1 had made. The newest snapshot that is older
than that update, of two that are kept; the same one twice only if there is no older one. At the start of a process the only
snapshot is its first state, so a spike in its first steps goes back to that.

**Data.** The position only goes forward. A batch that was between the snapshot and the spike is never trained on again: which of them
was the cause is not known, and PaLM's runs did not spike again without them. The optimizer's count goes on as if they had been
trained on (`snapshots.Snapshot.onto`), so the learning rate stays a function of the batches consumed.

**One step late.** The loop reads the report of a step while the devices work at the next one, so a spike is known when one further
step was started, whose report is not judged. Where a state is read (saved, evaluated, copied into a snapshot) the loop waits for its
report before (`Guard.must_know`): no checkpoint has a state that a report still to come would condemn.

**Several processes.** Reports are replicated, so all processes see the same bits, judge alike and go back at the same step, without a
message. What the judgement remembers comes from the checkpoint, which all of them read, and not from the metrics, which one of them writes.
"""

from collections.abc import Callable
from typing import Any

from v4train.train import config as config_lib
from v4train.train import snapshots, spikes
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record

_KEPT = 2


class Guard:
    """Judges reports and, on a spike, gives the loop another state to go on with.

    Attributes:
        rollbacks: a record of each rollback in the life of the run.
        exceeded: what to tell the user when there were too many; None as long as there were not.
    """

    def __init__(
        self,
        config: config_lib.GuardConfig | None,
        *,
        level: Callable[[int], str] = lambda step: "",
        objective: Callable[[int], str] = lambda step: "",
        reads: Callable[[int], bool] = lambda step: False,
        sink: record.Sink = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
        done: Callable[[float], None] = lambda seconds: None,
    ):
        """Args:
        config: what a spike is and how often the run may go back; None: there are no spikes, and what was restored is only kept.
        level: names what the training step with a number, from 0, computes (see `spikes.Detector.judge`).
        objective: names what its loss is of.
        reads: whether some hook looks at the state after so many steps.
        sink: gets a record of kind ``rollback`` for each, and of kind ``anticipate`` when that begins and ends.
        say: gets a line for people.
        done: told the seconds of a compilation, so that they are not taken for a step's.
        """
        self._guards, self._config = config is not None, config or config_lib.GuardConfig()
        self._level, self._objective, self._reads, self._sink, self._say, self._done = level, objective, reads, sink, say, done
        self._detector = spikes.Detector(self._config)
        self._snapshots: list[snapshots.Snapshot] = []
        self._in_flight = 0  # steps up to here were started from a state that was given up
        self._anticipate_until = 0
        self._anticipated = False
        self.rollbacks: list[record.Record] = []
        self.exceeded: str | None = None

    @property
    def lag(self) -> int:
        """Of anticipatory routing."""
        return 0 if self._config.anticipate is None else self._config.anticipate.lag

    def must_know(self, step: int) -> bool:
        """Whether the report that made ``step`` steps done must be judged before the next step starts."""
        return self._guards and (step % self._config.snapshot_every == 0 or self._reads(step))

    def before(self, step: int, state: state_lib.State) -> None:
        """Takes a snapshot of a state whose report was judged, if it is time: at the start of the process and every so many steps."""
        due = not self._snapshots or (step % self._config.snapshot_every == 0 and self._snapshots[-1].until != step)
        if self._guards and due:
            self._snapshots = self._snapshots[1 - _KEPT :]  # dropped before the copy is made: there is no room for three
            self._snapshots.append(snapshots.take(state, step=step, where=self._config.snapshots))

    def judge(self, step: int, report: step_lib.Report, state: state_lib.State, *, started: int) -> state_lib.State:
        """The state to go on with: the given one, or after a spike one from before it.

        Args:
            step: steps done after the one that the report is of.
            report: on the host.
            state: after all steps that were started.
            started: how many those are.
        """
        if not self._guards or step <= self._in_flight:
            return state
        values = {"loss": float(report.loss), "gradient": float(report.grad_norm), "finite": bool(report.finite)}
        spike = self._detector.judge(step, **values, level=self._level(step - 1), objective=self._objective(step - 1))
        return state if spike is None else self._go_back(spike, state, started)

    def anticipates(self, step: int) -> bool:
        """Whether the step after ``step`` steps takes its routing from earlier parameters."""
        config = self._config.anticipate if self._guards else None
        on = config is not None and (config.always or step < self._anticipate_until)
        if on != self._anticipated:
            self._anticipated = on
            self._sink({"kind": "anticipate", "step": step, "on": int(on)})
            self._say(f"step {step:>6}  routing is {'anticipated' if on else 'the usual one'} from here on")
        return on

    def compiled(self, step: int, seconds: float) -> None:
        """Told when the functions for anticipation had to be compiled."""
        self._say(f"step {step:>6}  compiled for anticipated routing in {seconds:.1f} s")
        self._done(seconds)

    def state(self) -> dict[str, Any]:
        """All that a process that goes on from here must know, as JSON."""
        return {"detector": self._detector.state(), "rollbacks": self.rollbacks, "anticipate_until": self._anticipate_until}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        self._detector.restore(state["detector"])
        self.rollbacks = list(state["rollbacks"])
        self._anticipate_until = state["anticipate_until"]

    def _go_back(self, spike: spikes.Spike, state: state_lib.State, started: int) -> state_lib.State:
        target = self._choose(spike)
        self._snapshots = self._snapshots[: self._snapshots.index(target) + 1]
        told = {
            "kind": "rollback",
            "step": started,
            "spike": spike.step,
            "reason": spike.reason,
            "value": spike.value,
            "limit": spike.limit,
            "median": spike.median,
            "snapshot": target.step,
            "first_batch": target.until,
            "last_batch": started - 1,
        }
        recent = [earlier for earlier in self.rollbacks if earlier["step"] > started - self._config.rollback_window]
        self.rollbacks.append(told)
        self._sink(told)
        self._say(f"{spike}; back to the state of step {target.step}, without batches {target.until} to {started - 1}")
        if len(recent) >= self._config.max_rollbacks and self.exceeded is None:
            self.exceeded = self._too_many(spike, len(recent))
        state = target.onto(state, done=started)
        target.until, target.used = started, True
        self._in_flight = started
        if self._config.anticipate is not None:
            self._anticipate_until = started + self._config.anticipate.calm_steps
        return state

    def _choose(self, spike: spikes.Spike) -> snapshots.Snapshot:
        old = [taken for taken in self._snapshots if taken.step <= spike.step - 2] or self._snapshots[:1]
        return old[-2] if old[-1].used and len(old) > 1 else old[-1]

    def _too_many(self, spike: spikes.Spike, before: int) -> str:
        config = self._config
        remedy = "" if config.anticipate is not None else "set train.guard.anticipate: {}, "
        return (
            f"{spike}, after {before} rollback(s) in the last {config.rollback_window} steps, and train.guard.max_rollbacks is "
            f"{config.max_rollbacks}. Look at the batches that the metrics name (kind rollback), {remedy}begin a run with a lower "
            "optimizer.schedule.peak_lr from this one (init_from), or raise train.guard.max_rollbacks."
        )


NONE = Guard(None)
"""Sees no spike in anything."""


def skipped_batches(rollbacks: list[record.Record]) -> int:
    """How many batches these rollbacks left out, each once."""
    return len({batch for told in rollbacks for batch in range(told["first_batch"], told["last_batch"] + 1)})
