"""A model small enough to compile in seconds, with every part of the large ones, and batches to feed it.

Weights are drawn with numpy, large enough that every path moves the output by much more than rounding: what a test does not see move
is then really cut off.
"""

import functools

import jax
import numpy as np

from v4train.core import param
from v4train.data import batch as batch_lib
from v4train.model import config as config_lib
from v4train.model import router, transformer
from v4train.train import loss

VOCAB, PATCH = 64, 2
IMAGE_TOKEN, AUDIO_TOKEN = VOCAB - 2, VOCAB - 1

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time; what runs here is too small to need fast code."""


def config(*layers: str, **changes) -> config_lib.ModelConfig:
    """A model with these layers, by default one of each kind; changes of nested fields as ``moe={"experts": 4}``."""
    attention = {"heads": 4, "head_dim": 16, "rope_dim": 8, "query_rank": 16, "output_groups": 2, "output_rank": 8, "window": 8, "chunk": 8}
    moe = {"experts": 8, "top_k": 2, "ffn": 16, "hash_layers": 1}
    sparse = {"kind": "csa", "ratio": 4, "index_heads": 2, "index_head_dim": 8, "top_k": 4, "phase": changes.pop("phase", "sparse")}
    values = {
        "vocab_size": VOCAB,
        "hidden": 32,
        "kinds": [{"kind": "window"}, sparse, {"kind": "hca", "ratio": 8}],
        "layers": [{"pattern": layers or ("window", "csa", "hca")}],
        "attention": attention | changes.pop("attention", {}),
        "hyper": {"scale_init": 1.0},
        "moe": moe | changes.pop("moe", {}),
        "image": {"patch": PATCH, "grid": 8},
        "audio": {},
        "media_tokens": (IMAGE_TOKEN, AUDIO_TOKEN),
        "remat": "none",
    }
    return config_lib.ModelConfig.model_validate(values | changes)


@functools.cache
def declarations(model: config_lib.ModelConfig) -> dict:
    """Of every parameter of the model."""
    return param.declarations(transformer.Transformer(model))


def parameters(model: config_lib.ModelConfig, *, seed: int = 0) -> dict:
    """Random arrays for every parameter of a model; see `draw`."""
    return draw(declarations(model), experts=model.moe.experts, seed=seed)


def draw(declared: dict, *, experts: int = 8, seed: int = 0) -> dict:
    """Random arrays, buffers included: norms near 1, matrices that keep the scale, all else N(0, 0.5^2)."""

    def array(path: str, d: param.Declaration) -> np.ndarray:
        rng = np.random.default_rng(param.fold(seed, path))
        name = path.split("/")[-1]
        if "hash_table" in d.tags:
            *layers, vocab, top_k = d.shape
            tables = [
                router.balanced_table(np.ones(vocab), experts=experts, top_k=top_k, seed=i) for i in range(np.prod(layers, dtype=int))
            ]
            return np.stack(tables).reshape(d.shape)
        x = rng.standard_normal(d.shape)
        if name.endswith("norm") or name == "scale":
            x = 1 + 0.1 * x
        elif len(d.shape) > 1 and name not in ("ape", "bias", "base", "sink"):
            x *= d.shape[-2] ** -0.5 if name != "table" else 1.0
        else:
            x *= 0.5
        return x.astype(d.dtype)

    return jax.tree.map(jax.numpy.asarray, param.map_declarations(array, declared))


def batch(rows: list[list[tuple]], *, length: int, seed: int = 0) -> batch_lib.Batch:
    """Rows of documents ``(tokens, first position, modalities)``; modalities is a string of t, i and a repeated over the document.

    Text ids are distinct within 48 tokens of a row. What the documents leave of a row is padding.
    """
    rng = np.random.default_rng(seed)
    out = batch_lib.empty(len(rows), sequence_length=length, max_patches=length, max_audio_frames=length, image_patch=PATCH, pad=1)
    for row, documents in enumerate(rows):
        at, used = 0, [0, 0]
        ids = 2 + rng.permutation(VOCAB - 4)
        for number, (size, first, kinds) in enumerate(documents, 1):
            span = slice(at, at + size)
            out.segment_ids[row, span] = number
            out.positions[row, span] = first + np.arange(size)
            for i in range(at, at + size):
                kind = "tia".index(kinds[(i - at) % len(kinds)])
                out.modality[row, i] = kind
                out.tokens[row, i] = (ids[i % len(ids)], IMAGE_TOKEN, AUDIO_TOKEN)[kind]
                out.loss_weight[row, i] = kind == 0
                if kind:
                    (out.patch_slot, out.audio_slot)[kind - 1][row, i] = used[kind - 1]
                    used[kind - 1] += 1
            at += size
        assert at <= length, (at, length)
    out.patches[:] = rng.integers(0, 256, out.patches.shape)
    out.patch_xy[:] = rng.integers(0, 8, out.patch_xy.shape)
    out.audio[:] = rng.integers(0, 16, out.audio.shape)
    batch_lib.validate(out, vocab_size=VOCAB)
    return out


def repeat(row: batch_lib.Batch, times: int) -> batch_lib.Batch:
    """The first row of a batch, ``times`` times, writable."""
    return jax.tree.map(lambda x: np.repeat(x[:1], times, axis=0), row)


def change(many: batch_lib.Batch, *, row: int, place: int) -> None:
    """Changes what stands at one place, in place: the id of a text token or of padding, the patch, or the audio frame."""
    kind = many.modality[row, place]
    if kind == 0:
        many.tokens[row, place] = 2 + (many.tokens[row, place] - 2 + 17) % (VOCAB - 4)
    elif kind == 1:
        many.patches[row, many.patch_slot[row, place]] ^= 0xA5
    else:
        many.audio[row, many.audio_slot[row, place]] ^= 5


def forward(model: config_lib.ModelConfig):
    """Jitted ``(params, batch) -> {name: [B, S, ...]}``: hidden states and weighted losses of every position, for both heads."""
    abstract = transformer.Transformer(model)

    @jit
    def run(params: dict, many: batch_lib.Batch) -> dict[str, jax.Array]:
        bound = param.bind(abstract, params)
        out = bound(loss.model_inputs(many, config=model))
        found = {"hidden": out.hidden, "loss": _losses(bound, out.hidden, many, ahead=1)}
        if out.mtp_hidden is not None:
            found |= {"mtp_hidden": out.mtp_hidden, "mtp_loss": _losses(bound, out.mtp_hidden, many, ahead=2)}
        return found

    return run


def _losses(bound: transformer.Transformer, hidden: jax.Array, many: batch_lib.Batch, *, ahead: int) -> jax.Array:
    ids, weight = loss.targets(many, ahead=ahead)
    return (bound.token_losses(hidden, ids) * weight)[..., None]


def mean_loss(model: config_lib.ModelConfig):
    """``(params, batch) -> (total loss, terms)``, not jitted."""
    abstract = transformer.Transformer(model)

    def run(params: dict, many: batch_lib.Batch):
        sums = loss.terms(abstract, params, many, sources=1)
        return loss.total(sums, loss.count(many), config=model), sums

    return run
