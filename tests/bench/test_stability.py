"""The faults that the bench of the guard puts in are the ones that it names, and what it says of a run is what happened to it."""

import numpy as np
import pytest

from tests.model import small
from tests.train import tiny
from v4train import recipe as recipe_lib
from v4train.bench import stability
from v4train.cli import main
from v4train.sharding import constrain
from v4train.train import build, config, step


@pytest.fixture(scope="module")
def amplified(tmp_path_factory):
    """Parts of a small recipe, and ``batch -> report`` of the bench's step on its first state."""
    data = tiny.stores(tmp_path_factory.mktemp("stores"))
    model = tiny.values(data, data)["model"] | {"hidden": 16, "layers": [{"pattern": ["csa"]}], "mtp": None}
    parts = build.parts(tiny.recipe(data, model=model))
    r = parts.recipe
    made = stability.Amplified(parts.model, parts.declarations, parts.optimizer, r.numerics, len(parts.data.sources), 1, None)
    jitted, first = small.jit(made), build.first_state(parts)

    def report(batch) -> step.Report:
        with constrain.on_mesh(parts.mesh):
            return jitted(first, parts.place(batch))[1]

    return parts, report


def test_the_faults_are_what_they_are_called(amplified):
    parts, report = amplified
    batch = parts.data.batch(0)
    clean = report(batch)
    big = report(stability.spoilt(batch, "gradient"))
    np.testing.assert_allclose(big.grad_norm, 1e4 * clean.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(big.loss, clean.loss, rtol=1e-5)
    nan = report(stability.spoilt(batch, "nan"))
    assert not nan.finite
    assert np.isnan(nan.loss)
    assert batch.loss_weight.max() == 1


def test_a_guarded_run_passes_if_it_ends_near_the_clean_one_and_the_fault_was_seen_in_time():
    guarded, clean = stability.Case("nan", config.GuardConfig()), {"final_loss": 2.0}

    def judged(loss, started, case=guarded):
        told = [{"step": started, "spike": 36}] if started else []
        return stability._judged({"final_loss": loss, "rollbacks": told}, clean, case, at=35)

    assert judged(2.019, 37) == {"excess_loss": 0.0095, "detected_at_step": 36, "further_steps_started": 1, "passed": True}
    assert judged(1.981, 36)["passed"]
    assert not judged(2.03, 37)["passed"]
    assert not judged(2.0, 38)["passed"]
    assert not judged(2.0, None)["passed"]
    assert judged(None, 36)["passed"] is False
    assert judged(2.5, None, stability.Case("nan", None))["passed"] is None


def test_what_cannot_be_measured_is_refused(capsys):
    assert main.main(["bench", "stability", "--set", "train.guard=null"]) != 0
    assert "train.guard is null" in capsys.readouterr().err
    assert main.main(["bench", "stability", "--at", "198"]) != 0
    assert "--at 198: the fault must be in a batch from 2 to 197 of the 200" in capsys.readouterr().err


def test_the_recipe_of_the_bench_is_in_order():
    recipe = recipe_lib.resolve(stability.RECIPE).config
    assert recipe.optimizer.clip_norm is None
    assert recipe.train.guard is not None
