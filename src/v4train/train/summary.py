"""What is left of a run when it ends: ``summary.json``, and the last lines that it prints."""

import json
import os
import pathlib
from typing import Any

from v4train.train.hooks import progress, record

FILE = "summary.json"


def write(directory: pathlib.Path, summary: dict[str, Any]) -> None:
    """Writes it, all at once for whoever reads."""
    write_atomically(directory / FILE, json.dumps(summary, indent=1) + "\n")


def finished(directory: pathlib.Path, *, steps: int) -> dict[str, Any] | None:
    """The summary of a run that ended after just these steps with everything done, or None."""
    try:
        summary = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if (summary.get("status"), summary.get("steps")) == ("finished", steps) else None


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def seconds_at(records: list[record.Record], step: int) -> float:
    """Training time of the first ``step`` steps. A run that went back wrote some steps twice: the last line counts."""
    return next((r["seconds"] for r in reversed(records) if r["kind"] == "train" and r["step"] <= step), 0.0)


def heldout(records: list[record.Record]) -> dict[str, dict[str, float]]:
    """Held-out losses by source of the run's very first evaluation, by whichever process, and of the last."""
    evaluations = [r for r in records if r["kind"] == "eval"]
    losses = [{k.removeprefix("loss/"): v for k, v in r.items() if k.startswith("loss/")} for r in evaluations]
    losses = [each for each in losses if each]  # a record may be of something else that was asked
    return {"heldout_first": losses[0], "heldout_last": losses[-1]} if losses else {"heldout_first": {}, "heldout_last": {}}


def closing(s: dict[str, Any], directory: pathlib.Path) -> str:
    """The last lines of a run, for people."""
    first, last = s["heldout_first"], s["heldout_last"]
    losses = "; ".join(f"{name} {_nats(first[name])} -> {_nats(last[name])}" for name in first if name in last)
    lines = [
        f"{s['status']} after {s['steps']} steps, {s['tokens']:,} tokens, {progress.duration(s['seconds'])} of training"
        + (f" (first step {s['first_step_seconds']:.1f}s after the start)" if s["first_step_seconds"] else ""),
        f"held-out loss: {losses}" if losses else "",
        f"peak memory {s['peak_memory_bytes'] / 2**30:.2f} GiB; results in {directory}; look at them: v4train report {directory}",
        "" if s["status"] == "finished" else "the same command goes on from here",
        f"{s['skipped_steps']} step(s) changed nothing: their gradients were not finite" if s["skipped_steps"] else "",
        _left_out(s) if s["rollbacks"] else "",
        f"{s['bad_records']} document(s) were unreadable and became padding: {directory / 'quarantine.jsonl'}" if s["bad_records"] else "",
        f"WARNING: the last checkpoint could not be saved: {s['checkpoint_error']}" if s["checkpoint_error"] else "",
    ]
    return "\n".join(line for line in lines if line)


def _left_out(s: dict[str, Any]) -> str:
    ranges = ", ".join(f"{r['first_batch']} to {r['last_batch']} ({r['reason'].replace('_', ' ')})" for r in s["rollbacks"])
    return f"{len(s['rollbacks'])} rollback(s) left out {s['skipped_batches']} batch(es): {ranges}"


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
