"""The only wiring: a recipe becomes a mesh, a model, an optimizer, a data pipeline and compiled functions.

It has two halves. `abstract` needs a recipe and a mesh and touches neither devices nor data: shapes, dtypes and shardings of everything
that a step reads and writes, enough to trace and lower it for any mesh, also one of a machine that is not here (`lower_step`). `parts`
joins that with the devices and the data of a run. The planner compiles ahead of time what the trainer runs, because both come from here.

Steps of one run differ in the shape of their batch, in the stage of the model, and in who chose the experts. Each combination that a run
comes to is a `Variant`, compiled by itself; all of them read and write the same state.
"""

import concurrent.futures
import contextvars
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from v4train import recipe as recipe_lib
from v4train.core import axes, compiler, param, tree
from v4train.data import batch as batch_lib
from v4train.data import phases, pipeline
from v4train.model import transformer
from v4train.optim import optimizer as optimizer_lib
from v4train.sharding import constrain, rows, rules
from v4train.sharding import mesh as mesh_lib
from v4train.train import stages as stages_lib
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.evals import heldout


class Variant(NamedTuple):
    """What one compiled training step differs in from another of the same run.

    Attributes:
        shape: of the global batch, as its arrays have it.
        stage: of the model.
        anticipated: whether the experts are given (`step.Anticipate`).
    """

    shape: phases.Shape
    stage: stages_lib.Stage
    anticipated: bool = False


@dataclasses.dataclass(frozen=True)
class Staged:
    """What learns in a stage.

    Attributes:
        model: abstract.
        optimizer: of the trained parameters; in the indexer's warm-up nothing else moves.
    """

    model: transformer.Transformer
    optimizer: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Abstract:
    """What a recipe stands for on a mesh: shapes and shardings, no arrays.

    Attributes:
        recipe: all settings.
        mesh: the devices, or those of a topology (`jax.experimental.topologies`) or an abstract mesh, which only describe a machine.
        model: abstract, of the first stage.
        declarations: of its parameters, the same in every stage.
        optimizer: of the trained ones, of the first stage.
        state: shapes, dtypes and shardings of the training state.
        batches: likewise of a global batch, for each shape that the phases of the data have; the first phase's comes first.
    """

    recipe: recipe_lib.Recipe
    mesh: jax.sharding.Mesh
    model: transformer.Transformer
    declarations: dict
    optimizer: optax.GradientTransformation
    state: state_lib.State
    batches: dict[phases.Shape, batch_lib.Batch]

    @property
    def batch(self) -> batch_lib.Batch:
        """Of the first phase."""
        return next(iter(self.batches.values()))

    @property
    def sources(self) -> int:
        """Number of data sources."""
        return len(self.recipe.data.sources)

    @functools.cached_property
    def phases(self) -> phases.Phases:
        """Of the data."""
        return self.recipe.data.schedule(batch_rows=self.recipe.train.batch_rows)

    @functools.cached_property
    def stages(self) -> stages_lib.Stages:
        """Of the model."""
        return self.recipe.train.course(model=self.recipe.model, phases=self.phases)

    def variant_at(self, step: int) -> Variant:
        """Of the training step with this number, from 0."""
        rows, length, *budgets = self.phases.at(step).shape
        return Variant(phases.Shape(rows, length, *(max(1, budget) for budget in budgets)), self.stages.at(step))

    def staged(self, stage: stages_lib.Stage) -> Staged:
        """Model and optimizer in a stage. They read and write the state of every other."""
        config = stage.model(self.recipe.model)
        model = transformer.Transformer(config)
        assert param.declarations(model) == self.declarations, f"the stage {stage} has other parameters than the first"
        optimizer = optimizer_of(self.recipe.model_copy(update={"model": config}), self.declarations, mesh=self.mesh)
        state = jax.eval_shape(optimizer.init, self.state.params)
        same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, self.state.optimizer)
        assert all(jax.tree.leaves(same)), f"the stage {stage} has another optimizer state than the first"
        return Staged(model, optimizer)


@dataclasses.dataclass(frozen=True)
class Parts(Abstract):
    """What a recipe stands for on this machine, before anything is compiled.

    Attributes:
        data: training rows by step, held-out rows by source.
    """

    data: pipeline.Pipeline

    @functools.cached_property
    def share(self) -> rows.Share:
        """The rows that this process reads."""
        return rows.share(self.mesh)

    def place(self, batch: batch_lib.Batch) -> batch_lib.Batch:
        """This host's rows -> the global batch on the devices."""
        structs = self.batches[shape_of(batch, hosts=self.share.groups)]
        return jax.tree.map(lambda s, x: rows.place(x, sharding=s.sharding, shape=s.shape, share=self.share), structs, batch)


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions, and how long that took.

    Attributes:
        steps: a training step for each variant that was asked for (`add_step`).
        evaluations: of batches of the first phase's shape, for each `Stage.evaluated` that was asked for (`add_evaluation`).
        compile_seconds: of what was compiled before the first step.
        anticipations: the choice of experts for later batches, for each variant that was asked for (`add_anticipation`).
    """

    steps: dict[Variant, Callable[..., tuple[state_lib.State, step_lib.Report]]]
    evaluations: dict[stages_lib.Stage, Callable[[state_lib.State, batch_lib.Batch], heldout.Sums]]
    compile_seconds: float
    anticipations: dict[Variant, Callable[[state_lib.State, batch_lib.Batch], dict]] = dataclasses.field(default_factory=dict)

    def step(
        self, state: state_lib.State, batch: batch_lib.Batch, *, variant: Variant, given: dict | None = None
    ) -> tuple[state_lib.State, step_lib.Report]:
        """One training step on a global batch, by a variant that was compiled; with ``given`` experts by its anticipated one."""
        return self.steps[variant](state, batch) if given is None else self.steps[anticipated(variant)](state, batch, given)

    def anticipate(self, state: state_lib.State, batch: batch_lib.Batch, *, variant: Variant) -> dict:
        """The experts that the routers of a state choose for a batch of a variant that was compiled."""
        return self.anticipations[anticipated(variant)](state, batch)

    def evaluate(self, state: state_lib.State, batch: batch_lib.Batch, *, stage: stages_lib.Stage) -> heldout.Sums:
        """Nats, targets and bytes of held-out rows, as the model of a stage that was compiled predicts them."""
        return self.evaluations[stage.evaluated](state, batch)


def anticipated(variant: Variant) -> Variant:
    """The same, with given experts."""
    return variant._replace(anticipated=True)


def shape_of(batch: batch_lib.Batch, *, hosts: int = 1) -> phases.Shape:
    """The shape that a batch's arrays have, all hosts' rows together. A budget of 0 is an array of one entry."""
    rows, length = batch.tokens.shape
    return phases.Shape(rows * hosts, length, batch.patches.shape[1], batch.audio.shape[1])


def parts(recipe: recipe_lib.Recipe) -> Parts:
    """Everything but the compiled functions.

    Raises:
        ValueError: too few devices, missing or damaged data, or data that the model cannot take.
    """
    mesh = mesh_lib.make(recipe.mesh)
    share = rows.share(mesh)
    data = pipeline.Pipeline(recipe.data, batch_rows=recipe.train.batch_rows, host_index=share.group, host_count=share.groups)
    _check_tokenizer(recipe, data)
    found = abstract(recipe, mesh=mesh)
    return Parts(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)}, data=data)


def abstract(recipe: recipe_lib.Recipe, *, mesh: jax.sharding.Mesh) -> Abstract:
    """Everything that a step is traced and lowered from, for a mesh whose devices need not be here."""
    model = transformer.Transformer(recipe.model)
    declarations = param.declarations(model)
    optimizer = optimizer_of(recipe, declarations, mesh=mesh)
    state = state_lib.declared(declarations, optimizer=optimizer)
    placed = _with_shardings(state, state_lib.shardings(state, declarations=declarations, mesh=mesh))
    batches = {}
    for phase in recipe.data.schedule(batch_rows=recipe.train.batch_rows).phases:
        struct = _batch_struct(phase.shape, image_patch=recipe.data.image_patch, mesh=mesh)
        batches.setdefault(shape_of(struct), struct)
    return Abstract(recipe, mesh, model, declarations, optimizer, placed, batches)


def optimizer_of(recipe: recipe_lib.Recipe, declarations: dict, *, mesh: jax.sharding.Mesh) -> optax.GradientTransformation:
    """The optimizer, with Newton-Schulz divided among the mesh's devices. In the indexer's warm-up nothing else moves.

    Raises:
        ValueError: it names a transform that optax does not have, or one that cannot be used in a recipe.
    """
    return optimizer_lib.make(
        recipe.optimizer,
        tree.select(declarations, declarations=declarations, keep=lambda d: d.trained),
        total_steps=recipe.train.steps,
        mesh=mesh,
        trainable=(lambda _, d: "indexer" in d.tags) if recipe.model.warming_up else None,
    )


def compile_program(p: Parts, *, first_step: int = 0) -> Program:
    """Traces here, then compiles evaluation, and the training step with the number ``first_step``, at once: XLA works outside of
    Python's lock."""
    started = time.perf_counter()
    variant = p.variant_at(first_step)
    jobs = {"step": lambda: lower_step(p, variant), "evaluate": lambda: lower_evaluation(p, variant.stage)}
    options = compiler.options()
    with constrain.on_mesh(p.mesh), concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        futures = {}
        for name, lower in jobs.items():
            futures[name] = pool.submit(contextvars.copy_context().run, lower().compile, options)
        compiled = {name: future.result() for name, future in futures.items()}
    evaluations = {variant.stage.evaluated: compiled["evaluate"]}
    return Program({variant: compiled["step"]}, evaluations, compile_seconds=time.perf_counter() - started)


def add_step(program: Program, p: Parts, variant: Variant) -> float | None:
    """Compiles the training step of a variant, unless that was done; returns the seconds that it took."""
    started = time.perf_counter()
    if variant in program.steps:
        return None
    with constrain.on_mesh(p.mesh):
        program.steps[variant] = lower_step(p, variant).compile(compiler.options())
    return time.perf_counter() - started


def add_anticipation(program: Program, p: Parts, variant: Variant) -> float | None:
    """Compiles what `Program.anticipate` and then `Program.step` need for a variant, unless that was done; returns the seconds."""
    variant, started = anticipated(variant), time.perf_counter()
    if variant in program.anticipations:
        return None
    with constrain.on_mesh(p.mesh):
        program.anticipations[variant] = lower_anticipation(p, variant).compile(compiler.options())
    add_step(program, p, variant)
    return time.perf_counter() - started


def add_evaluation(program: Program, p: Parts, stage: stages_lib.Stage) -> float | None:
    """Compiles the evaluation of a stage, unless that was done; returns the seconds that it took."""
    started = time.perf_counter()
    if stage.evaluated in program.evaluations:
        return None
    with constrain.on_mesh(p.mesh):
        program.evaluations[stage.evaluated] = lower_evaluation(p, stage).compile(compiler.options())
    return time.perf_counter() - started


def trace_step(p: Abstract, variant: Variant, *, step: type[step_lib.Step] = step_lib.Step) -> jax.stages.Traced:
    """The training step of a variant, traced; the state is donated. ``lower`` it for the machine, and compile that. Whoever studies a
    step that differs passes its class."""
    train, staged = p.recipe.train, p.staged(variant.stage)
    made = step(
        staged.model,
        p.declarations,
        staged.optimizer,
        p.recipe.numerics,
        p.sources,
        train.microbatches,
        p.recipe.optimizer.clip_norm,
        train.skip_nonfinite,
        p.recipe.seed,
    )
    state_shardings = jax.tree.map(lambda x: x.sharding, p.state)
    replicated = NamedSharding(p.mesh, jax.sharding.PartitionSpec())
    with constrain.on_mesh(p.mesh):
        inputs = (p.state, p.batches[variant.shape], *([_experts(p, variant)] if variant.anticipated else []))
        return jax.jit(made, donate_argnums=0, out_shardings=(state_shardings, replicated)).trace(*inputs)


def lower_step(p: Abstract, variant: Variant) -> jax.stages.Lowered:
    """The training step of a variant, ready to be compiled."""
    return trace_step(p, variant).lower()


def lower_anticipation(p: Abstract, variant: Variant) -> jax.stages.Lowered:
    """The choice of experts for batches of a variant, ready to be compiled; the state is only read."""
    with constrain.on_mesh(p.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, _experts(p, variant))
        return jax.jit(_anticipate(p, variant), out_shardings=shardings).lower(p.state, p.batches[variant.shape])


def lower_evaluation(p: Parts, stage: stages_lib.Stage) -> jax.stages.Lowered:
    """The evaluation of a stage on batches of the first phase's shape, ready to be compiled."""
    model = transformer.Transformer(stage.evaluated.model(p.recipe.model))
    evaluate = heldout.Evaluate(model, p.declarations, p.recipe.numerics, p.sources, p.data.tokenizer.byte_counts())
    replicated = NamedSharding(p.mesh, jax.sharding.PartitionSpec())
    with constrain.on_mesh(p.mesh):
        return jax.jit(evaluate, out_shardings=replicated).lower(p.state, p.batch)


def first_state(p: Parts) -> state_lib.State:
    """The state before the first step: parameters drawn from the seed, hash tables balanced by the data's token counts."""
    state = state_lib.create(p.recipe.seed, declarations=p.declarations, optimizer=p.optimizer, placed=p.state)
    buffers = tree.select(p.declarations, declarations=p.declarations, keep=lambda d: not d.trained)
    counts = np.zeros(p.recipe.model.vocab_size)
    histogram = p.data.token_histogram()
    counts[: len(histogram)] = histogram
    kind = p.recipe.model.moe.hash_table
    filled = transformer.fill_hash_tables(state.buffers, declarations=buffers, counts=counts, seed=p.recipe.seed, kind=kind)
    return state._replace(buffers=filled)


def _anticipate(p: Abstract, variant: Variant) -> step_lib.Anticipate:
    return step_lib.Anticipate(p.staged(variant.stage).model, p.declarations, p.recipe.numerics)


def _experts(p: Abstract, variant: Variant) -> dict:
    """Shapes and shardings of the experts of a batch."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        letters = axes.logical_axes(step_lib.letters_of_experts(x))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.sharding(letters, shape=x.shape, mesh=p.mesh))

    return jax.tree.map(place, jax.eval_shape(_anticipate(p, variant), p.state, p.batches[variant.shape]))


def _with_shardings(structs: state_lib.State, shardings: state_lib.State) -> state_lib.State:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), structs, shardings)


def _batch_struct(shape: phases.Shape, *, image_patch: int, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
    length, patches, frames = shape.row
    budgets = {"max_patches": patches, "max_audio_frames": frames}
    blank = batch_lib.allocate(1, sequence_length=length, image_patch=image_patch, **budgets)

    def struct(x: np.ndarray) -> jax.ShapeDtypeStruct:
        by_token = x.ndim == 2 and x.shape[1] == length
        letters = "B S" if by_token else " ".join(["B", *"_" * (x.ndim - 1)])
        whole = (shape.rows, *x.shape[1:])
        return jax.ShapeDtypeStruct(whole, x.dtype, sharding=rules.sharding(axes.logical_axes(letters), shape=whole, mesh=mesh))

    return jax.tree.map(struct, blank)


def _check_tokenizer(recipe: recipe_lib.Recipe, data: pipeline.Pipeline) -> None:
    tokenizer, model = data.tokenizer, recipe.model
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} ids; set it to that")
    media = set(tokenizer.media_token_ids)
    uses_media = any(budget for phase in data.phases.phases for budget in phase.shape.row[1:])
    if uses_media and not media <= set(model.media_tokens):
        raise ValueError(
            f"model.media_tokens {list(model.media_tokens)} must contain the tokenizer's media ids {sorted(media)}: "
            "they mark slots and are never predicted"
        )
