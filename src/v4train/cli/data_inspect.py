"""``v4train data inspect RUN_OR_RECIPE``: what the model will see at a step.

The rows come from `Pipeline.batch(step)`, the function that training reads from, and are taken apart from the arrays of that batch alone. A
batch may be larger than this machine: then only the first part of it is read, exactly as the first of several hosts would.
"""

import argparse
import contextlib
import math
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from v4train.data import pipeline

DEFAULT_TOKENS = {"terminal": 2_000, "html": 8_192}  # places of a row
ANNOUNCED_SECONDS = 5  # planning that takes longer is said beforehand


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "subject", metavar="RUN_OR_RECIPE", type=pathlib.Path, help="a run directory (at its current step) or a recipe (at step 0)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="number of the batch, from 0")
    parser.add_argument("--rows", type=int, default=4, metavar="K", help="rows to show (default: 4)")
    parser.add_argument("--source", metavar="NAME", help="only rows of this data source")
    parser.add_argument("--from", type=int, default=0, metavar="T", dest="start", help="first place of a row to show (default: 0)")
    parser.add_argument("--tokens", type=int, metavar="N", help="places of a row to show (default: 2,000; with --html 8,192)")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write one self-contained HTML page instead")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Shows the step; returns 0.

    Raises:
        ValueError: a mistake in the arguments, the recipe or its data, or a page that cannot be written.
    """
    from v4train.checkpoint import restore, step_directory
    from v4train.cli.data_view import subject as subject_lib
    from v4train.data import pipeline
    from v4train.data.inspection import look as look_lib

    _check(args)
    subject = subject_lib.find(args.subject, overrides=args.overrides)
    step = subject.step if args.step is None else args.step
    tokens = args.tokens or DEFAULT_TOKENS["html" if args.html else "terminal"]
    window = (args.start, args.start + tokens)
    recipe = subject.recipe
    hosts = 1 if args.source else _most_hosts(recipe, rows=args.rows)
    data = pipeline.Pipeline(recipe.data, batch_rows=recipe.train.batch_rows, host_index=0, host_count=hosts)
    if args.subject.is_dir() and step_directory.list_steps(checkpoints := args.subject / "checkpoints"):
        with contextlib.suppress(ValueError):  # a damaged checkpoint: its milestones only save time
            data.remember(restore.describe(checkpoints, verify=False).metadata.get("milestones", {}))
    for line in _announced(data, step):
        print(line, file=sys.stderr)
    look = look_lib.look(data, step=step, rows=args.rows, source=args.source, window=window)
    batch_rows = data.phases.at(step).shape.rows
    of = f"{'row' if len(look.rows) == 1 else 'rows'} {', '.join(str(row.number) for row in look.rows)} of {batch_rows:,}"
    heading = f"{subject.name} · step {step:,} of {recipe.train.steps:,} · {of} · {look.sequence_length:,} places a row · {subject.origin}"
    if args.html is None:
        import rich.console

        from v4train.cli.data_view import inspect_terminal

        inspect_terminal.show(look, console=rich.console.Console(highlight=False), heading=heading, window=window)
        return 0
    from v4train.cli.data_view import inspect_page
    from v4train.cli.html_page import frame

    frame.write(inspect_page.page(look, name=subject.name, heading=heading, window=window, batch_rows=batch_rows), path=args.html)
    print(args.html)
    return 0


def _announced(data: "pipeline.Pipeline", step: int) -> list[str]:
    """What takes long, a line for each source."""
    return [
        f"{name}: {rows:,} rows before step {step:,} must be counted (about {seconds:,.0f} s): with media or `no_split` they have no "
        "closed form, and no checkpoint has come so far"
        for name, (rows, seconds) in data.planning(step).items()
        if seconds > ANNOUNCED_SECONDS
    ]


def _check(args: argparse.Namespace) -> None:
    smallest = {"--step": (args.step, 0), "--rows": (args.rows, 1), "--from": (args.start, 0), "--tokens": (args.tokens, 1)}
    given = {name: pair for name, pair in smallest.items() if pair[0] is not None}
    wrong = [f"{name} {value}: must be at least {least}" for name, (value, least) in given.items() if value < least]
    if wrong:
        raise ValueError("\n".join(wrong))


def _most_hosts(recipe, *, rows: int) -> int:
    """Among how many hosts the batches of all phases can be divided so that the first still has so many rows of each."""
    batches = [recipe.train.batch_rows, *(phase.batch_rows for phase in recipe.data.phases if phase.batch_rows is not None)]
    common = math.gcd(*batches)
    return max([1, *(hosts for hosts in range(1, common + 1) if common % hosts == 0 and min(batches) // hosts >= rows)])
