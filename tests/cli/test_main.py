"""The command line's frame, with a stand-in for a command: what is imported, what is printed, which exit code."""

import errno
import os
import shlex
import subprocess
import sys
import types

import pytest

from v4train.cli import main


@pytest.fixture
def command(monkeypatch):
    """Registers a command ``stand-in`` that calls the given function; returns a function that runs it."""
    monkeypatch.delenv("V4TRAIN_DEBUG", raising=False)
    module = types.ModuleType("v4train_stand_in")
    monkeypatch.setitem(sys.modules, "v4train_stand_in", module)
    monkeypatch.setitem(main.COMMANDS, "stand-in", ("v4train_stand_in", "does as it is told"))

    def configure(parser):
        parser.add_argument("recipe")
        parser.add_argument("--set", action="append", default=[])

    def run(act, *words):
        module.configure, module.run = configure, act
        return main.main(["stand-in", *(words or ("r.yaml",))])

    return run


def raiser(error):
    def act(args):
        raise error

    return act


def test_a_command_gets_its_options_and_gives_the_exit_code(command):
    seen = []
    assert command(lambda args: seen.append(args) or 7, "r.yaml", "--set", "a=1", "--set", "b=-2") == 7
    assert (seen[0].recipe, seen[0].set, seen[0].debug, seen[0].command) == ("r.yaml", ["a=1", "b=-2"], False, "stand-in")


@pytest.mark.parametrize("error", [ValueError("steps = 0: give at least 1"), FileNotFoundError(errno.ENOENT, "No such file", "r.yaml")])
def test_a_users_mistake_is_one_message(command, capsys, error):
    assert command(raiser(error)) == 2
    out, err = capsys.readouterr()
    message = "r.yaml: No such file" if isinstance(error, OSError) else "steps = 0: give at least 1"
    assert (out, err) == ("", f"v4train: {message}\n(--debug shows where this was found)\n")


@pytest.mark.parametrize("words", [("r.yaml", "--debug"), ("--debug", "r.yaml")])
def test_debug_shows_the_trace(command, words):
    with pytest.raises(ValueError, match="steps"):
        command(raiser(ValueError("steps")), *words)


def test_debug_from_the_environment(command, monkeypatch):
    monkeypatch.setenv("V4TRAIN_DEBUG", "0")
    assert command(raiser(ValueError("steps"))) == 2
    monkeypatch.setenv("V4TRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="steps"):
        command(raiser(ValueError("steps")))


def test_our_own_mistakes_keep_their_trace(command):
    with pytest.raises(TypeError, match="ours"):
        command(raiser(TypeError("ours")))


def test_interrupt(command, capsys):
    assert command(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "v4train: interrupted\n"


def wrapped():
    error = RuntimeError("checkpoint failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/state")
    return error


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"), " while writing runs/a"),
        (wrapped(), ""),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), ""),
    ],
)
def test_full_disk(command, capsys, error, place):
    assert command(raiser(error)) == 1
    assert capsys.readouterr().err.startswith(f"v4train: the disk is full{place}; make room")


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["trian"])
    assert caught.value.code == 2
    assert "there is no command 'trian'; did you mean 'train'? (commands: train, " in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert main.main([]) == 2
    out = " ".join(capsys.readouterr().out.split())  # long descriptions are wrapped
    assert all(name in out and text in out for name, (_, text) in main.COMMANDS.items())


def run_python(code, *, pipe=""):
    command = f"{sys.executable} -c {shlex.quote(code)} {pipe}"
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy():
    code = """
import sys
from v4train.cli import main
try:
    main.main(["--help"])
except SystemExit as e:
    assert e.code == 0
heavy = {"jax", "flax", "numpy", "pydantic", "yaml", "rich"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith("v4train.") and not name.startswith("v4train.cli")]
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "train a model from a recipe" in done.stdout


def test_a_closed_pipe_is_quiet():
    code = """
import sys, types
from v4train.cli import main
main.COMMANDS["talk"] = ("talk", "prints")
def talk(args):
    for i in range(100_000):
        print("line", i)
sys.modules["talk"] = types.SimpleNamespace(configure=lambda parser: None, run=talk)
sys.exit(main.main(["talk"]))
"""
    done = run_python(code, pipe="| head -n 1")
    assert (done.stdout, done.stderr, done.returncode) == ("line 0\n", "", 141)
