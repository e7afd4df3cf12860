"""``v4train bench <what>``: measures, and prints the result as one JSON object; everything else goes to stderr.

The measurements live in `v4train.bench`, which is a stranger to the command line as one command is to another. They are therefore found
by name, as `cli.main` finds commands, and only the one that is asked for is imported.
"""

import argparse
import importlib
import json
import time
from typing import Any

_STARTED = time.time()


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    choices = parser.add_subparsers(dest="what", metavar="<what>", required=True, title="measurements")
    step = choices.add_parser("step", help="speed of a recipe's training step", description="Measure training steps.", allow_abbrev=False)
    step.add_argument("--config", metavar="RECIPE", required=True, help="the recipe file (YAML); its own data are used")
    step.add_argument("--steps", type=int, default=10, metavar="N", help="steps to measure (default: 10)")
    step.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before those (default: 2)")
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
    for one in (step, memory):
        one.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments, the recipe or its data.
    """
    return {"step": _step, "memory": _memory, "convert": _convert}[args.what](args)


def _step(args: argparse.Namespace) -> int:
    from v4train import recipe as recipe_lib

    loaded = recipe_lib.resolve(args.config, overrides=args.overrides)
    step = importlib.import_module("v4train.bench.step")
    return _print(step.measure(loaded, steps=args.steps, warmup=args.warmup, program_started=_STARTED))


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


def _print(result: dict[str, Any]) -> int:
    print(json.dumps(result, indent=1))
    return 0
