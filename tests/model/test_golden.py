"""Parity with the public PyTorch class on whole models: logits, loss, gradients, greedy tokens; then the same on other programs and meshes.

Here the model runs as it trains: of two entries whose index scores tie it takes the earlier. `untied`, where none tie, is compared
everywhere. In `mixed` and `yarn` few index heads let whole groups of entries score exactly 0.0 (every ReLU shut); the class takes what
its sort leaves in front, so from the first such token of a row on, logits differ legitimately (`FIRST_TIE`). Up to there they must agree,
which still covers many pruned queries. With the class's order at ties, both cases agree everywhere: `tests/interop/test_parity.py`.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.model import golden, small
from v4train.core import param, tree
from v4train.model import context, stack, transformer
from v4train.sharding import config as mesh_config
from v4train.sharding import constrain, mesh, rules

FIRST_TIE = {"mixed": (60, 96), "yarn": (84, 53)}  # per row; the length where there is none
GREEDY = {
    # What is stored here continues a prompt in which 0 is hidden as padding (`interop.padded`). These are the reference's tokens with a
    # mask of ones, with and without its cache. (The prompt of `yarn` has zeros too.)
    "untied": (200, 238, 218, 82, 200, 187, 222, 11, 146, 64, 85, 183, 89, 173, 218, 164, 216, 241, 172, 234, 218, 19, 183, 200),
    "mixed": None,  # as stored
}
LOGITS, LOSS, GRADIENT_NORMS = 2e-4, 1e-5, 1e-4  # allowed: absolute, absolute, relative


class Result(NamedTuple):
    """What one model says about one batch."""

    loss: np.ndarray
    logits: np.ndarray
    indexer_loss: np.ndarray
    gradients: dict
    loads: dict


@pytest.fixture(scope="module", autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def _model(name: str) -> "Model":
    return Model(name, differentiate=name == "untied")


@functools.cache
def _reference(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(golden.FOLDER / name / "golden.npz"))


def _inputs(tokens: np.ndarray, *, used: int | None = None) -> context.Inputs:
    """One document per row, of ``used`` tokens; the rest is padding."""
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    inside = places < (tokens.shape[1] if used is None else used)
    return context.Inputs(np.where(inside, tokens, 0), inside.astype(np.int32), np.where(inside, places, 0), np.zeros_like(tokens))


class Model:
    """A golden case as a compiled function of its inputs."""

    def __init__(self, name: str, *, differentiate: bool = True, layout: mesh_config.MeshConfig | None = None, **changes):
        self.config = golden.config(name, **changes)
        self.abstract = transformer.Transformer(self.config)
        declared = param.declarations(self.abstract)
        self.mesh = mesh.make(layout or mesh_config.MeshConfig())
        values = param.map_declarations(lambda _, d: rules.sharding(d.axes, shape=d.shape, mesh=self.mesh), declared)
        params = jax.device_put(golden.parameters(name, self.config), values)
        self.trained = tree.select(params, declarations=declared, keep=lambda d: d.trained)
        self.buffers = tree.select(params, declarations=declared, keep=lambda d: not d.trained)
        self.run = small.jit(jax.value_and_grad(self._loss, has_aux=True) if differentiate else self._only_forward)

    def _loss(self, trained: dict, buffers: dict, inputs: context.Inputs):
        bound = param.bind(self.abstract, tree.merge(trained, buffers))
        out = bound(inputs)
        nats = bound.token_losses(out.hidden[:, :-1], inputs.tokens[:, 1:])
        return nats.mean(), (bound.logits(out.hidden), out.indexer_loss, out.loads)

    def _only_forward(self, *arguments):
        return self._loss(*arguments), {}

    def __call__(self, inputs: context.Inputs) -> Result:
        rows = rules.sharding(("batch", "sequence"), shape=inputs.tokens.shape, mesh=self.mesh)
        placed = context.Inputs(*(None if x is None else jax.device_put(x, rows) for x in inputs))
        with constrain.on_mesh(self.mesh):
            (loss, (logits, indexer_loss, loads)), gradients = self.run(self.trained, self.buffers, placed)
        return jax.tree.map(np.asarray, Result(loss, logits, indexer_loss, gradients, loads))


@pytest.fixture(scope="module")
def untied() -> Model:
    return _model("untied")


@pytest.fixture(scope="module")
def untied_result(untied) -> Result:
    return untied(_inputs(_reference("untied")["tokens"]))


def _check_gradient_norms(gradients: dict, model: Model) -> None:
    reference = _reference("untied")
    expected = dict(zip(reference["grad_names"].tolist(), reference["grad_norms"].tolist(), strict=True))
    found = golden.gradient_norms(gradients, model.config)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    wrong = {name: (found[name], norm) for name, norm in expected.items() if abs(found[name] / norm - 1) > GRADIENT_NORMS}
    assert not wrong, wrong


def test_all_logits_agree(untied_result):
    np.testing.assert_allclose(untied_result.logits, _reference("untied")["logits"], rtol=0, atol=LOGITS)


def test_the_loss_agrees(untied_result):
    np.testing.assert_allclose(untied_result.loss, _reference("untied")["loss"], rtol=0, atol=LOSS)


def test_the_gradient_norm_of_every_tensor_agrees(untied, untied_result):
    _check_gradient_norms(untied_result.gradients, untied)


def test_the_language_loss_does_not_teach_the_indexer(untied_result):
    leaves = jax.tree_util.tree_flatten_with_path(untied_result.gradients)[0]
    indexers = {path: np.abs(leaf).max() for path, leaf in ((param.path_name(p), leaf) for p, leaf in leaves) if "/indexer/" in path}
    assert len(indexers) >= 6
    assert set(indexers.values()) == {0.0}, indexers


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_are_identical(name):
    """Given the reference's tokens so far, each of our choices is the reference's next one: by induction, our own decoding is the same.

    One pass over a padded row therefore checks all 24, and that padding does not disturb.
    """
    tokens = _reference(name)["tokens"].copy()
    greedy, prompt = np.array(GREEDY[name] or _reference(name)["greedy"]), tokens.shape[1] // 2
    tokens[0, prompt : prompt + len(greedy)] = greedy
    logits = _model(name)(_inputs(tokens, used=prompt + len(greedy))).logits[0]
    assert logits[prompt - 1 : prompt + len(greedy) - 1].argmax(-1).tolist() == greedy.tolist()


@pytest.mark.parametrize("name", ["mixed", "yarn"])
def test_logits_agree_up_to_the_first_tie_of_index_scores(name):
    reference, model = _reference(name), _model(name)
    logits = model(_inputs(reference["tokens"])).logits
    pruned_from = model.config.kind("csa").ratio * (model.config.kind("csa").top_k + 1) - 1
    for row, until in enumerate(FIRST_TIE[name]):
        assert until > pruned_from + 10, "the rows compared must be really sparse"
        np.testing.assert_allclose(logits[row, :until], reference["logits"][row, :until], rtol=0, atol=LOGITS, err_msg=f"row {row}")


@pytest.mark.parametrize(("remat", "chunk", "unrolled"), [("none", 256, True), ("dots", 16, False)])
def test_scanning_recomputing_and_chunks_change_nothing(untied_result, monkeypatch, remat, chunk, unrolled):
    if unrolled:
        monkeypatch.setattr(stack, "_LONGEST_PATTERN", 1)
    attention = golden.config("untied").attention.model_copy(update={"chunk": chunk})
    model = Model("untied", remat=remat, attention=attention.model_dump())
    runs = stack.factor(stack.layer_specs(model.config))
    assert all(run.repeat == 1 for run in runs) == unrolled
    result = model(_inputs(_reference("untied")["tokens"]))
    np.testing.assert_allclose(result.logits, untied_result.logits, rtol=0, atol=5e-5)
    np.testing.assert_allclose(result.indexer_loss, untied_result.indexer_loss, rtol=1e-5)
    _check_gradient_norms(result.gradients, model)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(untied_result):
    """Parameters split over `fsdp`, experts over `expert`, rows over both; the rows are the golden ones four times."""
    model = Model("untied", layout=mesh_config.MeshConfig(fsdp=2, expert=4))
    split = jax.tree.leaves(jax.tree.map(lambda x: x.sharding.is_fully_replicated, model.trained))
    assert not all(split)
    result = model(_inputs(np.tile(_reference("untied")["tokens"], (4, 1))))
    np.testing.assert_allclose(result.logits, np.tile(untied_result.logits, (4, 1, 1)), rtol=0, atol=5e-5)
    np.testing.assert_allclose(result.loss, untied_result.loss, rtol=1e-6)
    np.testing.assert_allclose(result.indexer_loss, 4 * untied_result.indexer_loss, rtol=1e-5)
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many, 4 * one), result.loads, untied_result.loads)
    jax.tree.map(
        lambda many, one: np.testing.assert_allclose(many, one, atol=2e-4 * np.abs(one).max()), result.gradients, untied_result.gradients
    )
    _check_gradient_norms(result.gradients, model)
