"""``v4train bench stability``: spikes with and without the guard."""

import argparse
import importlib
import json
from typing import Any


def configure(choices: Any) -> None:
    """Adds the measurement to those of ``v4train bench``."""
    stability = choices.add_parser(
        "stability",
        help="what the guard against spikes is worth",
        description="Train a recipe with a fault at a known step, with and without the guard, and compare the final losses.",
        allow_abbrev=False,
    )
    stability.add_argument("--config", metavar="RECIPE", help="the recipe file (default: configs/bench/stability.yaml)")
    stability.add_argument("--at", type=int, default=120, metavar="N", help="the batch with the fault, from 0 (default: 120)")
    stability.add_argument("--json", action="store_true", help="print JSON instead of a table")
    stability.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; repeatable")
    stability.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns 0.

    Raises:
        ValueError: a mistake in the arguments, the recipe or its data.
    """
    from v4train import recipe as recipe_lib

    stability = importlib.import_module("v4train.bench.stability")
    loaded = recipe_lib.resolve(args.config or stability.RECIPE, overrides=args.overrides)
    result = stability.measure(loaded, at=args.at)
    print(json.dumps(result, indent=1) if args.json else stability.table(result))
    return 0
