"""Our pipeline against grain's own packing, MosaicML streaming and WebDataset: the same documents, the same rows, one process each.

The peers do not share an environment with us (they bring PyTorch): ``--install`` makes one in ``.venv-versus``, or ``--python`` names
an interpreter that has them. Measurements take turns: each round runs every reader once, and a ratio is taken within a round, so that a
machine that is busy with something else slows all alike. The median of the ratios is what is reported.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from v4train.bench import corpus as corpus_lib
from v4train.bench import data as data_bench
from v4train.bench import machine

ENVIRONMENT = pathlib.Path(".venv-versus")
PACKAGES = ("numpy", "grain", "array-record", "mosaicml-streaming", "webdataset")
PEERS = ("grain", "grain-default", "streaming", "webdataset")
_PROGRAM = pathlib.Path(__file__).with_name("peers.py")


def install(environment: pathlib.Path = ENVIRONMENT) -> pathlib.Path:
    """A virtual environment with the peers; returns its interpreter."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def measure(
    python: pathlib.Path | None,
    *,
    length: int = 8192,
    batch_rows: int = 16,
    text_tokens: int = data_bench.TEXT_TOKENS,
    rounds: int = 3,
    seconds: float = 2.0,
    peers: tuple[str, ...] = PEERS,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Measures all readers.

    Args:
        python: interpreter with the peers; None is that of `install`'s environment.
        length: tokens of a row.
        batch_rows: rows of a batch.
        text_tokens: of the corpus.
        rounds: turns; every reader once each.
        seconds: of a measurement.
        peers: of `PEERS`.
        say: where progress goes.

    Returns:
        The result, ready for `json.dumps`. ``ratio`` is our rate (flat store) divided by the reader's, the median over rounds.

    Raises:
        ValueError: no such interpreter, or a process that failed.
    """
    python = python or ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise ValueError(f"{python}: no such interpreter; run `v4train bench versus data --install` once, or name one with --python")
    versions = _run(python, "versions")
    with tempfile.TemporaryDirectory(prefix="v4train-versus-") as name:
        root = pathlib.Path(name)
        say("writing the documents")
        corpus = corpus_lib.make(root / "corpus", text_tokens=text_tokens, image_patches=1000)
        documents = list(corpus_lib.text_documents(text_tokens))
        np.savez(root / "documents.npz", ids=np.concatenate(documents), lengths=np.array([len(d) for d in documents]))
        for peer in peers:
            _run(python, "write", reader=peer, documents=root / "documents.npz", directory=root / peer)
        ours = [data_bench.Case(source, length, batch_rows) for source in ("flat", "records", "megatron")]
        load, found = machine.load_average(), {}
        for turn in range(rounds):
            for case in ours:
                found.setdefault(f"v4train {case.source}", []).append(
                    data_bench.run_case(case, corpus, read_threads=0, seconds=seconds, repeats=1)
                )
            for peer in peers:
                shape = {"length": length, "batch-rows": batch_rows, "workers": 0, "seconds": seconds, "repeats": 1}
                found.setdefault(peer, []).append(_run(python, "read", reader=peer, directory=root / peer, **shape))
            say(f"round {turn + 1} of {rounds}")
    return {
        "bench": "versus data",
        **machine.describe(devices=0),
        "peers": versions,
        "sequence_length": length,
        "batch_rows": batch_rows,
        "text_tokens": text_tokens,
        "rounds": rounds,
        "seconds": seconds,
        "readers": {name: _summary(runs, found["v4train flat"]) for name, runs in found.items()},
        "load_average": {"before": load, "after": machine.load_average()},
    }


def _summary(runs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"first_batch_seconds": statistics.median(run["first_batch_seconds"] for run in runs)}
    for field, ratio in (("tokens_per_second", "ratio"), ("tokens_per_cpu_second", "cpu_ratio")):
        rates, reference = ([run[field][0] for run in which] for which in (runs, ours))
        summary[field] = {"median": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates))}
        summary[ratio] = round(statistics.median(a / b for a, b in zip(reference, rates, strict=True)), 2)
    return summary


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{'reader':<18} {'Mtok/s':>8} {'ours / it':>10} {'per CPU s':>10} {'ours / it':>10} {'first batch':>12}"]
    for name, r in result["readers"].items():
        rate, cpu = r["tokens_per_second"]["median"] / 1e6, r["tokens_per_cpu_second"]["median"] / 1e6
        lines.append(
            f"{name:<18} {rate:>8.1f} {r['ratio']:>10.2f} {cpu:>10.1f} {r['cpu_ratio']:>10.2f} {r['first_batch_seconds']:>10.2f} s"
        )
    shape = f"rows of {result['sequence_length']:,}, {result['batch_rows']} a batch, one process, no worker processes"
    return "\n".join([*lines, f"{shape}; medians of {result['rounds']} rounds of {result['seconds']} s"])


def _run(python: pathlib.Path, what: str, **options: Any) -> dict[str, Any]:
    command = [str(python), "-W", "ignore", str(_PROGRAM), what]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reader = options.get("reader", "the peers")
        raise ValueError(f"{reader}: the process ended with exit code {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
