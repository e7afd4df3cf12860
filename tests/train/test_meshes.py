"""The same recipe gives the same loss curve on every mesh: 6 steps, optimizer, router biases and microbatches included."""

import jax
import numpy as np
import pytest

from tests.train import tiny
from tests.train.compiled import case

STEPS = 6


def curve(data, *, microbatches=1, **mesh):
    """Loss, gradient norm, losses by source and loads of each step; the first and the last state."""
    values = tiny.values(data, data)["train"] | {"microbatches": microbatches}
    on_mesh = case(data, mesh=mesh, train=values)
    state, reports = on_mesh.state, []
    for i in range(STEPS):
        state, report = on_mesh.run(state, on_mesh.batch(i))
        reports.append(jax.device_get(report))
    assert all(r.finite for r in reports)
    return reports, jax.device_get(on_mesh.state), jax.device_get(state)


def distance(a, b) -> float:
    """Between the parameters of two states."""
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return float(np.sqrt(sum(np.square(x - y, dtype=np.float64).sum() for x, y in pairs)))


@pytest.fixture(scope="module")
def one_device(data):
    return curve(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"fsdp": 8}, {"expert": 8}, {"expert": 2, "fsdp": 2, "microbatches": 2}, {"expert": 4, "fsdp": 2}], ids=str
)
def test_the_loss_curve_is_that_of_one_device(data, one_device, settings):
    wanted, first, last = one_device
    found, _, found_last = curve(data, **settings)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, err_msg=f"step {i}")
        np.testing.assert_allclose(a.text, b.text, rtol=1e-4, err_msg=f"step {i}")
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=5e-3, err_msg=f"step {i}")
        np.testing.assert_array_equal(a.text_weight, b.text_weight)
        assert np.abs(a.load - b.load).sum() <= 0.01 * b.load.sum(), "more than a tie here and there"
    assert wanted[-1].loss < wanted[0].loss
    # All parameters as one vector: both optimizers blow single gradients up that are 0 but for rounding.
    apart, moved = (distance(x, y) for x, y in ((found_last, last), (first, last)))
    assert apart < 0.1 * moved
