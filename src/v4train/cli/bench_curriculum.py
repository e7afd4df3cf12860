"""``v4train bench curriculum``: what the changes of a finished run did to its loss."""

import argparse
import importlib
import json
import pathlib
import sys
from typing import Any


def configure(choices: Any) -> None:
    """Adds the measurement to ``v4train bench``."""
    parser = choices.add_parser(
        "curriculum",
        help="what the changes of a run did to its loss",
        description="Compare the loss before and after each change of a finished run, in training and on one state, and show what the "
        "indexer learned in its warm-up.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", help="of the run; its checkpoints at the changes must be there")
    parser.add_argument("--around", type=int, default=20, metavar="N", help="steps before and after a change (default: 20)")
    parser.add_argument("--tokens", type=int, default=131_072, metavar="N", help="held-out tokens of each source (default: 131072)")
    parser.add_argument("--limit", type=float, default=0.02, metavar="X", help="a rise above this share is a jump (default: 0.02)")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Measures and prints JSON; returns 0.

    Raises:
        ValueError: a number out of range, or a directory without what is needed.
    """
    if args.around < 1 or args.tokens < 1 or args.limit <= 0:
        raise ValueError("--around, --tokens and --limit must be more than 0")
    curriculum = importlib.import_module("v4train.bench.curriculum")
    directory = pathlib.Path(args.directory)
    found = curriculum.measure(
        directory, around=args.around, tokens=args.tokens, limit=args.limit, say=lambda text: print(text, file=sys.stderr)
    )
    print(json.dumps(found, indent=1))
    return 0
