"""One training step on one long row of random tokens, in a process of its own: ``python -m v4train.bench.one_length``.

A process's peak memory is the peak of everything it ever did, so each length gets its own, started by `bench.memory`. No data store is
needed: memory depends on shapes alone, and the row is one document, which lets every query see as many entries as it ever can. The step is
the trainer's (`train.step.Step`, the optimizer of `train.build`, the same compiler options, the state donated), without the evaluation
program.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from v4train import recipe as recipe_lib
from v4train.bench import machine
from v4train.core import compiler, param, tree
from v4train.data import batch as batch_lib
from v4train.model import count, transformer
from v4train.sharding import constrain
from v4train.sharding import mesh as mesh_lib
from v4train.train import build
from v4train.train import state as state_lib
from v4train.train import step as step_lib


def random_batch(recipe: recipe_lib.Recipe) -> batch_lib.Batch:
    """Rows of random text tokens, a document each, every token a target."""
    rows, length = recipe.train.batch_rows, recipe.data.sequence_length
    batch = batch_lib.empty(rows, sequence_length=length, max_patches=0, max_audio_frames=0, image_patch=recipe.data.image_patch, pad=0)
    text = np.setdiff1d(np.arange(recipe.model.vocab_size), recipe.model.media_tokens)
    batch.tokens[:] = np.random.default_rng(recipe.seed).choice(text, (rows, length))
    batch.segment_ids[:] = 1
    batch.positions[:] = np.arange(length)
    batch.loss_weight[:] = 1.0
    return batch


def measure(recipe: recipe_lib.Recipe, *, steps: int) -> dict[str, Any]:
    """Compiles and runs a few steps; bytes and seconds. Peaks of resident memory are of this process so far."""
    mesh = mesh_lib.make(recipe.mesh)
    jax.block_until_ready(jax.numpy.zeros(()))
    after_start = machine.peak_resident_bytes()
    model = transformer.Transformer(recipe.model)
    declarations = param.declarations(model)
    optimizer = build.optimizer_of(recipe, declarations, mesh=mesh)
    structs = state_lib.declared(declarations, optimizer=optimizer)
    shardings = state_lib.shardings(structs, declarations=declarations, mesh=mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), structs, shardings)
    batch = jax.device_put(random_batch(recipe), NamedSharding(mesh, PartitionSpec()))
    step = step_lib.Step(model, declarations, optimizer, recipe.numerics, 1, recipe.train.microbatches, recipe.optimizer.clip_norm)
    started = time.perf_counter()
    with constrain.on_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(placed, batch)
        compiled = lowered.compile(compiler.options())
    compile_seconds, after_compile = time.perf_counter() - started, machine.peak_resident_bytes()
    state = first_state(recipe, declarations, optimizer, placed)
    seconds, cpu_seconds, losses = [], [], []
    for i in range(steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        state, report = jax.block_until_ready(compiled(state, batch))
        seconds.append(round(time.perf_counter() - started, 3))
        cpu_seconds.append(round(time.process_time() - cpu_started, 3))
        losses.append(float(report.loss))
        print(f"length {recipe.data.sequence_length}, step {i + 1}: {seconds[-1]} s, loss {losses[-1]:.4f}", file=sys.stderr)
    counted = count.parameters(declarations, top_k=recipe.model.moe.top_k)
    return {
        **machine.describe(devices=mesh.size),
        "parameters": {"total": counted.total, "active": counted.active, "mtp": counted.mtp},
        "measured": {
            "length": recipe.data.sequence_length,
            "peak_resident_bytes": machine.peak_resident_bytes(),
            "resident_after_start_bytes": after_start,
            "resident_after_compile_bytes": after_compile,
            "compiled_memory": machine.compiled_memory(compiled),
            "compile_seconds": round(compile_seconds, 3),
            "step_seconds": seconds,
            "step_cpu_seconds": cpu_seconds,
            "losses": losses,
        },
    }


def first_state(recipe: recipe_lib.Recipe, declarations: dict, optimizer: Any, placed: state_lib.State) -> state_lib.State:
    """The state before the first step, hash tables balanced for tokens that are equally frequent."""
    state = state_lib.create(recipe.seed, declarations=declarations, optimizer=optimizer, placed=placed)
    buffers = tree.select(declarations, declarations=declarations, keep=lambda d: not d.trained)
    uniform = np.ones(recipe.model.vocab_size)
    return state._replace(buffers=transformer.fill_hash_tables(state.buffers, declarations=buffers, counts=uniform, seed=recipe.seed))


def main() -> int:
    """Prints the result of one length as JSON."""
    parser = argparse.ArgumentParser(prog="python -m v4train.bench.one_length", description="Measure one length.", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(measure(recipe_lib.resolve(args.config, overrides=args.overrides).config, steps=args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
