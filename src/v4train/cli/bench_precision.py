"""``v4train bench precision``: the same run in bf16, in FP8, and with experts trained for FP4."""

import argparse
import importlib
import json
import pathlib
from typing import Any


def configure(choices: Any) -> None:
    """Adds the measurement to those of ``v4train bench``."""
    precision = choices.add_parser(
        "precision",
        help="final loss in FP8 and FP4 beside that in bf16",
        description="Train one recipe in bf16, in FP8, and in FP8 with experts trained for FP4, and compare the losses.",
        allow_abbrev=False,
    )
    precision.add_argument("--config", metavar="RECIPE", help="the recipe file (default: configs/bench/precision.yaml)")
    precision.add_argument("--directory", metavar="DIR", help="keep the runs there, and go on with those that are there")
    precision.add_argument("--yardstick", action="store_true", help="also train in bf16 from other first values")
    precision.add_argument("--json", action="store_true", help="print JSON instead of a table")
    precision.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value of all runs")
    precision.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments or the recipe, or a run that failed.
    """
    precision = importlib.import_module("v4train.bench.precision")
    directory = None if args.directory is None else pathlib.Path(args.directory)
    options = {"directory": directory, "yardstick": args.yardstick, "overrides": args.overrides}
    result = precision.measure(args.config or precision.RECIPE, **options)
    print(json.dumps(result, indent=1) if args.json else precision.table(result))
    return 0
