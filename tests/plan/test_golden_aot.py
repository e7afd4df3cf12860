"""Shipped recipes compiled for machines that are not here, against golden figures.

``make aot`` compares, ``V4TRAIN_WRITE_GOLDEN=1 make aot`` writes them anew.

Bytes per device may differ by 5%, and what a device sends, by kind and axes, by 10% (what is below a thousandth of all it sends is not
compared): within that a new compiler may schedule and fuse in another way. Here, without the vendors' compilers, the cases are skipped, and
only the files themselves are looked at. The environments of `make aot` have one compiler each.
"""

import importlib.util
import json
import os
import pathlib

import jax
import pytest

from v4train import recipe as recipe_lib
from v4train.cli import plan_compile
from v4train.plan import estimate, machine, targets

GOLDEN = pathlib.Path(__file__).parent / "golden"
WRITE = os.environ.get("V4TRAIN_WRITE_GOLDEN", "") not in ("", "0")
BYTES, SENT, IGNORED = 0.05, 0.10, 1e-3

_V4_1T_8K = ("mesh.fsdp=4", "mesh.context=8", "train.microbatches=24")
CASES = {
    "tpu_v4_1t_v5p": ("configs/v4_1t.yaml", "v5p:8x8x8", _V4_1T_8K),
    "tpu_v4_1t_v5p_slices": (
        "configs/v4_1t.yaml",
        "v5p:8x8x8:2",
        ("mesh.replica=2", "mesh.fsdp=4", "mesh.context=8", "train.microbatches=12"),
    ),
    "gpu_v4_1t_h100": ("configs/v4_1t.yaml", "H100:64x8", ()),
    "gpu_v4_1t_h200": ("configs/v4_1t.yaml", "H200:64x8", _V4_1T_8K),
    "gpu_v4_flash_h200": ("configs/v4_flash.yaml", "H200:16x8", ()),
}
"""Name of the golden file (without ``aot_``) -> recipe, target, overrides."""


def _installed(target: str) -> bool:
    platform = targets.parse(target).platform
    return any(importlib.util.find_spec(name) for name in {"tpu": ["libtpu"], "gpu": ["jax_cuda13_plugin", "jax_cuda12_plugin"]}[platform])


def _golden(name: str) -> pathlib.Path:
    return GOLDEN / f"aot_{name}.json"


@pytest.mark.slow  # minutes each, and only where a vendor's compiler is installed
@pytest.mark.parametrize("name", CASES)
def test_compiled_recipe_is_as_its_golden_figures_say(name):
    path, target, overrides = CASES[name]
    if not _installed(target):
        pytest.skip("the vendor's compiler is not installed here: make aot")
    # What comes after the buffers adds only the code's own bytes, and takes a TPU's compiler hours.
    report = plan_compile.run(recipe_lib.resolve(path, overrides=overrides).config, target=target, until="buffers")
    print(plan_compile.table(report))
    report.check()
    assert not report.replicated, report.replicated
    kept = ("target", "devices", "mesh", "device_bytes", "bytes", "collectives", "rounds", "largest")
    found = {"recipe": path, "set": list(overrides), "jax": jax.__version__, **{key: report.as_json()[key] for key in kept}}
    if WRITE:
        GOLDEN.mkdir(exist_ok=True)
        _golden(name).write_text(json.dumps(found, indent=1) + "\n")
        return
    assert _golden(name).exists(), "V4TRAIN_WRITE_GOLDEN=1 make aot"
    golden = json.loads(_golden(name).read_text())
    different = [
        f"bytes.{key}: {found['bytes'][key]} instead of {golden['bytes'][key]}"
        for key in ("total", "arguments")
        if abs(found["bytes"][key] / golden["bytes"][key] - 1) > BYTES
    ]
    assert not different + differences(found["collectives"], golden["collectives"])


def differences(found: list[dict], golden: list[dict]) -> list[str]:
    """Kinds and axes whose bytes differ by more than the tolerance."""
    ours, theirs = ({(row["kind"], *row["axes"]): row["sent_bytes"] for row in rows} for rows in (found, golden))
    least = IGNORED * sum(theirs.values())
    pairs = {key: (ours.get(key, 0), theirs.get(key, 0)) for key in ours.keys() | theirs.keys()}
    return [f"{' '.join(key)}: {a} bytes instead of {b}" for key, (a, b) in sorted(pairs.items()) if abs(a - b) > max(SENT * b, least)]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("aot_*.json")), ids=lambda file: file.stem)
def test_golden_figures_are_of_the_recipe_as_it_is_shipped_and_fit(file):
    path, target, overrides = CASES[file.stem.removeprefix("aot_")]
    golden, recipe = json.loads(file.read_text()), recipe_lib.resolve(path, overrides=overrides).config
    assert (golden["recipe"], golden["target"], tuple(golden["set"])) == (path, target, overrides)
    assert golden["mesh"] == recipe.mesh.sizes
    assert golden["bytes"]["total"] <= golden["device_bytes"] == targets.parse(target).hbm_bytes


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("aot_*.json")), ids=lambda file: file.stem)
def test_the_planner_is_within_15_percent_of_the_compiler(file):
    path, target, overrides = CASES[file.stem.removeprefix("aot_")]
    golden, recipe = json.loads(file.read_text())["bytes"], recipe_lib.resolve(path, overrides=overrides).config
    held = estimate.estimate(recipe, on=machine.parse(target)).phases[0].memory
    assert held.total == pytest.approx(golden["total"], rel=0.15)
    assert held.state == pytest.approx(golden["arguments"], rel=0.02)


def test_differences_are_found():
    golden = [
        {"kind": "all-gather", "axes": ["fsdp"], "sent_bytes": 1000},
        {"kind": "all-reduce", "axes": ["context"], "sent_bytes": 100_000},
    ]
    assert not differences(golden, golden)
    assert not differences([*golden, {"kind": "all-to-all", "axes": ["expert"], "sent_bytes": 50}], golden)
    assert differences(golden[:1], golden) == ["all-reduce context: 0 bytes instead of 100000"]
    assert differences([{**golden[0], "sent_bytes": 1300}, golden[1]], golden) == ["all-gather fsdp: 1300 bytes instead of 1000"]
