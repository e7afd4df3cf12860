"""``v4train plan RECIPE --compile --target v5p:8x8x8``: what the compiler makes of the training step, beside the estimate.

This is the place where planning and training meet: the step is the trainer's own (`train.build`), the machine is a description
(`plan.targets`), and neither package knows of the other.
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from v4train import recipe as recipe_lib

if TYPE_CHECKING:
    import jax

    from v4train.plan import compile, targets


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--compile", action="store_true", help="compile the training step for --target, without its devices")
    parser.add_argument(
        "--target", metavar="KIND:SHAPE", help="devices to compile for: v5p:8x8x8, v5p:8x8x8:2 (slices), H100:64x8 (hosts x GPUs), cpu:8"
    )
    parser.add_argument(
        "--until",
        choices=("code", "buffers"),
        default="code",
        help="buffers: end the compiler when all bytes but the program's own are known; for TPUs that is minutes instead of hours",
    )


def run(recipe: recipe_lib.Recipe, *, target: str, until: str = "code") -> "compile.Report":
    """Compiles the recipe's training step, on batches of its first phase.

    Args:
        recipe: what to compile.
        target: devices to compile for.
        until: ``code`` or ``buffers``, see `configure`.

    Raises:
        ValueError: there is no such target, its compiler is not installed, or the recipe's mesh is not of its size.
    """
    from v4train.plan import compile, targets

    described = targets.parse(target)
    targets.prepare(described)
    print(f"compiling {recipe.name} for {math.prod(recipe.mesh.sizes.values())} {described.chip} (minutes)", file=sys.stderr)
    if until == "buffers":
        return compile.until_buffers(described, mesh=dict(recipe.mesh.axes), lower=functools.partial(_lower, recipe, described))
    mesh = _mesh(recipe, described)
    return compile.ahead_of_time(described, mesh=mesh, lower=functools.partial(_lower, recipe, described, mesh=mesh))


def _mesh(recipe: recipe_lib.Recipe, target: "targets.Target") -> "jax.sharding.Mesh":
    from v4train.plan import targets
    from v4train.sharding import mesh as mesh_lib

    return mesh_lib.arrange(recipe.mesh, targets.devices(target))


def _lower(recipe: recipe_lib.Recipe, target: "targets.Target", *, mesh: "jax.sharding.Mesh | None" = None) -> "jax.stages.Lowered":
    from v4train.train import build

    abstract = build.abstract(recipe, mesh=mesh or _mesh(recipe, target))
    return build.lower_step(abstract, abstract.variant_at(0))


def table(report: "compile.Report", *, estimate: Mapping[str, float] | None = None) -> str:
    """The report as text.

    Args:
        report: of the compiler.
        estimate: bytes per device by the same names as in the report's JSON ("total", "arguments", "temporaries"), set beside it.
    """
    values, beside = report.as_json(), estimate or {}
    verdict = "fits" if report.fits else "does not fit"
    lines = [
        f"compiled for {report.target.name}: {report.devices} {report.target.chip}, mesh {_axes(report.mesh)}; {verdict} in "
        f"{_gb(report.target.hbm_bytes)} a device (lowered in {report.seconds[0]:.0f} s, compiled in {report.seconds[1]:.0f} s)",
        f"  {'bytes per device':<28}{'compiler':>14}{'estimate':>14}" if beside else f"  {'bytes per device':<28}{'compiler':>14}",
    ]
    for name, size in values["bytes"].items():
        ours = f"{_gb(beside[name]):>14}{beside[name] / size - 1:>+8.0%}" if name in beside and size else ""
        lines.append(f"  {name:<28}{_gb(size):>14}{ours}")
    lines.append(f"  {'collectives':<28}{'over':<24}{'places':>8}{'times':>8}{'sent a device':>16}")
    for row in values["collectives"]:
        lines.append(f"  {row['kind']:<28}{' '.join(row['axes']):<24}{row['places']:>8}{row['times']:>8}{_gb(row['sent_bytes']):>16}")
    lines += [f"  and {_gb(sent)} in each round of {loop}, if there is one: that is data" for loop, sent in report.listing.rounds.items()]
    if report.replicated:
        lines.append(f"  made whole on every device, because the partitioner found no other way ({len(report.replicated)}):")
        lines += [f"    {shape:<28} {op}" for shape, op in report.replicated]
    if report.fp8:
        lines.append("  products of FP8 codes, and how often they are called:")
        lines += [f"    {name:<40} {count}" for name, count in report.fp8.items()]
    lines.append("  largest temporaries, side by side in memory:")
    lines += [f"    {_gb(buffer.size):>12}  {buffer.shape:<28} {buffer.op_name}" for buffer in report.largest]
    return "\n".join(lines)


def _axes(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "of one device"


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
