"""`v4train report`: what happened in one run, or in several next to each other, as one HTML page.

The page holds everything it needs (style, script, data, drawings), so it can be mailed, attached to a change, opened from a disk
without a network and printed, and it will still open in ten years. The rejected alternative is a plotting library: it would be a
dependency of every installation, draw pictures without values in them, or load a megabyte of script from elsewhere.

Only the standard library and numpy are imported: a report is made on any machine, also while the run goes on.
"""

import argparse
import pathlib

from v4train.cli.report_page import page
from v4train.cli.report_page import runs as runs_lib

FILE = "report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    parser.description = "Write a self-contained HTML page about one run, or about several runs compared."
    parser.add_argument("runs", metavar="RUN", type=pathlib.Path, nargs="+", help="run directory (holds metrics.jsonl)")
    parser.add_argument(
        "--out", type=pathlib.Path, help=f"file to write (default: RUN/{FILE}; for several runs {FILE} in the current directory)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page, prints its path and returns 0.

    Raises:
        ValueError: a run cannot be read, or the page cannot be written.
    """
    runs = runs_lib.read_runs(args.runs)
    out = args.out or (args.runs[0] / FILE if len(runs) == 1 else pathlib.Path(FILE))
    if out.is_dir():
        raise ValueError(f"--out {out}: is a directory; give a file, for example {out / FILE}")
    text = page.write(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{out}: cannot write the page ({error.strerror}); give a writable path with --out") from error
    print(out)
    return 0
