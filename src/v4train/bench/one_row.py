"""One training step on packed rows that are split over the devices of a mesh: ``python -m v4train.bench.one_row``.

A row is one long document, half of it, behind short ones of all lengths, so that documents cross the borders of the devices'
parts, and end and begin beside them. The step is the trainer's own (`train.build`), state donated, without hooks.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from v4train import recipe as recipe_lib
from v4train.bench import machine, one_length
from v4train.core import compiler
from v4train.data import batch as batch_lib
from v4train.sharding import constrain
from v4train.sharding import mesh as mesh_lib
from v4train.train import build

_LONG = 0.5
"""Of a row, the share of its last document."""


def document_lengths(length: int, *, seed: int) -> list[int]:
    """Lengths that fill a row: from 1 token to an eighth of the row, evenly by order of magnitude, then the long one."""
    rng, lengths, left = np.random.default_rng(seed), [], length - int(_LONG * length)
    while left:
        lengths.append(min(left, int(np.exp(rng.uniform(0, np.log(max(length // 8, 2)))))))
        left -= lengths[-1]
    return [*lengths, int(_LONG * length)]


def packed_batch(recipe: recipe_lib.Recipe) -> batch_lib.Batch:
    """Rows of random text tokens in documents of `document_lengths`, every token a target."""
    batch = one_length.random_batch(recipe)
    for row in range(len(batch.tokens)):
        lengths = document_lengths(recipe.data.sequence_length, seed=recipe.seed + row)
        batch.segment_ids[row] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        batch.positions[row] = np.concatenate([np.arange(n) for n in lengths])
        batch.n_documents[row] = len(lengths)
    return batch


def measure(recipe: recipe_lib.Recipe, *, steps: int) -> dict[str, Any]:
    """Compiles and runs a few steps; bytes and seconds. The peak of resident memory is of this process so far."""
    mesh = mesh_lib.make(recipe.mesh)
    jax.block_until_ready(jax.numpy.zeros(()))
    load_before = machine.load_average()
    parts = build.abstract(recipe, mesh=mesh)
    started = time.perf_counter()
    compiled = build.lower_step(parts, parts.variant_at(0)).compile(compiler.options())
    compile_seconds, after_compile = time.perf_counter() - started, machine.peak_resident_bytes()
    print(f"compiled in {compile_seconds:.1f} s: {machine.compiled_memory(compiled)}", file=sys.stderr)
    packed = packed_batch(recipe)
    batch = jax.tree.map(lambda x, struct: jax.device_put(x, struct.sharding), packed, parts.batch)
    state = one_length.first_state(recipe, parts.declarations, parts.optimizer, parts.state)
    seconds, losses, norms = [], [], []
    for i in range(steps):
        started = time.perf_counter()
        with constrain.on_mesh(mesh):
            state, report = jax.block_until_ready(compiled(state, batch))
        seconds.append(round(time.perf_counter() - started, 3))
        losses.append(float(report.loss))
        norms.append(float(report.grad_norm))
        print(f"step {i + 1}: {seconds[-1]} s, loss {losses[-1]:.4f}, gradient norm {norms[-1]:.4f}", file=sys.stderr)
    return {
        **machine.describe(devices=mesh.size),
        "length": recipe.data.sequence_length,
        "documents": int(packed.n_documents.sum()),
        "longest_document": int(_LONG * recipe.data.sequence_length),
        "peak_resident_bytes": machine.peak_resident_bytes(),
        "resident_after_compile_bytes": after_compile,
        "compiled_memory": machine.compiled_memory(compiled),
        "compile_seconds": round(compile_seconds, 3),
        "step_seconds": seconds,
        "losses": losses,
        "grad_norms": norms,
        "finite": bool(report.finite),
        "load_average": {"before": load_before, "after": machine.load_average()},
    }


def main() -> int:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m v4train.bench.one_row", description="Measure one length.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(measure(recipe_lib.resolve(args.config, overrides=args.overrides).config, steps=args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
