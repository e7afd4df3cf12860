"""The lightning indexer as part of a layer: what it is taught, and what its loss may change; and layers too short to have entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from v4train.core import param
from v4train.model import context
from v4train.model.attention import compressed_sparse, heavily_compressed, projections
from v4train.ops import attention, sparse_attention
from v4train.train import loss

LENGTH = 40
ROWS = [[(22, 0, "t"), (15, 6, "t")], [(40, 0, "t")]]


class Layer:
    """A CSA layer with parameters and input, and the same attention written without chunks, gathers or kernels."""

    def __init__(self, *, phase: str, top_k: int):
        self.config = small.config("csa", phase=phase)
        self.kind = self.config.kind("csa").model_copy(update={"top_k": top_k})
        self.module = compressed_sparse.CompressedSparseAttention(self.config, self.kind)
        self.params = small.draw(param.declarations(self.module))
        self.x = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, 32)), jnp.float32)
        self.inputs = loss.model_inputs(small.batch(ROWS, length=LENGTH), config=self.config)
        self.context = context.make(self.inputs, config=self.config)

        self.jitted = small.jit(self.run)

    def run(self, params: dict, x: jax.Array) -> projections.AttentionOutput:
        return param.bind(self.module, params)(x, self.context)

    def dense(self, params: dict, x: jax.Array) -> projections.AttentionOutput:
        """Teacher and student as the definition has them; no gradient is stopped but the teacher's and those of the indexer's inputs."""
        layer, inputs, blocks = param.bind(self.module, params), self.inputs, self.context.blocks[4]
        freqs = projections.frequencies(self.config.attention, compressed=True)
        p = layer.projections
        latent = p.latent(x)
        entries = sparse_attention.Entries(layer.compressor(x, blocks, freqs=freqs), blocks.end, blocks.segment)
        still = jax.lax.stop_gradient
        index = layer.indexer(still(x), still(latent), self.context, blocks=blocks, freqs=freqs)
        seen = attention.visible_entries(inputs.segment_ids, entries)
        scores = attention.index_scores(index)
        attended = attention.select(scores, seen, top_k=self.kind.top_k) if self.kind.phase == "sparse" else seen
        out, shares = attention.dense_attention(
            p.queries(latent, inputs.positions, freqs=freqs),
            p.keys(x, inputs.positions, freqs=freqs),
            p.sink[...],
            segment_ids=inputs.segment_ids,
            window=self.config.attention.window,
            entries=entries,
            attended=attended,
        )
        teacher = still(shares.sum(1))
        teacher = teacher / jnp.maximum(teacher.sum(-1, keepdims=True), 1e-30)
        student = jnp.exp(jnp.where(attended, scores, -1e30) - jnp.max(jnp.where(attended, scores, -1e30), -1, keepdims=True))
        student = student / student.sum(-1, keepdims=True)
        terms = jnp.where(
            attended & (teacher > 0), teacher * jnp.log(jnp.where(attended, teacher, 1) / jnp.where(attended, student, 1)), 0.0
        )
        attended = sparse_attention.Attended(out, terms.sum((1, 2)))
        return p.output(attended, inputs.positions, freqs=freqs, dtype=x.dtype)


@pytest.fixture(scope="module", params=[("sparse", 3), ("warmup", 3)], ids=lambda p: p[0])
def layer(request):
    return Layer(phase=request.param[0], top_k=request.param[1])


def both_gradients(run, layer: Layer):
    """Gradients by parameters and input of the output and of the indexer's loss."""
    direction = np.random.default_rng(1).standard_normal((2, LENGTH, 32)).astype(np.float32)

    def value(params, x, of_indexer):
        out = run(params, x)
        return jnp.where(of_indexer, out.indexer_loss, jnp.sum(out.out * direction))

    gradient = small.jit(jax.value_and_grad(value, argnums=(0, 1)))
    return [gradient(layer.params, layer.x, flag) for flag in (False, True)]


@pytest.fixture(scope="module")
def ours(layer):
    return both_gradients(layer.run, layer)


def test_the_layer_and_its_gradients_equal_the_dense_form(layer, ours):
    for (value, gradients), (expected, expected_gradients) in zip(ours, both_gradients(layer.dense, layer), strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), gradients, expected_gradients)
    assert float(ours[1][0]) > 0.1


def test_its_loss_teaches_it_alone_and_nothing_else_teaches_it(layer, ours):
    (_, (by_output, x_by_output)), (_, (by_indexer, x_by_indexer)) = ours
    for part, name in ((by_output, "output"), (by_indexer, "indexer")):
        for path, gradient in jax.tree_util.tree_flatten_with_path(part)[0]:
            path = param.path_name(path)
            learns = path.startswith("indexer") == (name == "indexer")
            assert np.asarray(gradient).any() == learns, f"{path} from the loss of the {name}"
    assert np.asarray(x_by_output).any()
    assert not np.asarray(x_by_indexer).any(), "the loss reached the hidden state"


def test_the_scores_are_scaled_once(layer):
    """The only factor is (heads x width)^-0.5, on the weights."""
    blocks, x = layer.context.blocks[4], layer.x
    freqs = projections.frequencies(layer.config.attention, compressed=True)
    latent = jnp.asarray(np.random.default_rng(2).standard_normal((2, LENGTH, 16)), jnp.float32)
    index = param.bind(layer.module, layer.params).indexer(x, latent, layer.context, blocks=blocks, freqs=freqs)
    weight = np.asarray(x, np.float64) @ np.asarray(layer.params["indexer"]["weights_proj"], np.float64) / np.sqrt(2 * 8)
    np.testing.assert_allclose(index.weight, weight, rtol=1e-4, atol=1e-5)
    assert index.query.shape == (2, LENGTH, 2, 8)
    length = np.linalg.norm(np.asarray(latent) @ np.asarray(layer.params["indexer"]["wq_b"]), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(index.query.reshape(2, LENGTH, -1), axis=-1), length, rtol=1e-4)


def test_selecting_everything_is_dense_attention_and_selecting_less_is_not():
    sparse, dense = Layer(phase="sparse", top_k=10), Layer(phase="dense", top_k=10)
    everything = sparse.jitted(sparse.params, sparse.x)
    np.testing.assert_allclose(everything.out, dense.jitted(sparse.params, sparse.x).out, atol=1e-5)
    assert everything.indexer_loss > 0
    assert dense.jitted(dense.params, dense.x).indexer_loss == 0
    few = Layer(phase="sparse", top_k=2)
    assert np.abs(few.jitted(sparse.params, sparse.x).out - everything.out).max() > 1e-3


def test_warmup_attends_as_dense_does_and_teaches():
    warm, dense = Layer(phase="warmup", top_k=2), Layer(phase="dense", top_k=2)
    out = warm.jitted(warm.params, warm.x)
    np.testing.assert_allclose(out.out, dense.jitted(warm.params, warm.x).out, atol=1e-6)
    assert out.indexer_loss > 0


SHORT = {"csa": (compressed_sparse.CompressedSparseAttention, 4), "hca": (heavily_compressed.HeavilyCompressedAttention, 8)}


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("case", ["a row shorter than a block", "documents shorter than a block", "padding only"])
def test_a_layer_without_entries_works_and_its_compressor_rests(kind, case):
    module, ratio = SHORT[kind]
    rows = {"a row shorter than a block": [(3, 0, "t")], "documents shorter than a block": [(3, 0, "t")] * 5, "padding only": []}[case]
    length = 3 if case.startswith("a row") else 16
    config = small.config(kind)
    layer = module(config, config.kind(kind))
    params = small.draw(param.declarations(layer))
    inputs = loss.model_inputs(small.batch([rows], length=length), config=config)
    there = context.make(inputs, config=config)
    assert (ratio in there.blocks) == (length >= ratio)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 32)), jnp.float32)

    def value(params):
        out = param.bind(layer, params)(x, there)
        return jnp.sum(jnp.sin(out.out)) + out.indexer_loss, out

    (_, out), gradients = small.jit(jax.value_and_grad(value, has_aux=True))(params)
    assert np.isfinite(out.out).all()
    assert out.indexer_loss == 0
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.isfinite(gradient).all(), path
        rests = "compressor" in param.path_name(path) or "indexer" in param.path_name(path) or case == "padding only"
        assert np.asarray(gradient).any() != rests, path
