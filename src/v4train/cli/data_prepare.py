"""``v4train data prepare SPEC.yaml``: files of text, images and sound become a token store."""

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("spec", metavar="SPEC", help="what to make from what (YAML; configs/data has examples)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a value; may be repeated")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the spec's, or one a CPU core)")
    parser.add_argument("--runner", choices=("local", "ray"), default="local", help="processes of this machine (default), or Ray tasks")
    parser.add_argument("--fresh", action="store_true", help="throw away what an earlier preparation left in the output directory")


def run(args: argparse.Namespace) -> int:
    """Prepares and prints what was made; returns 0.

    Raises:
        ValueError: the spec, its inputs or its output directory cannot be used, or too many records are bad.
    """
    from v4train.config import load
    from v4train.data.prepare import config, preparation

    spec = load.load(args.spec, cls=config.PrepareConfig, overrides=args.overrides).config
    if args.workers is not None:
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers}: at least 1")
        spec = spec.model_copy(update={"workers": args.workers})
    _print(preparation.prepare(spec, runner=args.runner, fresh=args.fresh))
    return 0


def _print(summary) -> None:
    from rich import console, table

    screen = console.Console(highlight=False)
    shown = table.Table(box=None, pad_edge=False)
    for name in ("input", "records", "documents", "copies", "bad", "filtered"):
        shown.add_column(name, justify="left" if name == "input" else "right")
    for source in summary.sources:
        filtered = ", ".join(f"{name} {count:,}" for name, count in source.refused.items()) or "0"
        counts = (source.records, source.documents, source.copies, source.bad)
        shown.add_row(source.name, *(f"{count:,}" for count in counts), filtered)
    screen.print(shown)
    tokens, files = summary.manifest["tokens"], summary.manifest["files"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in tokens.items() if count)
    size = sum(entry["bytes"] for entry in files.values())
    print(f"{summary.output}: {summary.manifest['documents']:,} documents, tokens: {kinds}; {size / 1e6:,.1f} MB in {len(files)} files")
    if not summary.workers:
        print("It was finished before; nothing was done.")
    elif summary.tokens:
        rate = summary.tokens / max(summary.seconds, 1e-9)
        print(f"{summary.tokens:,} tokens in {summary.seconds:.1f} s: {rate:,.0f} tokens/s with {summary.workers} process(es)")
    if any(source.bad for source in summary.sources):
        print(f"Bad records and their reasons: {summary.output / 'quarantine.jsonl'}")
