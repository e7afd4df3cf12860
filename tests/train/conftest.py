"""Token stores that all tests of the trainer share."""

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))
