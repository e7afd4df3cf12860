"""The same recipe and data train the same on every mesh: 20 steps of the whole step, optimizer and router biases included, in fp32.

Sums come out in another order on every mesh, so curves agree to rounding and no better, and training amplifies rounding. What was chosen so
that 1e-5 is a fair demand:

* Adam's eps is 1e-6 instead of 1e-20. An element whose gradient is 0 but for rounding (1e-10 here and -1e-10 there) moves by the whole
  learning rate, up here and down there, when nothing dampens it. For the same reason Muon takes 5 steps of its polynomial: each multiplies
  singular values that are nothing but rounding by 3.4.
* The learning rate is 1e-3 throughout. The loss falls by a tenth.
* Nothing is done about ties of router and indexer: none decides otherwise in these 20 steps, and loads are compared exactly.

Measured, losses then differ by 2e-7 at most and gradients by 3e-5 of a parameter's largest. The last test trains on a mean of row means,
the subtlest of the errors that a wrong sum over devices makes: its first loss is 7 times further off than allowed, its gradients 100 times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import tiny
from tests.train.compiled import case
from v4train.sharding import rules
from v4train.train import loss as loss_lib

STEPS, LOSS, GRADIENTS = 20, 1e-5, 1e-4
OPTIMIZER = {
    "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3, "warmup_steps": 0, "decay_steps": 0},
    "adamw": {"eps": 1e-6},
    "muon": {"coefficients": [[3.4445, -4.7750, 2.0315]] * 5},
}
ALONE = ["replica", "fsdp", "expert", "context", "tensor"]
MESHES = [
    *({axis: 8} for axis in ALONE),
    {"replica": 2, "fsdp": 4},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 4, "context": 2},
    {"fsdp": 4, "tensor": 2},
    {"expert": 4, "context": 2},
    {"expert": 2, "tensor": 4},
    {"context": 2, "tensor": 4},
    {"replica": 2, "expert": 2, "context": 2, "microbatches": 2},
    {"fsdp": 2, "expert": 2, "context": 2, "experts_over": ["expert", "context"]},
]
DEFAULT = {"expert": 4, "context": 2}
"""The mesh that is compared in every test run; the others are slow, at half a minute each."""


def train(data, *, microbatches=1, steps=STEPS, model=None, **mesh):
    """Reports of the steps, and the first step's gradients: its momentum and its mean, which start at 0."""
    recipe = tiny.values(data, data)
    changed = {
        "model": {"attention": recipe["model"]["attention"] | {"heads": 8, "head_dim": 8, "rope_dim": 4, "output_groups": 8}}
        | (model or {}),
        "data": {"sequence_length": 128, "max_patches": 60, "max_audio_frames": 60},
        "train": {"microbatches": microbatches, "steps": STEPS},
        "optimizer": OPTIMIZER,
    }
    here = case(data, mesh=mesh, **changed)
    state, reports, first = here.state, [], {}
    for i in range(steps):
        state, report = here.run(state, here.batch(i))
        reports.append(jax.device_get(report))
        if i == 0:
            first = jax.device_get({"momentum": state.optimizer.momentum, "mean": state.optimizer.mu})
    assert all(report.finite for report in reports)
    return reports, first


@pytest.fixture(scope="module", autouse=True)
def _small_parameters_are_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST_SPLIT", 64)
        yield


@pytest.fixture(scope="module")
def alone(data):
    """On one device."""
    return train(data)


def differences(found, wanted) -> dict[str, float]:
    """Largest relative difference of the losses, of the gradients' norms, and of the first step's gradients by parameter."""

    def largest(name):
        return max(
            float(np.max(np.abs(getattr(a, name) - getattr(b, name)) / np.abs(getattr(b, name)))) for a, b in zip(*reports, strict=True)
        )

    reports = found[0], wanted[0]
    pairs = zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True)
    gradients = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs)
    return {name: largest(name) for name in ("loss", "mtp", "indexer", "balance", "text", "grad_norm")} | {"gradients": float(gradients)}


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=() if m == DEFAULT else pytest.mark.slow) for m in MESHES], ids=str)
def test_20_steps_are_those_of_one_device(data, alone, mesh):
    found = train(data, **mesh)
    apart = differences(found, alone)
    assert apart["loss"] <= LOSS, apart
    assert apart["gradients"] <= GRADIENTS, apart
    for a, b in zip(found[0], alone[0], strict=True):
        np.testing.assert_array_equal(a.load, b.load)
        np.testing.assert_array_equal(a.text_weight, b.text_weight)


def test_a_classic_transformer_trains_the_same_on_a_mesh(data):
    """Plain residuals and sigmoid routing with an auxiliary loss."""
    moe = {"experts": 8, "top_k": 2, "ffn": 16, "hash_layers": 0, "affinity": "sigmoid", "bias_speed": 0, "balance_loss": 0.01}
    model = {"hyper": {"kind": "residual"}, "layers": [{"pattern": ["window"]}], "moe": moe, "mtp": None}
    found, wanted = (train(data, model=model, steps=5, **mesh) for mesh in ({"expert": 2, "context": 2, "tensor": 2}, {}))
    reports = zip(found[0], wanted[0], strict=True)
    pairs = zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True)
    assert max(abs(float(a.loss / b.loss) - 1) for a, b in reports) <= LOSS
    assert max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs) <= GRADIENTS


def test_the_loss_falls(alone):
    """Else everything could stand still and be equal."""
    assert alone[0][-1].loss < 0.92 * alone[0][0].loss


@pytest.mark.slow
def test_a_mean_of_row_means_is_far_outside(data, alone, monkeypatch):
    targets = loss_lib.targets

    def of_rows(batch, *, ahead):
        ids, weight = targets(batch, ahead=ahead)
        rows = weight.sum(axis=1, keepdims=True)
        return ids, weight * (rows.mean() / jnp.maximum(rows, 1.0))

    monkeypatch.setattr(loss_lib, "targets", of_rows)
    apart = differences(train(data, steps=1), (alone[0][:1], alone[1]))
    assert apart["loss"] > 5 * LOSS, "of the first step, before the parameters differ"
    assert apart["gradients"] > 100 * GRADIENTS, apart
