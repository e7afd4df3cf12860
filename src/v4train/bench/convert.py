"""Memory and speed of converting open weights, on a made-up checkpoint with a real model's tensors but fewer layers and experts.

The question is whether memory grows with the model. So each conversion runs as its own process, as a person would start it, and its peak
is the figure that the kernel keeps (`machine.peak_resident_bytes`, asked for at its end). A checkpoint several times larger than that has
then been converted without ever being in memory.

The way there and back must change nothing: BF16 to our FP32 and back to BF16 is exact, so the exported files must have the digests of
those that were imported. Weights are random bits of ordinary magnitudes: what is measured does not depend on values.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from v4train import recipe as recipe_lib
from v4train.bench import machine
from v4train.interop import exporting, importing, names, quantised, tensor_files
from v4train.model import config as config_lib

RECIPE = "configs/v4_flash.yaml"
"""Whose tensors are measured, unless another one is named; relative to the working directory."""
LAYERS = ("window", "csa", "hca")
_PROGRAM = """
import pathlib, sys
from v4train.bench import machine
from v4train.cli import main
code = main.main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(str(machine.peak_resident_bytes()))
sys.exit(code)
"""


def measure(path: str, *, gigabytes: float, directory: str | None = None, quantised_too: bool = True) -> dict[str, Any]:
    """Makes a checkpoint, imports it, exports it, and removes everything.

    Args:
        path: a recipe, for the shapes of its model.
        gigabytes: least size of the checkpoint in BF16; on the disk it needs five times that.
        directory: where to work; None: the system's place for temporary files.
        quantised_too: also export with FP4 experts and FP8 matrices.

    Returns:
        The result, ready for `json.dumps`.

    Raises:
        ValueError: the recipe has no such layers, or a conversion failed.
    """
    model = shortened(recipe_lib.resolve(path).config.model, gigabytes=gigabytes)
    with tempfile.TemporaryDirectory(dir=directory, prefix="v4train-convert-") as folder:
        root = pathlib.Path(folder)
        print(f"making {model.depth} layers and MTP with {model.moe.experts} experts in {root}", file=sys.stderr)
        source = make(root / "source", model=model)
        conversions = [
            _convert("import", root / "source", root / "imported", moved=source),
            _convert("export", root / "imported", root / "bf16", "--format", "bf16", moved=source),
        ]
        identical = digests(root / "source") == digests(root / "bf16")
        if quantised_too:
            conversions.append(_convert("export", root / "imported", root / "fp4-fp8", "--format", "fp4-fp8", moved=source))
    return {
        "bench": "convert",
        "recipe": path,
        "layers": [*LAYERS, "mtp"],
        "experts": model.moe.experts,
        "source_bytes": source,
        "step_bytes": importing.step_bytes(model),
        "identical_after_round_trip": identical,
        "conversions": conversions,
        "load_average": machine.load_average(),
        **machine.describe(devices=1),
    }


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{'':<16} {'MB/s of BF16':>13} {'seconds':>9} {'peak RSS':>10}"]
    for c in result["conversions"]:
        lines.append(f"{c['what']:<16} {c['megabytes_per_second']:>13,.0f} {c['seconds']:>9,.1f} {c['peak_resident_bytes'] / 1e9:>7.2f} GB")
    same = "bit for bit" if result["identical_after_round_trip"] else "NOT bit for bit"
    size = f"{result['source_bytes'] / 1e9:.2f} GB of BF16, {result['step_bytes'] / 1e9:.2f} GB as a checkpoint of ours"
    return "\n".join([*lines, f"{size}; the export in BF16 equals the source {same}"])


def shortened(model: config_lib.ModelConfig, *, gigabytes: float) -> config_lib.ModelConfig:
    """The model with one layer of each kind, the first hash-routed, and with as few experts as make the size in BF16.

    Raises:
        ValueError: the model does not have all kinds of layer.
    """
    missing = set(LAYERS) - set(model.layer_kinds)
    if missing:
        raise ValueError(f"the recipe's model has no {' and no '.join(sorted(missing))} layers; name one like {RECIPE}")

    def with_experts(experts: int) -> config_lib.ModelConfig:
        moe = model.moe.model_copy(update={"experts": experts, "hash_layers": 1})
        return model.model_copy(update={"moe": moe, "layers": (config_lib.LayerRun(pattern=LAYERS),), "image": None, "audio": None})

    few, more = (_bytes(with_experts(model.moe.top_k + i)) for i in (0, 1))
    extra = max(-(-int(gigabytes * 1e9 - few) // (more - few)), 0)
    if model.moe.top_k + extra > model.moe.experts:
        raise ValueError(f"--gb {gigabytes}: {len(LAYERS)} layers with all {model.moe.experts} experts are smaller; ask for less")
    return with_experts(model.moe.top_k + extra)


def make(directory: pathlib.Path, *, model: config_lib.ModelConfig) -> int:
    """Writes the checkpoint in BF16, a tensor at a time; returns its size."""
    rng, total = np.random.default_rng(0), 0
    with tensor_files.complete_directory(directory) as temporary:
        exporting.write_config(temporary, model=model, precision="bf16", tokens=None)
        for tensors, stem in zip(exporting.plan(model, precision="bf16"), (tensor_files.STEM, names.EXTRAS_STEM), strict=True):
            writer = tensor_files.TensorFilesWriter(temporary, tensors=tensors, stem=stem)
            for name, (dtype, shape) in tensors.items():
                writer.write(name, _random(rng, dtype, shape, experts=model.moe.experts))
            total += writer.nbytes
            writer.finish()
    return total


def digests(directory: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the files of tensors, as their writer noted them."""
    files = json.loads((directory / tensor_files.CHECKSUMS).read_bytes())["files"]
    return {name: row["sha256"] for name, row in files.items()}


def _random(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...], *, experts: int) -> np.ndarray:
    if dtype == quantised.BF16:
        # Any sign and fraction, magnitudes from 2**-7 to 2**-5.
        bits = rng.integers(0, 2**16, shape, np.uint16)
        bits &= np.uint16(0x80FF)
        bits |= np.uint16(0x3C00)
        return bits.view(quantised.BF16)
    return rng.integers(0, experts, shape) if dtype.kind == "i" else rng.standard_normal(shape, np.float32)


def _bytes(model: config_lib.ModelConfig) -> int:
    tensors = [described for part in exporting.plan(model, precision="bf16") for described in part.values()]
    return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in tensors)


def _convert(direction: str, source: pathlib.Path, out: pathlib.Path, *options: str, moved: int) -> dict[str, Any]:
    words = ["convert", direction, str(source), str(out), *options]
    print(" ".join(words), file=sys.stderr)
    with tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", _PROGRAM, peak.name, *words]
        began = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
        seconds = time.perf_counter() - began
        if code:
            raise ValueError(f"the {direction} of {source} ended with exit code {code}; its own message stands above")
        peak_bytes = int(peak.read())
    return {
        "what": " ".join([direction, *options[1:]]),
        "seconds": round(seconds, 2),
        "megabytes_per_second": round(moved / 1e6 / seconds, 1),
        "peak_resident_bytes": peak_bytes,
    }
