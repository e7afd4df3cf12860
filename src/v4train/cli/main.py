"""``v4train <command>``: finds the command, runs it, and turns what went wrong into one readable message.

A command is a module with ``configure(parser)``, which adds its options, and ``run(args) -> int``, which returns the exit code. Only
the module of the command that is asked for is imported: ``v4train --help`` answers at once and starts no device.

Exit codes: 0 done, 1 the machine failed (disk full), 2 the user's input is wrong, 130 interrupted, 141 the reader of a pipe went
away. A ``ValueError`` is by the project's rule a message for the user, so it is printed without a stack trace, as is a file that
cannot be opened; ``--debug`` (or ``V4TRAIN_DEBUG=1``) shows the trace. Everything else is our mistake and always shows it.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("v4train.cli.train", "train a model from a recipe"),
    "plan": ("v4train.cli.plan", "what a run would take: memory, time and money, before it starts"),
    "data": ("v4train.cli.data", "prepare data for training, and look at them"),
    "convert": ("v4train.cli.convert", "read and write open weights"),
    "generate": ("v4train.cli.generate", "continue a prompt of text, images and sound"),
    "serve": ("v4train.cli.serve", "answer requests over HTTP, with OpenAI's interface"),
    "evaluate": ("v4train.cli.evaluate", "held-out loss, questions with choices, and needles, of a saved model"),
    "score": ("v4train.cli.score", "logits, loss and gradient norm of a checkpoint on given tokens"),
    "bench": ("v4train.cli.bench", "measure speed"),
    "report": ("v4train.cli.report", "show what a run did"),
}
"""Name -> (module, help)."""

_DEBUG_HELP = "show the stack trace of an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``v4train``; by default those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: from argparse, after ``--help`` or on options that it does not know (code 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = shows_traces("--debug" in words)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains once more
        return 141
    except (Exception, KeyboardInterrupt) as e:
        message = describe(e)
        if debug or message is None:
            raise
        return _say(*message)


def _run(words: list[str]) -> int:
    name = next((word for word in words if not word.startswith("-")), None)
    parser, commands = _parser()
    if name is not None and name not in COMMANDS:
        parser.error(f"there is no command {name!r}{_nearest(name)} (commands: {', '.join(COMMANDS)})")
    if name is None:
        parser.parse_args(words)  # --help, --version, unknown options
        parser.print_help()
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    module.configure(commands[name])
    return module.run(parser.parse_args(words))


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="v4train", description="Pre-train DeepSeek-V4-class models with JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    choices = parser.add_subparsers(dest="command", metavar="<command>", title="commands")
    commands = {}
    for name, (_, text) in COMMANDS.items():
        commands[name] = choices.add_parser(name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
        commands[name].add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    return parser, commands


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: the look-up reads the metadata of every installed package."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib import metadata

        try:
            version = metadata.version("v4train")
        except metadata.PackageNotFoundError:
            version = "(not installed: running from its sources)"
        print(f"v4train {version}")
        parser.exit()


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shows_traces(asked: bool) -> bool:
    """Whether errors come with their stack traces: ``--debug`` was ``asked`` for, or the environment says so."""
    return asked or os.environ.get("V4TRAIN_DEBUG", "0") not in ("", "0")


def describe(e: BaseException) -> tuple[str, int] | None:
    """What to tell the user and the exit code, or None if the error is not one for users."""
    if isinstance(e, KeyboardInterrupt):
        return "interrupted", 130
    if _disk_is_full(e):
        name = getattr(e, "filename", None)
        place = f" while writing {name}" if name else ""
        return f"the disk is full{place}; make room (old checkpoints, caches) or write to another disk, then start again\n({e})", 1
    if isinstance(e, ValueError):
        return f"{e}\n(--debug shows where this was found)", 2
    if isinstance(e, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError) and e.filename:
        return f"{e.filename}: {e.strerror}\n(--debug shows where this was found)", 2
    return None


def _disk_is_full(e: BaseException) -> bool:
    """Also when a library wrapped the error: TensorStore and Orbax keep only its text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any((isinstance(x, OSError) and x.errno in full) or os.strerror(errno.ENOSPC) in str(x) for x in _chain(e))


def _chain(e: BaseException | None) -> Iterator[BaseException]:
    while e is not None:
        yield e
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)


def _say(text: str, code: int) -> int:
    print(f"v4train: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
