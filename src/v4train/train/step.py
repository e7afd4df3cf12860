"""One training step: pure, and all changes of state on this page."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from v4train.core import param, tree
from v4train.data import batch as batch_lib
from v4train.model import config as model_config
from v4train.model import stack, transformer
from v4train.numerics import config as numerics_config
from v4train.numerics import policy, stochastic
from v4train.optim import clip
from v4train.sharding import constrain
from v4train.train import loss as loss_lib
from v4train.train import precision
from v4train.train import state as state_lib


class Report(NamedTuple):
    """What a step tells. Losses are means over the batch's targets or tokens, nats."""

    loss: Float[Array, ""]  # what was differentiated
    text: Float[Array, "sources"]  # next-token cross-entropy by data source
    text_weight: Float[Array, "sources"]  # targets by data source
    mtp: Float[Array, ""]
    balance: Float[Array, ""]  # mean over layers with learned routing; 1 is balanced
    indexer: Float[Array, ""]
    grad_norm: Float[Array, ""]  # before clipping
    finite: Bool[Array, ""]  # False: the step changed nothing but the data position
    tokens: Float[Array, ""]  # without padding
    load: Float[Array, "l m e"]  # tokens per layer, modality and expert; the MTP block last
    late: Float[Array, ""]  # of these (token, expert) pairs, those that waited for a further round of the exchange
    dropped: Float[Array, ""]  # and those that were left out
    documents: Int[Array, "sources"]  # parts of documents in the batch, by data source
    bad: Int[Array, "sources"]  # those of them that could not be read and are padding
    rounding: dict[str, Float[Array, "2"]]  # of what is rounded to few bits: shares that saturate and that vanish (`precision.by_role`)
    index_recall: Float[Array, "2"] | None = None  # in the indexer's warm-up, see `index_recall`


_Found = tuple[tuple[Array, loss_lib.Terms], tuple[dict, precision.Probes]]
"""What differentiating gives: loss and sums, gradients and counts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """``step(state, batch) -> (state, report)``; jit it with the state donated.

    A third argument gives the experts of the batch, as `Anticipate` has chosen them with the parameters of an earlier step.

    Attributes:
        model: abstract.
        declarations: of all its parameters.
        optimizer: of the trained ones.
        numerics: formats.
        sources: number of data sources.
        microbatches: parts of the batch.
        clip_norm: largest gradient norm, or None.
        skip_nonfinite: whether a step whose loss or gradients are not finite changes nothing.
        seed: of the random numbers that sums in bf16 are rounded with.
    """

    model: transformer.Transformer
    declarations: dict
    optimizer: optax.GradientTransformation
    numerics: numerics_config.NumericsConfig
    sources: int
    microbatches: int
    clip_norm: float | None
    skip_nonfinite: bool = True
    seed: int = 0

    def __call__(self, state: state_lib.State, batch: batch_lib.Batch, given: dict | None = None) -> tuple[state_lib.State, Report]:
        counts = loss_lib.count(batch)
        loss, sums, grads, probes = self.gradients(state, batch, given, counts)
        grads, norm = clip.clip_by_global_norm(grads, self.clip_norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        buffers = state.buffers
        if not self.model.config.warming_up:
            buffers = transformer.update_router_biases(buffers, sums.loads, speed=bias_speed(self.model.config.moe, state.step))
        skipped = state.skipped
        if self.skip_nonfinite:
            moved = (params, buffers, optimizer)
            kept = (state.params, state.buffers, state.optimizer)
            params, buffers, optimizer = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
            skipped += 1 - finite.astype(jnp.int32)
        new = state_lib.State(state.step + 1, params, buffers, optimizer, skipped)
        by_source = [jax.ops.segment_sum(x.sum(axis=1), batch.source, self.sources) for x in (batch.n_documents, batch.n_bad)]
        report = _report(loss, sums, counts, norm=norm, finite=finite, config=self.model.config, by_source=by_source)
        weights = policy.count_weights(tree.merge(state.params, state.buffers), declarations=self.declarations, config=self.numerics)
        return new, report._replace(rounding=precision.by_role(weights, probes))

    def gradients(
        self, state: state_lib.State, batch: batch_lib.Batch, given: dict | None, counts: loss_lib.Counts
    ) -> tuple[Array, loss_lib.Terms, dict, precision.Probes]:
        """Loss, sums, gradients and counts of rounding over all microbatches."""

        warming_up = self.model.config.warming_up
        counted = {} if warming_up else precision.probes(self.numerics)  # they come out of a backward pass that there is not

        def loss(params: dict, probes: precision.Probes, part: batch_lib.Batch, given: dict | None) -> tuple[Array, loss_lib.Terms]:
            whole = tree.merge(params, state.buffers)
            if warming_up:
                whole = jax.tree.map(_learning_indexer, self.declarations, whole, is_leaf=param.is_declaration)
            whole = policy.cast_for_compute(whole, declarations=self.declarations, config=self.numerics)
            with precision.formats(self.numerics, counted=probes or None):
                sums = loss_lib.terms(self.model, whole, part, sources=self.sources, given=given)
            return loss_lib.total(sums, counts, config=self.model.config), sums

        gradient = functools.partial(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), state.params, counted)
        if self.microbatches == 1:
            (value, sums), (grads, probes) = gradient(batch, given)
            return value, sums, grads, probes

        def add(total: _Found, xs: tuple[Array, batch_lib.Batch, dict | None]) -> tuple[_Found, None]:
            number, part, chosen = xs
            by_token = part.tokens.shape
            part = jax.tree.map(
                lambda x: constrain.constrain(x, "B S" if x.shape == by_token else " ".join(["B", *"_" * (x.ndim - 1)])), part
            )
            chosen = jax.tree.map(lambda x: constrain.constrain(x, letters_of_experts(x)), chosen)
            return self._add(total, gradient(part, chosen), place=(state.step, number)), None

        parts = jax.tree.map(lambda x: self._split(x, axis=0), batch)
        chosen = jax.tree.map(lambda x: self._split(x, axis=x.ndim - 3), given)
        shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], (parts, chosen)))
        losses, (grads, probes) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = losses, (jax.tree.map(lambda x: x.astype(self.numerics.gradient_sums), grads), probes)
        ((value, sums), (grads, probes)), _ = jax.lax.scan(add, zeros, (jnp.arange(self.microbatches), parts, chosen))
        return value, sums, jax.tree.map(lambda x, p: x.astype(p.dtype), grads, state.params), probes

    def _add(self, total: _Found, found: _Found, *, place: tuple[Array, Array]) -> _Found:
        """Sums so far and those of one microbatch; random numbers are those of its ``place``, step and number."""
        if self.numerics.gradient_sums == "float32":
            return jax.tree.map(jnp.add, total, found)
        (losses, (grads, probes)), (new_losses, (new_grads, new_probes)) = total, found
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), place[0]), place[1])
        losses, probes = jax.tree.map(jnp.add, (losses, probes), (new_losses, new_probes))
        return losses, (stochastic.add(grads, new_grads, key=key), probes)

    def _split(self, x: Array, *, axis: int) -> Array:
        """Rows along ``axis`` -> microbatches first. Row i goes to microbatch i modulo their number, so that rows stay on their device."""
        rows = x.shape[axis] // self.microbatches
        return jnp.moveaxis(x.reshape(*x.shape[:axis], rows, self.microbatches, *x.shape[axis + 1 :]), axis + 1, 0)


def _learning_indexer(declaration: param.Declaration, x: Array) -> Array:
    """The parameter, without a derivative if it is not the indexer's. Its gradient is zero either way; but a scan over layers computes that
    zero by a backward pass through all of them, and sends it around the mesh."""
    return x if "indexer" in declaration.tags else jax.lax.stop_gradient(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Anticipate:
    """``anticipate(state, batch) -> experts``: where the routers of this state send the tokens of a batch that comes later.

    A forward pass alone, without the heads. ``experts`` has the structure of the loads: i32 ``[repeat, B, S, k]`` for each place of the
    stack, ``[B, S, k]`` for the MTP block.
    """

    model: transformer.Transformer
    declarations: dict
    numerics: numerics_config.NumericsConfig

    def __call__(self, state: state_lib.State, batch: batch_lib.Batch) -> dict:
        whole = tree.merge(state.params, state.buffers)
        whole = policy.cast_for_compute(whole, declarations=self.declarations, config=self.numerics)
        with precision.formats(self.numerics):
            out = param.bind(self.model, whole)(loss_lib.model_inputs(batch, config=self.model.config), keep_experts=True)
        assert out.experts is not None
        return jax.tree.map(lambda x: constrain.constrain(x, letters_of_experts(x)), out.experts)


def letters_of_experts(x: Array | jax.ShapeDtypeStruct) -> str:
    """The axes of an array of experts, of the MTP block or of layers stacked."""
    return "B S _" if x.ndim == 3 else "_ B S _"


def bias_speed(moe: model_config.MoeConfig, step: Int[Array, ""]) -> Float[Array, ""] | float:
    """Of the selection bias after batch number ``step``: the last step of the warm-up has the whole speed."""
    if not moe.bias_warmup_steps:
        return moe.bias_speed
    return moe.bias_speed * jnp.minimum((step + 1) / moe.bias_warmup_steps, 1.0)


def _report(
    loss: Array,
    sums: loss_lib.Terms,
    counts: loss_lib.Counts,
    *,
    norm: Array,
    finite: Array,
    config: model_config.ModelConfig,
    by_source: list[Array],
) -> Report:
    load = stack.in_layer_order(sums.loads["stack"])
    if "mtp" in sums.loads:
        load = jnp.concatenate([load, sums.loads["mtp"][None]])
    learned = config.depth - config.moe.hash_layers + (config.mtp is not None)
    return Report(
        loss=loss,
        text=sums.text / jnp.maximum(sums.text_weight, 1.0),
        text_weight=sums.text_weight,
        mtp=sums.mtp / counts.mtp,
        balance=sums.balance / counts.tokens / max(learned, 1),
        indexer=sums.indexer / counts.tokens,
        grad_norm=norm,
        finite=finite,
        tokens=counts.tokens,
        load=load,
        late=sums.late,
        dropped=sums.dropped,
        documents=by_source[0],
        bad=by_source[1],
        index_recall=None if sums.recall is None else index_recall(sums.recall),
        rounding={},
    )


def index_recall(sums: Float[Array, "3"]) -> Float[Array, "2"]:
    """The share of the attention to entries, all heads together, that falls on the `top_k` entries which the indexer would select, and the
    most that any `top_k` could have: means over the CSA layers' queries that see more entries than that; nan where no query does."""
    return jnp.where(sums[2] > 0, sums[:2] / sums[2], jnp.nan)
