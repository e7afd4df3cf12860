"""What the tests of scores and of conversions share."""

import pytest

from tests.interop import steps
from v4train.cli import main
from v4train.core import compiler


@pytest.fixture
def quick_compilation(monkeypatch):
    """Half the compile time. Programs with a callback, as all that score are, are not kept in the cache of compiled ones."""
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def made():
    return steps.recipe()


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A run directory with one step."""
    directory = tmp_path_factory.mktemp("made") / "run"
    steps.write(directory, made, steps.values(made.model))
    return directory


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "open"
    assert main.main(["convert", "export", str(run), str(out), "--format", "fp32", "--shard-gb", "0.001"]) == 0
    return out
