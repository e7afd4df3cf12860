"""``v4train data <what>``: data before they are trained on.

A subcommand is a module of this folder with ``configure`` and ``run``, like a command, and a row in `SUBCOMMANDS`.
"""

import argparse
import importlib

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("v4train.cli.data_prepare", "make a token store from files of text, images and sound"),
    "inspect": ("v4train.cli.data_inspect", "show what the model will see at a step"),
    "stats": ("v4train.cli.data_stats", "show what the mixture is made of and what training draws of it"),
}
"""Name -> (module, help)."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands with their arguments."""
    choices = parser.add_subparsers(dest="what", metavar="<what>", required=True, title="subcommands")
    for name, (module, text) in SUBCOMMANDS.items():
        one = choices.add_parser(name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
        importlib.import_module(module).configure(one)
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the stack trace of an error")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns its exit code."""
    return importlib.import_module(SUBCOMMANDS[args.what][0]).run(args)
