"""One way of reading, in a process of its own: ``python -m v4train.bench.one_reader``, for `bench.data`.

A process's peak memory is that of everything it ever did, and the first batch is the first only once. What is timed is what a training loop
sees: ``next`` on the pipeline's iterator, through grain, with its threads.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

from v4train.bench import corpus as corpus_lib
from v4train.bench import machine
from v4train.data import config as config_lib
from v4train.data import pipeline
from v4train.data import tokenizer as tokenizer_lib

FAR_TOKENS = (10**8, 10**12)
"""The place of a restore: so many tokens into training."""
FAR_TOKENS_OF_MEDIA = (10**8, 10**9)
"""The same with media, whose rows have no closed form. A run has counted them on its way; here they are counted first (`counting_seconds`),
and the restore finds what a checkpoint would have brought it."""


def measure(config: config_lib.DataConfig, *, batch_rows: int, seconds: float, repeats: int, imported: float) -> dict[str, Any]:
    """First batch, speed, restore and memory; times in seconds, rates in tokens (padding included) per second."""
    resident = machine.peak_resident_bytes()
    started = time.perf_counter()
    reader = pipeline.Pipeline(config, batch_rows=batch_rows)
    batches = reader.iterate(0)
    batch = next(batches)
    first = time.perf_counter() - started
    rates, cpu_rates = [], []
    for _ in range(repeats):
        begin, cpu, n = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds or not n:
            batch = next(batches)
            n += 1
        tokens = n * reader.tokens_per_step
        rates.append(tokens / (time.perf_counter() - begin))
        cpu_rates.append(tokens / (time.process_time() - cpu))
    media = float((batch.modality > 0).mean())
    size = sum(array.nbytes for array in vars(batch).values())
    peak = machine.peak_resident_bytes()
    del batches, batch
    restores = {}
    counting = {}
    for far in FAR_TOKENS_OF_MEDIA if config.max_patches else FAR_TOKENS:
        step, started = far // reader.tokens_per_step, time.perf_counter()
        kept = json.dumps(reader.milestones(step))
        counting[f"{far:.0e}"] = round(time.perf_counter() - started, 4)
        started = time.perf_counter()
        restored = pipeline.Pipeline(config, batch_rows=batch_rows)
        restored.remember(json.loads(kept))
        again = restored.iterate(step)
        next(again)
        restores[f"{far:.0e}"] = round(time.perf_counter() - started, 4)
        del again
    return {
        "tokens_per_second": rates,
        "tokens_per_cpu_second": cpu_rates,
        "import_seconds": round(imported, 4),
        "first_batch_seconds": round(first, 4),
        "restore_seconds": restores,
        "counting_seconds": counting,
        "resident_before_bytes": resident,
        "peak_resident_bytes": peak,
        "batch_bytes": size,
        "media_share": round(media, 4),
        "bad_documents": len(reader.quarantine.records),
    }


def config_of(
    corpus: corpus_lib.Corpus, name: str, *, length: int, batch_rows: int, read_threads: int, ahead: int
) -> config_lib.DataConfig:
    """A recipe's ``data`` with one source."""
    source: dict[str, Any] = {"name": name, "path": corpus.path(name), "weight": 1.0}
    if name == "megatron":
        fingerprint = tokenizer_lib.build(corpus.tokenizer).fingerprint
        source |= {"kind": "megatron", "tokenizer_fingerprint": fingerprint}
    images = name == "images"
    return config_lib.DataConfig.model_validate(
        {
            "sources": [source],
            "sequence_length": length,
            "image_patch": corpus_lib.IMAGE_PATCH,
            "max_patches": int(length * corpus_lib.PATCH_SHARE * 1.25) if images else 0,
            "tokenizer": corpus.tokenizer.model_dump(),
            "read_threads": read_threads,
            "prefetch_rows": ahead * batch_rows,
        }
    )


def main() -> int:
    """Prints the result as JSON."""
    begun = time.process_time()
    parser = argparse.ArgumentParser(prog="python -m v4train.bench.one_reader", description="Measure one reader.", allow_abbrev=False)
    for name in ("corpus", "source"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("length", "batch-rows", "read-threads", "repeats", "ahead"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    corpus = corpus_lib.Corpus(pathlib.Path(args.corpus))
    shape = {"length": args.length, "batch_rows": args.batch_rows, "read_threads": args.read_threads, "ahead": args.ahead}
    config = config_of(corpus, args.source, **shape)
    print(json.dumps(measure(config, batch_rows=args.batch_rows, seconds=args.seconds, repeats=args.repeats, imported=begun)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
