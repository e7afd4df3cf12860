"""Products in full precision: what is compared here differs by rounding only."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def precise():
    """For all tests of this folder, and for its fixtures."""
    with jax.default_matmul_precision("highest"):
        yield
