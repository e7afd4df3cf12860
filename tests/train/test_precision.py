"""Training with few bits: the same on every run and, within the rounding, on every mesh; what it counts; sums of gradients in bf16."""

import jax
import numpy as np
import pytest

from tests.train import tiny
from tests.train.compiled import case
from v4train import recipe as recipe_lib
from v4train.numerics import config as numerics_config
from v4train.ops import linear_codes, products, select
from v4train.sharding import rules
from v4train.train import precision
from v4train.train.hooks import metrics

FP8 = {"compute": "float32", "linear": "fp8", "experts": "fp8"}
FP4 = FP8 | {"experts": "mxfp4"}
MODEL = {"mtp": None, "image": None, "audio": None, "layers": [{"pattern": ["csa"]}], "media_tokens": []}


def text(data):
    """The tiny recipe's text alone."""
    return {
        "model": tiny.values(data, data)["model"] | MODEL | {"moe": {"experts": 4, "top_k": 2, "ffn": 32, "hash_layers": 0}},
        "data": {
            **tiny.values(data, data)["data"],
            "max_patches": 0,
            "max_audio_frames": 0,
            "sources": [{"name": "text", "path": str(data / "text"), "weight": 1.0}],
        },
    }


def train(data, *, numerics, steps, **changes):
    """State and reports after some steps."""
    here = case(data, **(text(data) | {"numerics": numerics} | changes))
    state, reports = here.state, []
    for i in range(steps):
        state, report = here.run(state, here.batch(i))
        reports.append(jax.device_get(report))
    return jax.device_get(state), reports


@pytest.fixture(scope="module")
def alone(data):
    return train(data, numerics=FP4, steps=20)


def test_100_steps_are_bit_equal_in_two_runs(data):
    """In emulated FP8 with experts in FP4 and gradients summed at random in bf16: one compiled step, run twice from the first state."""
    numerics = FP4 | {"compute": "bfloat16", "gradient_sums": "bfloat16"}
    here = case(data, **(text(data) | {"numerics": numerics, "train": {"microbatches": 2}}))
    ends = []
    for _ in range(2):
        state = here.state
        for i in range(100):
            state, report = here.run(state, here.batch(i))
        ends.append(jax.device_get((state, report)))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert ends[0][1].finite
    assert ends[0][0].skipped == 0


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"expert": 4, "fsdp": 2}], ids=str)
def test_meshes_agree_within_the_rounding(data, alone, mesh, monkeypatch):
    """Losses of the first step agree to fp32, because the forward pass rounds the same numbers; sums in another order then decide some
    roundings otherwise, each by half a step of E4M3, 2^-4, of one element among thousands."""
    monkeypatch.setattr(rules, "SMALLEST_SPLIT", 64)
    _, reports = train(data, numerics=FP4, steps=20, mesh=mesh)
    losses, wanted = (np.array([r.loss for r in rs]) for rs in (reports, alone[1]))
    assert abs(losses[0] / wanted[0] - 1) < 1e-4
    assert np.abs(losses / wanted - 1).max() < 0.01
    for name, share in alone[1][0].rounding.items():
        if name.startswith("weights/"):
            np.testing.assert_allclose(reports[0].rounding[name], share, rtol=1e-6, err_msg=name)
        if name.endswith("/linear"):
            np.testing.assert_allclose(reports[0].rounding[name], share, rtol=0.05, atol=1e-4, err_msg=name)


def test_a_step_with_kernels_for_projections_is_the_emulated_step(data, monkeypatch):
    """In scanned and recomputed layers on a mesh whose devices each have rows of their own: outputs, gradients and counts of rounding."""
    monkeypatch.setattr(rules, "SMALLEST_SPLIT", 64)
    kernels, of_weight = [], linear_codes.Products.of_weight
    monkeypatch.setattr(linear_codes.Products, "of_weight", lambda self, *given: (kernels.append(self.letters), of_weight(self, *given))[1])
    reports = []
    for units in ("emulated", "fp8_interpreted"):
        with select.using("fp8_linear", implementation=units):
            reports.append(train(data, numerics=FP8, steps=1, mesh={"fsdp": 4, "expert": 2})[1][0])
    assert len(kernels) >= 8, "traced for every projection"
    np.testing.assert_allclose(reports[1].loss, reports[0].loss, rtol=1e-5)
    np.testing.assert_allclose(reports[1].grad_norm, reports[0].grad_norm, rtol=1e-3)
    for name, share in reports[0].rounding.items():
        np.testing.assert_allclose(reports[1].rounding[name], share, rtol=0.05, atol=1e-4, err_msg=name)


def test_it_learns_and_reports_by_role(alone):
    _, reports = alone
    assert reports[-1].loss < 0.95 * reports[0].loss
    names = {f"{what}/{role}" for what in ("weights", "activations", "gradients") for role in ("linear", "experts")}
    assert set(reports[0].rounding) == names
    record = metrics.rounding(reports[0].rounding)
    assert set(record) == {f"{what}/{name}" for what in ("saturated", "vanished") for name in names}
    assert all(0 <= share < 0.2 for share in record.values())
    assert record["vanished/weights/experts"] > 0.02, "E2M1 has zero below a quarter of its scale"
    assert record["saturated/activations/linear"] > 0, "between 448 and 464 times the scale"


def test_in_the_compute_dtype_nothing_is_chosen_or_counted():
    config = numerics_config.NumericsConfig()
    assert precision.probes(config) == {}
    with precision.formats(config, counted={}):
        assert select.implementation("linear_product") == select.implementation("experts_product") == "compute"
    assert precision.by_role({}, {}) == {}


def test_fp8_kernels_can_be_left_out():
    roles = {"linear", "experts"}
    for emulate, units in ((False, "fp8_triton"), (True, "emulated")):
        for role in roles:
            config = numerics_config.NumericsConfig(**{role: "fp8"}, emulate=emulate)  # type: ignore[arg-type]
            with select.compiling_for("gpu"), precision.formats(config):
                assert select.implementation(f"fp8_{role}") == units
                assert isinstance(select.implementation(f"{role}_product"), products.Fp8)
                (other,) = roles - {role}
                assert select.implementation(f"{other}_product") == "compute"


def test_gradient_sums_in_bf16_are_near_those_in_fp32(data):
    """The momentum after one step is the gradient: each element within 8 roundings of 2^-7 of the largest sum, right on average."""
    train_ = {"microbatches": 8, "batch_rows": 8}
    sums = [
        jax.tree.leaves(train(data, numerics={"compute": "float32", "gradient_sums": form}, steps=1, train=train_)[0].optimizer.momentum)
        for form in ("float32", "bfloat16")
    ]
    apart = 0
    for exact, rounded in zip(*sums, strict=True):
        exact, rounded = np.asarray(exact, np.float64), np.asarray(rounded, np.float64)
        if exact.size > 1000 and np.abs(exact).max() > 0:
            error = rounded - exact
            apart += np.count_nonzero(error)
            assert np.abs(error).max() <= 8 * 2.0**-7 * 4 * np.abs(exact).max()
            assert abs(error.mean()) <= 6 * error.std() / np.sqrt(error.size) + 1e-12
    assert apart > 0


@pytest.mark.parametrize(
    ("numerics", "message"),
    [
        ({"gradient_sums": "bfloat16"}, r"numerics.gradient_sums is bfloat16, but train.microbatches is 1"),
        ({"experts": "mxfp4"}, r"numerics.experts mxfp4 has a scale for 32 inputs, which must divide model.moe.ffn 16"),
        ({"emulate": True}, r"numerics.emulate is true, but nothing is in FP8"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, tmp_path, numerics, message):
    path = tiny.write(tmp_path / "recipe.yaml", data, tmp_path, numerics=numerics)
    with pytest.raises(ValueError, match=message):
        recipe_lib.resolve(path)
