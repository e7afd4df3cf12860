"""Two runs of one recipe on one mesh, each in a process of its own, are equal in every bit after 100 steps."""

import pathlib
import subprocess
import sys

import pytest

from tests.e2e.test_run import arrays, assert_same_bits, train_losses
from tests.e2e.test_stages import environment
from tests.train import tiny

STEPS = 100
MESHES = {"one device": {}, "emulated mesh": {"expert": 2, "fsdp": 2, "emulate_devices": 4}}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.stores(tmp_path_factory.mktemp("stores"))


def train(data: pathlib.Path, run: pathlib.Path, **changes) -> None:
    """Trains the tiny recipe for 100 steps, with programs compiled anew."""
    changes["train"] = {"steps": STEPS, "eval_every": None}
    changes["checkpoint"] = {"every_steps": STEPS, "keep": {"kind": "latest", "count": 1}}
    path = tiny.write(run.with_suffix(".yaml"), data, run, **changes)
    command = [sys.executable, "-m", "v4train.train", "--config", str(path)]
    subprocess.run(command, check=True, env=environment(run.with_suffix(".cache")), stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_two_runs_are_equal_in_every_bit(data, tmp_path, mesh, compute):
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        train(data, run, mesh=MESHES[mesh], numerics={"compute": compute})
    first, second = (arrays(run, step=STEPS) for run in runs)
    assert_same_bits(first, second)
    assert train_losses(runs[0]) == train_losses(runs[1])
    assert int(first["step"]) == STEPS
    assert int(first["skipped"]) == 0
