"""What the tests of scores share."""

import pytest

from v4train.core import compiler


@pytest.fixture
def quick_compilation(monkeypatch):
    """Half the compile time. Programs with a callback, as all that score are, are not kept in the cache of compiled ones."""
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_backend_optimization_level": 0})
