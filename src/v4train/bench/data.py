"""How fast training rows come out of the pipeline: each format and length of row in a fresh process (`bench.one_reader`).

The documents are synthetic (`bench.corpus`) and, after the first round, in the page cache: what is measured is this program, not a disk.
Rates are medians over rounds. ``tokens_per_cpu_second`` divides by the processor time of the process instead of the wall clock: it
says what the program costs even on a machine that others use too.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from v4train.bench import corpus as corpus_lib
from v4train.bench import machine


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of reading, and the rate in tokens per second and process that it is meant to reach (None: no target)."""

    source: str
    length: int
    batch_rows: int
    target: float | None = None


CASES = (
    Case("flat", 8_192, 16, 30e6),
    Case("flat", 2**20, 1, 30e6),
    Case("records", 8_192, 16),
    Case("megatron", 8_192, 16, 30e6),
    Case("megatron", 2**20, 1, 30e6),
    Case("images", 8_192, 4, 5e6),
)
TEXT_TOKENS, IMAGE_PATCHES = 32_000_000, 60_000


def measure(
    directory: pathlib.Path | None,
    *,
    cases: Sequence[Case] = CASES,
    text_tokens: int = TEXT_TOKENS,
    image_patches: int = IMAGE_PATCHES,
    read_threads: int = 1,
    seconds: float = 1.0,
    repeats: int = 5,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Measures every case.

    Args:
        directory: where the corpus is written, or is from an earlier time; None is a temporary one.
        cases: what to measure.
        text_tokens: of the corpus.
        image_patches: of the corpus.
        read_threads: as in a recipe.
        seconds: of one repeat.
        repeats: per case.
        say: where progress goes.

    Returns:
        The result, ready for `json.dumps`; bytes and seconds.

    Raises:
        ValueError: numbers out of range, a directory with something else in it, or a process that failed.
    """
    if seconds <= 0 or repeats < 1 or read_threads < 0:
        raise ValueError(f"--seconds {seconds}, --repeats {repeats}, --read-threads {read_threads}: give positive numbers")
    with tempfile.TemporaryDirectory(prefix="v4train-bench-") as temporary:
        say("writing the documents")
        corpus = corpus_lib.make(directory or pathlib.Path(temporary) / "corpus", text_tokens=text_tokens, image_patches=image_patches)
        load, results = machine.load_average(), []
        for case in cases:
            options = {"read_threads": read_threads, "seconds": seconds, "repeats": repeats}
            measured = run_case(case, corpus, **options)
            rates = measured.pop("tokens_per_second"), measured.pop("tokens_per_cpu_second")
            results.append(dataclasses.asdict(case) | {"tokens_per_second": _spread(rates[0]), "tokens_per_cpu_second": _spread(rates[1])})
            results[-1] |= measured
            say(f"{case.source}, rows of {case.length:,}: {statistics.median(rates[0]) / 1e6:.1f} Mtok/s")
    return {
        "bench": "data",
        **machine.describe(devices=0),
        "text_tokens": text_tokens,
        "image_patches": image_patches,
        "image_patch": corpus_lib.IMAGE_PATCH,
        "read_threads": read_threads,
        "repeats": repeats,
        "seconds": seconds,
        "cases": results,
        "load_average": {"before": load, "after": machine.load_average()},
    }


def run_case(case: Case, corpus: corpus_lib.Corpus, *, read_threads: int, seconds: float, repeats: int) -> dict[str, Any]:
    """The figures of one fresh process.

    Raises:
        ValueError: it failed; its message stands above.
    """
    command = [sys.executable, "-m", "v4train.bench.one_reader", "--corpus", str(corpus.root), "--source", case.source]
    options = {"length": case.length, "batch-rows": case.batch_rows, "read-threads": read_threads, "repeats": repeats}
    options |= {"seconds": seconds, "ahead": 2}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the process that measures {case.source} ended with exit code {done.returncode}; its message stands above")
    return json.loads(done.stdout)


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates))}


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    head = ("documents", "row", "Mtok/s", "target", "per CPU s", "first", "restore", "peak RSS", "a batch", "media")
    lines = ["{:<10} {:>9} {:>8} {:>7} {:>10} {:>8} {:>8} {:>9} {:>9} {:>6}".format(*head)]
    for case in result["cases"]:
        target = "-" if case["target"] is None else f"{case['target'] / 1e6:.0f}"
        rate, cpu = case["tokens_per_second"]["median"] / 1e6, case["tokens_per_cpu_second"]["median"] / 1e6
        restore = max(case["restore_seconds"].values())
        cells = f"{rate:>8.1f} {target:>7} {cpu:>10.1f} {case['first_batch_seconds']:>6.2f} s {restore:>6.2f} s"
        memory = f"{case['peak_resident_bytes'] / 1e9:>6.2f} GB {case['batch_bytes'] / 1e6:>6.1f} MB {case['media_share']:>6.0%}"
        lines.append(f"{case['source']:<10} {case['length']:>9,} {cells} {memory}")
    load = result["load_average"]["after"][0]
    return "\n".join([*lines, f"{result['cpu_cores']} CPU cores, load {load}; medians of {result['repeats']} x {result['seconds']} s"])
