"""The schedule and the keep policies are pure functions of step numbers."""

import subprocess
import sys

import pydantic
import pytest

from v4train.checkpoint import config, policies


@pytest.mark.parametrize(
    "policy, steps, gone",
    [
        (policies.Latest(count=2), [10, 20, 30, 40], [10, 20]),
        (policies.Latest(count=2), [30, 10, 20], [10]),
        (policies.Latest(count=3), [10], []),
        (policies.Latest(count=1), [], []),
        (policies.Every(kind="every", steps=20, latest=1), [10, 20, 30, 40, 50], [10, 30]),
        (policies.Every(kind="every", steps=100, latest=2), [10, 20, 30], [10]),
        (policies.Every(kind="every", steps=10, latest=1), [5, 10, 20, 25, 27], [5, 25]),
    ],
)
def test_a_policy_deletes_exactly_what_it_does_not_keep(policy, steps, gone):
    assert policies.expendable(policy, steps=steps) == gone


def test_the_schedule_is_due_on_multiples_only():
    assert [step for step in range(9) if config.CheckpointConfig(every_steps=4).is_due(step)] == [4, 8]
    assert not any(config.CheckpointConfig(every_steps=None).is_due(step) for step in range(9))


def test_the_policy_is_chosen_by_kind():
    chosen = config.CheckpointConfig.model_validate({"keep": {"kind": "every", "steps": 500, "latest": 2}})
    assert chosen.keep == policies.Every(kind="every", steps=500, latest=2)
    with pytest.raises(pydantic.ValidationError, match="oldest"):
        config.CheckpointConfig.model_validate({"keep": {"kind": "oldest"}})
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        config.CheckpointConfig.model_validate({"keep": {"kind": "latest", "count": 0}})


def test_the_config_imports_no_jax():
    code = "import sys; from v4train.checkpoint import config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
