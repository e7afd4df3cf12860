"""What a run has read so far, as data: written into a checkpoint, compared when the run goes on.

The batches before step k depend on the documents of the sources that had a weight before k, on how they are ordered and packed, and on the
shapes and weights of the phases up to k. The history holds just that; not paths, hosts, threads, sources that were not read yet, or phases
that begin later. Two recipes with equal histories at k draw the same batches before k, and the rows of every source after k begin where
they would have begun: so a run may go on with new weights, new sources and new shapes, but not with another past. (The rejected
alternative, one fingerprint of the whole recipe, refuses every change; a recipe that may change freely skips and repeats data silently.)
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from v4train.data import phases as phases_lib

_LISTED = 6
_FIELDS = ("batch rows", "sequence_length", "max_patches", "max_audio_frames")


def of(
    phases: phases_lib.Phases, *, sources: Mapping[str, Mapping[str, str]], settings: Mapping[str, Any], step: int | None
) -> dict[str, Any]:
    """The history as JSON.

    Args:
        phases: of the run.
        sources: what decides about the rows of each source, by name, in the order of the mixture.
        settings: what decides about all rows.
        step: steps done; None for all to come.
    """
    found: list[dict[str, Any]] = []
    for phase, after in itertools.zip_longest(phases.phases, phases.phases[1:]):
        if step is not None and phase.first_step >= step:
            break
        ends = [end for end in (step, None if after is None else after.first_step) if end is not None]
        shares = {name: str(weight) for name, weight in zip(sources, phase.weights, strict=True) if weight}
        here = {"from_step": phase.first_step, "until_step": min(ends, default=None), "shape": list(phase.shape), "shares": shares}
        if found and (found[-1]["shape"], found[-1]["shares"]) == (here["shape"], here["shares"]):
            here["from_step"] = found.pop()["from_step"]
        found.append(here)
    read = {name for here in found for name in here["shares"]}
    return {
        "settings": dict(settings),
        "order": [name for name in sources if name in read],
        "sources": {name: dict(source) for name, source in sources.items() if name in read},
        "phases": found,
    }


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What of the past is not as it was, a line each; none if the run may go on."""
    lines = [
        f"data.{name}: {saved['settings'].get(name)} in the checkpoint, {current['settings'].get(name)} now"
        for name in sorted(saved["settings"].keys() | current["settings"].keys())
        if saved["settings"].get(name) != current["settings"].get(name)
    ]
    for name, before in saved["sources"].items():
        now = current["sources"].get(name)
        if now is None:
            lines.append(f"data source {name!r} was read, but is gone or has no weight in the past now: give it weight 0 from a phase on")
        elif now["store"] != before["store"]:
            lines.append(f"data source {name!r}: its store is not the one that was read")
        else:
            changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            lines += [f"data source {name!r}: {key} {before.get(key)} in the checkpoint, {now.get(key)} now" for key in changed]
    if not lines and saved["order"] != current["order"]:
        lines.append(f"the sources are in the order {', '.join(current['order'])} now; it was {', '.join(saved['order'])}")
    lines += itertools.islice(_phases(saved["phases"], current["phases"]), _LISTED)
    return lines


def _phases(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Differences of shape and shares, by stretches of steps."""
    edges = sorted({edge for phase in (*saved, *current) for edge in (phase["from_step"], phase["until_step"])})
    for first, end in itertools.pairwise(edges):
        before, now = (next((p for p in phases if p["from_step"] <= first < p["until_step"]), None) for phases in (saved, current))
        if before is None or now is None:
            yield f"steps {first} to {end}: {'not ' if before is None else ''}in the checkpoint, {'not ' if now is None else ''}now"
            continue
        for name, old, new in zip(_FIELDS, before["shape"], now["shape"], strict=True):
            if old != new:
                yield f"steps {first} to {end}: {name} {old} in the checkpoint, {new} now"
        if before["shares"] != now["shares"]:
            yield f"steps {first} to {end}: shares {_pairs(before['shares'])} in the checkpoint, {_pairs(now['shares'])} now"


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
