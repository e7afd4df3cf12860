"""Exports loaded by `transformers` from their directory: nothing missing, nothing unexpected, our logits."""

import contextlib
import io
import warnings

import jax
import numpy as np
import pytest

from tests.interop import steps
from v4train.checkpoint import streaming
from v4train.interop import exporting, importing, parity, score
from v4train.interop import released as released_lib

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made():
    return steps.recipe()


@pytest.fixture(scope="module")
def step(made, tmp_path_factory):
    """Weights of ordinary size: norms about one, hash tables without repeated experts."""
    values = steps.values(made.model, seed=3)
    rng = np.random.default_rng(4)
    for name, value in values.items():
        if name.endswith(("norm", "norm/scale", "enorm", "hnorm", "q_norm", "kv_norm")):
            value += 1
        if name.endswith("router/table"):
            value[...] = np.argsort(rng.random((*value.shape[:-1], made.model.moe.experts)), axis=-1)[..., : value.shape[-1]]
    return steps.write(tmp_path_factory.mktemp("run"), made, values)


def load(directory, **options):
    """The public class; a library that warns about its own surroundings must not fail our test."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager", **options
        )
    assert {key: list(value) for key, value in info.items()} == {key: [] for key in info}
    return model.float().eval()


@pytest.mark.parametrize("format, dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("base", "bfloat16"), ("instruct", "bfloat16")])
def test_loads_whole_and_gives_our_logits(made, step, tmp_path, format, dtype):
    """Ours are those of the export read back: dequantised weights, in fp32. BF16 holds FP8 and FP4 values with their scales exactly."""
    if format in ("base", "instruct"):
        pytest.importorskip("accelerate")
    out = tmp_path / "out"
    out.mkdir()
    exporting.write_weights(streaming.Reader(step), out, model=made.model, precision=format, shard_bytes=400_000)
    exporting.write_config(out, model=made.model, precision=format, tokens=None)
    model = load(out, dtype=getattr(torch, dtype))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 150))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model(torch.tensor(tokens)).logits.float().numpy()
    blocks: list[np.ndarray] = []
    released = released_lib.Released.open(out)
    score.evaluate(score.checkpoint(released.model, released.parameters()), tokens=tokens, on_logits=blocks.append)
    ours = np.concatenate(blocks).reshape(theirs.shape)
    spoken = np.setdiff1d(np.arange(made.model.vocab_size), made.model.media_tokens)  # the others we never predict
    assert model.generation_config.suppress_tokens == list(made.model.media_tokens)
    assert np.abs(theirs).max() > 0.5
    assert np.abs(ours - theirs)[..., spoken].max() <= parity.LOGITS
    importing.write_step(released, tmp_path / "steps", values={})
    back = steps.read(tmp_path / "steps" / "step_00000000")
    if format == "fp32":
        steps.assert_same_bits(back, steps.read(step))
    read = {f"{'params' if f'params/{name}' in back else 'buffers'}/{name}": x for name, x in _flat(released.parameters()).items()}
    steps.assert_same_bits(back, read)


def _flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def test_what_transformers_saves_is_read_as_the_same_weights(made, tmp_path):
    """A text model out to `transformers`, saved by it, and in again: everything but the MTP block, which it does not know."""
    text = made.model_copy(update={"model": made.model.model_copy(update={"image": None, "audio": None, "media_tokens": ()})})
    step = steps.write(tmp_path / "run", text, steps.values(text.model))
    out = tmp_path / "out"
    out.mkdir()
    exporting.write_weights(streaming.Reader(step), out, model=text.model, precision="fp32")
    exporting.write_config(out, model=text.model, precision="fp32", tokens=None)
    with contextlib.redirect_stderr(io.StringIO()):
        load(out, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    importing.write_step(released_lib.Released.open(tmp_path / "theirs"), tmp_path / "steps", values={})
    back, source = steps.read(tmp_path / "steps" / "step_00000000"), steps.read(step)
    assert set(back) == {name for name in source if "/mtp/" not in name}
    different = [name for name, value in back.items() if value.tobytes() != source[name].tobytes()]
    assert all(name.endswith("router/bias") for name in different), different  # it has none for other modalities
