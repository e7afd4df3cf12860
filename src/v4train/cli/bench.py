"""``v4train bench <what>``: measures, and prints the result as one JSON object; everything else goes to stderr.

The measurements live in `v4train.bench`, which is a stranger to the command line as one command is to another. They are therefore found
by name, as `cli.main` finds commands, and only the one that is asked for is imported.
"""

import argparse
import importlib
import json
import pathlib
import time
from typing import Any

from v4train.cli import bench_context, bench_curriculum, bench_decode, bench_efficiency, bench_precision, bench_stability

_STARTED = time.time()


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    choices = parser.add_subparsers(dest="what", metavar="<what>", required=True, title="measurements")
    step = choices.add_parser("step", help="speed of a recipe's training step", description="Measure training steps.", allow_abbrev=False)
    _configure_step(step)
    memory = choices.add_parser(
        "memory",
        help="memory of a training step by length of row",
        description="Measure how the memory of one training step grows with the length of a row, each length in its own process.",
        allow_abbrev=False,
    )
    memory.add_argument(
        "--config", metavar="RECIPE", help="the recipe file (default: configs/bench/long_context.yaml); its data are not read"
    )
    memory.add_argument("--lengths", metavar="N,N", help="tokens of a row (default: 16384,32768)")
    memory.add_argument("--steps", type=int, default=1, metavar="N", help="training steps per length (default: 1)")
    memory.add_argument("--json", action="store_true", help="print JSON instead of a table")
    convert = choices.add_parser(
        "convert",
        help="memory and speed of converting open weights",
        description="Convert a made-up checkpoint with true tensor shapes in both directions, each in its own process.",
        allow_abbrev=False,
    )
    convert.add_argument("--config", metavar="RECIPE", help="recipe whose tensors are measured (default: configs/v4_flash.yaml)")
    convert.add_argument(
        "--gb", type=float, default=6.5, metavar="N", help="least size in BF16 (default: 6.5); five times that on the disk"
    )
    convert.add_argument("--directory", metavar="DIR", help="where to work (default: the system's temporary directory)")
    convert.add_argument("--json", action="store_true", help="print JSON instead of a table")
    convert.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")
    _configure_data(choices)
    bench_context.configure(choices)
    bench_curriculum.configure(choices)
    bench_stability.configure(choices)
    bench_decode.configure(choices)
    bench_efficiency.configure(choices)
    bench_precision.configure(choices)
    for one in (step, memory):
        one.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def _configure_step(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--config",
        metavar="RECIPE",
        help="the recipe file (YAML); its own data are used. --lengths and --depths read none (default: configs/bench/long_context.yaml)",
    )
    step.add_argument("--steps", type=int, metavar="N", help="steps to measure (default: 10; 3 for each length)")
    step.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before those (default: 2)")
    growth = step.add_mutually_exclusive_group()
    growth.add_argument("--lengths", metavar="N,N", help="time per token by length of row, beside the FLOPs, at fixed tokens a step")
    growth.add_argument("--depths", metavar="N,N", help="time to compile by number of layers")
    step.add_argument("--tokens", type=int, metavar="N", help="with --lengths: tokens of a step (default: one row of the longest)")


def _configure_data(choices: Any) -> None:
    data = choices.add_parser(
        "data",
        help="speed of reading training rows",
        description="Measure how fast rows come out of the data pipeline, each format and length in its own process.",
        allow_abbrev=False,
    )
    data.add_argument("--directory", metavar="DIR", help="keep the synthetic documents there (0.6 GB; default: a temporary directory)")
    data.add_argument("--read-threads", type=int, default=1, metavar="N", help="as in a recipe (default: 1)")
    data.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each case (default: 5)")
    data.add_argument("--seconds", type=float, default=1.0, metavar="T", help="of each measurement (default: 1)")
    versus = choices.add_parser(
        "versus",
        help="the same work done by other libraries",
        description="Measure our readers and others in turns: the same documents, the same rows.",
        allow_abbrev=False,
    )
    versus.add_argument("work", choices=("data",), help="what is compared")
    versus.add_argument("--install", action="store_true", help="make .venv-versus with them first (6 GB: they bring PyTorch)")
    versus.add_argument("--python", metavar="FILE", help="an interpreter that has them (default: that of .venv-versus)")
    versus.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a row (default: 8192)")
    versus.add_argument("--rounds", type=int, default=3, metavar="N", help="turns (default: 3)")
    versus.add_argument("--seconds", type=float, default=2.0, metavar="T", help="of each measurement (default: 2)")
    for one in (data, versus):
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments, the recipe or its data.
    """
    if args.what == "context":
        return bench_context.run(args)
    if args.what == "curriculum":
        return bench_curriculum.run(args)
    if args.what == "stability":
        return bench_stability.run(args)
    if args.what == "decode":
        return bench_decode.run(args)
    if args.what == "efficiency":
        return bench_efficiency.run(args)
    if args.what == "precision":
        return bench_precision.run(args)
    acts = {"step": _step, "memory": _memory, "convert": _convert, "data": _data, "versus": _versus}
    return acts[args.what](args)


def _step(args: argparse.Namespace) -> int:
    from v4train import recipe as recipe_lib

    if args.lengths is not None or args.depths is not None:
        return _growth(args)
    if args.config is None:
        raise ValueError("--config is missing: name the recipe whose training step is measured")
    loaded = recipe_lib.resolve(args.config, overrides=args.overrides)
    step = importlib.import_module("v4train.bench.step")
    return _print(step.measure(loaded, steps=10 if args.steps is None else args.steps, warmup=args.warmup, program_started=_STARTED))


def _growth(args: argparse.Namespace) -> int:
    growth, memory = importlib.import_module("v4train.bench.growth"), importlib.import_module("v4train.bench.memory")
    config = args.config or memory.RECIPE
    if args.depths is not None:
        return _print(growth.measure_depths(config, depths=growth.parse_depths(args.depths), overrides=args.overrides))
    steps = 3 if args.steps is None else args.steps
    lengths = memory.parse_lengths(args.lengths)
    return _print(growth.measure_lengths(config, lengths=lengths, tokens=args.tokens, steps=steps, overrides=args.overrides))


def _memory(args: argparse.Namespace) -> int:
    memory = importlib.import_module("v4train.bench.memory")
    lengths = memory.LENGTHS if args.lengths is None else memory.parse_lengths(args.lengths)
    result = memory.measure(args.config or memory.RECIPE, lengths=lengths, steps=args.steps, overrides=args.overrides)
    if args.json:
        return _print(result)
    print(memory.table(result))
    return 0


def _convert(args: argparse.Namespace) -> int:
    convert = importlib.import_module("v4train.bench.convert")
    result = convert.measure(args.config or convert.RECIPE, gigabytes=args.gb, directory=args.directory)
    if args.json:
        return _print(result)
    print(convert.table(result))
    return 0


def _data(args: argparse.Namespace) -> int:
    data = importlib.import_module("v4train.bench.data")
    directory = None if args.directory is None else pathlib.Path(args.directory)
    options = {"read_threads": args.read_threads, "repeats": args.repeats, "seconds": args.seconds}
    result = data.measure(directory, **options)
    if args.json:
        return _print(result)
    print(data.table(result))
    return 0


def _versus(args: argparse.Namespace) -> int:
    versus = importlib.import_module("v4train.bench.versus.data")
    if args.install:
        versus.install()
    python = None if args.python is None else pathlib.Path(args.python)
    rows = max(1, 2**17 // args.length)
    result = versus.measure(python, length=args.length, batch_rows=rows, rounds=args.rounds, seconds=args.seconds)
    if args.json:
        return _print(result)
    print(versus.table(result))
    return 0


def _print(result: dict[str, Any]) -> int:
    print(json.dumps(result, indent=1))
    return 0
