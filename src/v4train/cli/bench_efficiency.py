"""``v4train bench efficiency``: training compute of the V4 recipe against what it replaced."""

import argparse
import importlib
import json
import pathlib
import sys
from typing import Any


def configure(choices: Any) -> None:
    """Adds the measurement to those of ``v4train bench``."""
    efficiency = choices.add_parser(
        "efficiency",
        help="training compute of the V4 recipe against AdamW, plain residuals, sigmoid routing and dense attention",
        description="Train the recipes of configs/bench/efficiency and compare their held-out losses by compute. "
        "Run it in the repository's root. Finished runs are kept: started again, it goes on.",
        allow_abbrev=False,
    )
    efficiency.add_argument("--runs", metavar="A,B", help="recipes to train, by file name (default: all of configs/bench/efficiency)")
    efficiency.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe (default: 3)")
    efficiency.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a row, 4,096 in a step (default: %(default)s)")
    efficiency.add_argument("--directory", metavar="DIR", default="runs/efficiency", help="where runs are kept (default: %(default)s)")
    efficiency.add_argument("--finished", action="store_true", help="train nothing: tell what the finished runs say")
    efficiency.add_argument("--svg", metavar="FILE", help="write the curves there as a picture")
    efficiency.add_argument("--json", action="store_true", help="print JSON instead of a table")
    efficiency.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="change every recipe")
    efficiency.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments or a recipe, or a run that failed.
    """
    parts = {name: importlib.import_module(f"v4train.bench.efficiency.{name}") for name in ("arms", "measure", "report", "curves")}
    machine = importlib.import_module("v4train.bench.machine")
    names = list(parts["arms"].ARMS) if args.runs is None else [word.strip() for word in args.runs.split(",") if word.strip()]
    before, directory = machine.load_average(), pathlib.Path(args.directory)
    options = {
        "seeds": args.seeds,
        "length": args.length,
        "directory": directory,
        "train": not args.finished,
        "overrides": tuple(args.overrides),
    }
    result = parts["measure"].measure(names, **options, say=_say)
    result = {"bench": "efficiency", **machine.describe(devices=1), "load_before": before, **result}
    if args.svg is not None:
        pathlib.Path(args.svg).write_text(parts["curves"].picture(result), encoding="utf-8")
    print(json.dumps(result, indent=1) if args.json else parts["report"].table(result))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
