"""The optimizer's config: YAML spellings, refusals with their path and remedy."""

import subprocess
import sys

import pydantic
import pytest
import yaml

from v4train.optim import config as config_lib

SCHEDULE = {"peak_lr": 2.7e-4, "final_lr": 2.7e-5, "warmup_steps": 2000, "decay_steps": 100}


@pytest.mark.parametrize("spelling", ["1e-20", '"1e-20"', "1.0e-20"])
def test_eps_is_a_float_in_every_yaml_spelling(spelling):
    loaded = yaml.safe_load(f"adamw:\n  eps: {spelling}\n")
    config = config_lib.OptimizerConfig(schedule=SCHEDULE, **loaded)
    assert isinstance(config.adamw.eps, float)
    assert config.adamw.eps == 1e-20


def test_defaults_are_the_papers():
    config = config_lib.OptimizerConfig(schedule=SCHEDULE)
    assert config.weight_decay == 0.1
    assert (config.adamw.b1, config.adamw.b2, config.adamw.eps) == (0.9, 0.95, 1e-20)
    assert (config.muon.momentum, config.muon.nesterov, config.muon.update_scale) == (0.95, True, 0.18)
    assert config.muon.coefficients == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


@pytest.mark.parametrize(
    "change, path",
    [
        ({"adamw": {"eps": 1e-40}}, "adamw.eps"),
        ({"adamw": {"b1": 1.0}}, "adamw.b1"),
        ({"muon": {"ns_dtype": "float16"}}, "muon.ns_dtype"),
        ({"muon": {"coefficients": []}}, "muon.coefficients"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_bad_values_are_refused_with_their_path(change, path):
    with pytest.raises(pydantic.ValidationError) as caught:
        config_lib.OptimizerConfig(schedule=SCHEDULE, **change)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == path


def test_final_rate_above_peak_is_refused():
    with pytest.raises(ValueError, match=r"final_lr 0\.001 is above peak_lr 0\.00027.*lower final_lr"):
        config_lib.ScheduleConfig(**{**SCHEDULE, "final_lr": 1e-3})


def test_run_shorter_than_its_ramps_is_refused():
    schedule = config_lib.ScheduleConfig(**SCHEDULE)
    schedule.check(2100)
    with pytest.raises(ValueError, match=r"warmup_steps 2000 \+ decay_steps 100 = 2100 do not fit into a run of 2099 steps"):
        schedule.check(2099)


def test_config_does_not_import_jax():
    script = "import sys, v4train.optim.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
