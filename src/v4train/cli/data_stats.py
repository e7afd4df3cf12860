"""``v4train data stats RUN_OR_RECIPE``: what the mixture is made of, and what training draws of it.

Everything is read from the indexes of the stores or follows in closed form from the recipe; no document is read, and no device starts.
"""

import argparse
import json
import pathlib


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("subject", metavar="RUN_OR_RECIPE", type=pathlib.Path, help="a run directory or a recipe")
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write one self-contained HTML page instead")
    out.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Shows the mixture; returns 0.

    Raises:
        ValueError: a mistake in the recipe or its data, or a page that cannot be written.
    """
    from v4train.cli.data_view import subject as subject_lib
    from v4train.data import pipeline
    from v4train.data.inspection import statistics

    subject = subject_lib.find(args.subject, overrides=args.overrides)
    recipe = subject.recipe
    data = pipeline.Pipeline(recipe.data, batch_rows=recipe.train.batch_rows)
    measured = statistics.measure(data, config=recipe.data, steps=recipe.train.steps)
    heading = f"{subject.name} · {subject.origin}"
    if args.json:
        print(json.dumps({"name": subject.name} | measured.values(), indent=1))
    elif args.html is not None:
        from v4train.cli.data_view import stats_page
        from v4train.cli.html_page import frame

        frame.write(stats_page.page(measured, name=subject.name, heading=heading), path=args.html)
        print(args.html)
    else:
        import rich.console

        from v4train.cli.data_view import stats_table

        stats_table.show(measured, console=rich.console.Console(highlight=False), heading=heading)
    return 0
