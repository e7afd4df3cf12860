"""Scores against independent computations, of both kinds of checkpoint; bad input is one message; output is whole or absent."""

import errno
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.model import small
from v4train.checkpoint import config as checkpoint_config
from v4train.checkpoint import manager
from v4train.cli import main
from v4train.config import dump
from v4train.core import param, tree
from v4train.interop import names, released_config, score, score_files
from v4train.model import config as config_lib
from v4train.model import context, transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH = 23  # a multiple of no ratio
TOKENS = np.random.default_rng(0).integers(0, small.VOCAB, (2, LENGTH)).astype(np.int32)


@functools.cache
def _model() -> config_lib.ModelConfig:
    """One sparse layer whose indexer prunes, with an MTP block that must not count."""
    return small.config("csa", image=None, audio=None, media_tokens=())


@functools.cache
def _params() -> dict:
    return small.parameters(_model())


@functools.cache
def _checkpoint() -> score.Checkpoint:
    return score.checkpoint(_model(), _params())


@functools.cache
def _evaluated() -> tuple[score.Evaluation, list[np.ndarray]]:
    blocks: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "_BLOCK", 5 * small.VOCAB)
        return score.evaluate(_checkpoint(), tokens=TOKENS, on_logits=lambda block: blocks.append(np.array(block))), blocks


def _forward(params: dict, tokens: np.ndarray) -> jax.Array:
    """Logits of all rows at once, nothing recomputed."""
    bound = param.bind(transformer.Transformer(_model()), params)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = context.Inputs(jnp.asarray(tokens), jnp.ones_like(places), places, jnp.zeros_like(places))
    return bound.logits(bound(inputs).hidden)


@functools.cache
def _expected() -> tuple[float, np.ndarray, dict]:
    declared = small.declarations(_model())
    trained = tree.select(_params(), declarations=declared, keep=lambda d: d.trained)
    buffers = tree.select(_params(), declarations=declared, keep=lambda d: not d.trained)

    def loss(trained: dict) -> tuple[jax.Array, jax.Array]:
        logits = _forward(tree.merge(trained, buffers), TOKENS)
        chosen = jax.nn.log_softmax(logits[:, :-1]) * jax.nn.one_hot(TOKENS[:, 1:], small.VOCAB)
        return -chosen.sum() / (2 * (LENGTH - 1)), logits

    with jax.default_matmul_precision("highest"):
        (value, logits), gradients = small.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    return float(value), np.asarray(logits), jax.tree.map(np.asarray, gradients)


def test_loss_and_gradients_are_those_of_all_rows_at_once():
    (result, _), (loss, _, gradients) = _evaluated(), _expected()
    assert abs(result.loss - loss) < 1e-6
    mtp = gradients.pop("mtp")
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(mtp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), result.gradients, gradients)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(result.grad_norm, norm, rtol=1e-5)


def test_logits_come_in_order_and_in_small_blocks():
    _, blocks = _evaluated()
    assert [len(block) for block in blocks] == 2 * [5, 5, 5, 5, 3]
    np.testing.assert_allclose(np.concatenate(blocks).reshape(2, LENGTH, -1), _expected()[1], rtol=0, atol=1e-5)


def test_greedy_tokens_are_the_most_likely_ones_of_a_row_without_padding():
    prompt = TOKENS[0, : LENGTH // 2]
    found = score.greedy(_checkpoint(), prompt=prompt, count=6)
    whole = np.concatenate([prompt, found])[None]
    with jax.default_matmul_precision("highest"):
        logits = small.jit(functools.partial(_forward, _params()))(whole)
    assert np.asarray(logits[0, len(prompt) - 1 : -1]).argmax(-1).tolist() == found.tolist()
    assert len(set(found.tolist())) > 1


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> pathlib.Path:
    """What a training run leaves: parameters, buffers, and optimizer state that is not to be read."""
    path, declared = tmp_path_factory.mktemp("run"), small.declarations(_model())
    state = {
        "params": tree.select(_params(), declarations=declared, keep=lambda d: d.trained),
        "buffers": tree.select(_params(), declarations=declared, keep=lambda d: not d.trained),
        "optimizer": {"count": jnp.zeros((), jnp.int32)},
    }
    with manager.Manager(path / "checkpoints", config=checkpoint_config.CheckpointConfig()) as saver:
        saver.save(7, state, metadata={"recipe": {"model": dump.values(_model())}})
    return path


@pytest.fixture(scope="module")
def released_directory(tmp_path_factory) -> pathlib.Path:
    """The same model in the released layout."""
    path = tmp_path_factory.mktemp("released")
    tensors = {}
    for slot in names.slots(_model()):
        block = np.asarray(param_at(_params(), slot.path))[slot.index]
        if not slot.extra:
            tensors[slot.released] = slot.to_released(block).astype(np.int64 if slot.kind == "hash_table" else np.float32)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(released_config.config_json(_model()) | {"pad_token_id": 3}))
    return path


def param_at(params: dict, path: str) -> jax.Array:
    return functools.reduce(lambda node, key: node[key], path.split("/"), params)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000007"])
def test_a_run_is_read_by_any_of_its_directories(run_directory, inside):
    loaded, expected = score.load(run_directory / inside), _checkpoint()
    assert (loaded.model, loaded.pad_token) == (expected.model, None)
    jax.tree.map(np.testing.assert_array_equal, (loaded.trained, loaded.buffers), (expected.trained, expected.buffers))


def test_a_released_directory_is_read(released_directory):
    loaded, expected = score.load(released_directory), _checkpoint()
    assert loaded.pad_token == 3
    assert loaded.model.layer_kinds == expected.model.layer_kinds
    jax.tree.map(np.testing.assert_array_equal, loaded.trained, expected.trained)


@pytest.mark.parametrize("named, tokenizer, expected", [(3, True, 3), (3, False, 3), (None, True, None), (None, False, 0)])
def test_the_padding_of_a_released_directory(tmp_path, released_directory, named, tokenizer, expected):
    shutil.copytree(released_directory, tmp_path / "copy")
    config = json.loads((released_directory / "config.json").read_text()) | {"pad_token_id": named}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert score.load(tmp_path / "copy").pad_token == expected


def test_the_command_writes_what_the_library_computes(run_directory, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", TOKENS)
    out = tmp_path / "out.npz"
    words = ["score", "--checkpoint", str(run_directory), "--tokens", str(tmp_path / "tokens.npy"), "--out", str(out), "--greedy", "2"]
    assert main.main(words) == 0
    loss, logits, _ = _expected()
    with np.load(out) as found:
        assert {name: (found[name].dtype, found[name].shape) for name in found.files} == {
            "logits": (np.float32, (2, LENGTH, small.VOCAB)),
            "loss": (np.float32, ()),
            "grad_norm": (np.float32, ()),
            "greedy": (np.int32, (2,)),
        }
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose([found["loss"], found["grad_norm"]], [loss, _evaluated()[0].grad_norm], rtol=1e-5)
        assert f"greedy: {found['greedy'][0]} {found['greedy'][1]}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "tokens.npy"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 8), np.float32), "its dtype is float32, expected int32"),
        (np.zeros(8, np.int32), "its shape is [8], expected two axes [B, S]"),
        (np.zeros((2, 2, 2), bool), "its dtype is bool, expected int32; its shape is [2, 2, 2], expected two axes [B, S]"),
        (np.zeros((3, 1), np.int32), "expected at least one row of at least two tokens"),
        (np.array([[0, 64, -1], [3, 5, 99]], np.int64), "the model's token ids are 0 .. 63, but [0, 1] = 64, [0, 2] = -1, [1, 2] = 99"),
        (np.full((2, 9), 64), "[0, 4] = 64 and 13 more"),
        (b"not numpy", "is not a .npy file that can be read"),
        (None, "tokens.npy does not exist"),
    ],
)
def test_bad_tokens_are_one_message(run_directory, tmp_path, capsys, tokens, message):
    path = tmp_path / "tokens.npy"
    if isinstance(tokens, bytes):
        path.write_bytes(tokens)
    elif tokens is not None:
        np.save(path, tokens)
    assert main.main(["score", "--checkpoint", str(run_directory), "--tokens", str(path), "--out", str(tmp_path / "o.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "o.npz").exists()


def test_rows_beyond_the_models_positions_are_refused():
    short = score.Checkpoint(_model().model_copy(update={"max_positions": 20}), {}, {}, None)
    with pytest.raises(ValueError, match=r"t\.npy: rows of 23 tokens are more than the model's 20 positions"):
        score_files.check(TOKENS, checkpoint=short, count=0, source="t.npy")
    with pytest.raises(ValueError, match=r"5 tokens and 16 greedy ones are more than the model's 20"):
        score_files.check(TOKENS[:, :10], checkpoint=short, count=16, source="t.npy")
    with pytest.raises(ValueError, match=r"--greedy -1: expected a number"):
        score_files.check(TOKENS[:, :10], checkpoint=short, count=-1, source="t.npy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "nowhere does not exist: give a run directory"),
        ({"--out": "missing/out.npz"}, "there is no directory missing; make it first"),
        ({"--out": "."}, "is a directory; name a file"),
        ({"--pad-token": "zero"}, "--pad-token zero: expected a token id or none"),
    ],
)
def test_bad_options_are_one_message(run_directory, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", TOKENS)
    options = {"--checkpoint": str(run_directory), "--tokens": "tokens.npy", "--out": "out.npz"} | change
    assert main.main(["score", *(word for pair in options.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    out.write_bytes(b"old")

    def fail(checkpoint, *, tokens, on_logits):
        on_logits(np.zeros((1, small.VOCAB), np.float32))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(score, "evaluate", fail)
    with pytest.raises(OSError, match="No space"):
        score_files.write(out, checkpoint=_checkpoint(), tokens=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    assert out.read_bytes() == b"old"
