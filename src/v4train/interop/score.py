"""What a checkpoint says about given tokens: logits, loss, gradient norm and greedy continuations, in fp32.

This is the yardstick for conversions and for other implementations, so it computes what the public PyTorch class computes: the mean
next-token cross-entropy of rows that are one document each, its gradient with respect to every trained parameter (no auxiliary loss, no
multi-token prediction, and so nothing for the indexer), all products in full fp32, and where index scores tie, the entries that the class
would take (`topk_order`).

Memory. A row of S tokens has S x V logits: 2 GB at 4,096 tokens of the released vocabulary. Rows go through the model one at a time, layers
are recomputed in the backward pass, and logits leave in blocks of positions, straight into the output file. On the device are the
parameters, their gradient, one row, and one block.

Greedy continuations are computed without a cache: every token is a forward pass over the prompt and all tokens so far, padded to the final
length, so that one compiled program serves all steps. The padding comes after the tokens and belongs to no document: nothing sees it. The
rejected alternative, a program per length, compiles for as long as it computes; a cache is the decode engine's business.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4train.checkpoint import arrays, restore, step_directory
from v4train.core import compiler, param, tree
from v4train.interop import padded, released, topk_order
from v4train.model import config as config_lib
from v4train.model import context, transformer
from v4train.ops import select

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_BLOCK = 2**24
"""Logits that are on the device at a time: 64 MB."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its arrays, without multi-token prediction.

    Attributes:
        model: its config; layers are recomputed in the backward pass.
        trained: parameters, on the default device.
        buffers: router biases and hash tables.
        pad_token: the id that ``transformers`` would be told is padding; see `_pad_token`. None: there is none.
    """

    model: config_lib.ModelConfig
    trained: dict
    buffers: dict
    pad_token: int | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """``loss`` is the mean over all next tokens, nats; ``gradients`` are the loss's, in the structure of `Checkpoint.trained`."""

    loss: float
    grad_norm: float
    gradients: dict


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a directory in the released layout, or a checkpoint of ours: a run directory, its checkpoints, or one step of them.

    Raises:
        ValueError: it is neither, or is damaged; the message names what was found.
    """
    directory = pathlib.Path(path)
    if (directory / "config.json").is_file():
        opened = released.Released.open(directory)
        opened.verify()
        return checkpoint(opened.model, opened.parameters(), pad_token=_pad_token(directory, opened.config))
    try:
        steps, step = step_directory.locate(directory)
    except ValueError as e:
        raise ValueError(f"{e}, or a directory in the released layout (with config.json)") from None
    found = restore.describe(steps, step=step)
    model = config_lib.ModelConfig.model_validate(found.metadata["recipe"]["model"]).after(found.metadata.get("stages", ()))
    return read_step(_scored(model), found, where=step_directory.path(steps, step=found.step))


def _pad_token(directory: pathlib.Path, config: dict[str, Any]) -> int | None:
    """The padding id of a directory in the released layout.

    It is config.json's. Where that is null, as in all released ones, prompts come from the tokenizer beside it, which does not pad a single
    prompt. A directory without tokenizer has no text: it is a test model, and its tokens are drawn ids. The public class must be told some
    id to generate from these, and the golden cases were made with 0.
    """
    if (named := config.get("pad_token_id")) is not None:
        return named
    return None if any((directory / name).is_file() for name in _TOKENIZERS) else 0


def checkpoint(model: config_lib.ModelConfig, params: dict, *, pad_token: int | None = None) -> Checkpoint:
    """A model and the nested dict of all its parameters, as `load` returns them."""
    model = _scored(model)
    declared = param.declarations(transformer.Transformer(model))
    trained = tree.select(params, declarations=declared, keep=lambda d: d.trained)
    buffers = tree.select(params, declarations=declared, keep=lambda d: not d.trained)
    return Checkpoint(model, jax.device_put(trained), jax.device_put(buffers), pad_token)


def _scored(model: config_lib.ModelConfig) -> config_lib.ModelConfig:
    return model.model_copy(update={"mtp": None, "remat": "full"})


def read_step(model: config_lib.ModelConfig, found: restore.Description, *, where: pathlib.Path) -> Checkpoint:
    """Reads what a model has of one step: parameters and buffers, no optimizer, and the MTP block if the config has it.

    Raises:
        ValueError: the step does not hold these arrays.
    """
    declared = param.declarations(transformer.Transformer(model))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = param.map_declarations(lambda _, d: jax.ShapeDtypeStruct(d.shape, d.dtype, sharding=device), declared)
    wanted = {
        "params": tree.select(structs, declarations=declared, keep=lambda d: d.trained),
        "buffers": tree.select(structs, declarations=declared, keep=lambda d: not d.trained),
    }
    named = arrays.flatten(wanted)
    different = [name for name, row in arrays.describe(named).items() if found.table.get(name) != row]
    if different:
        raise ValueError(f"{where} does not hold the arrays of the model in its own {step_directory.METADATA}: {', '.join(different)}")
    read = arrays.read(where / step_directory.ARRAYS, wanted=named)
    parts = jax.tree.unflatten(jax.tree.structure(wanted), [read[name] for name in named])
    return Checkpoint(model, parts["params"], parts["buffers"], None)


def evaluate(
    checkpoint: Checkpoint, *, tokens: Int[np.ndarray, "b s"], on_logits: Callable[[Float[np.ndarray, "block v"]], object] | None = None
) -> Evaluation:
    """Loss and gradients of next-token prediction.

    Args:
        checkpoint: the model.
        tokens: every row is one document of text.
        on_logits: called with fp32 logits, block after block of positions, row after row; all of them, in order.
    """
    rows, length = tokens.shape
    program, blocks = _differentiate(checkpoint, rows=rows, length=length), _Blocks(checkpoint, length=length)
    gradients = jax.tree.map(jnp.zeros_like, checkpoint.trained)
    nats = 0.0
    for row in tokens:
        losses, hidden, gradients = program(checkpoint.trained, checkpoint.buffers, gradients, row[None].astype(np.int32))
        nats += float(np.asarray(losses, np.float64).sum())
        if on_logits is not None:
            blocks.give(hidden, on_logits)
    return Evaluation(nats / (rows * (length - 1)), math.sqrt(sum(squares(gradients).values())), gradients)


def squares(gradients: dict) -> dict[str, float]:
    """The sum of squares of each array by its path, in fp64 but for the last axis."""
    leaves = jax.tree_util.tree_flatten_with_path(_row_squares(gradients))[0]
    return {param.path_name(path): float(np.asarray(leaf, np.float64).sum()) for path, leaf in leaves}


@jax.jit
def _row_squares(gradients: dict) -> dict:
    return jax.tree.map(lambda x: jnp.sum(jnp.square(x), axis=-1), gradients)


def greedy(checkpoint: Checkpoint, *, prompt: Int[np.ndarray, "s"], count: int, pad_token: int | None = None) -> Int[np.ndarray, "n"]:
    """The ``count`` tokens that follow, each the most likely one after those before it.

    Args:
        checkpoint: the model.
        prompt: at least one token.
        count: tokens to make.
        pad_token: tokens of the prompt that are hidden as padding, as the public class hides them (`padded`); None: none is.
    """
    start, length = len(prompt), len(prompt) + count
    row = np.zeros((1, length), np.int32)
    row[0, :start] = prompt
    hidden = None if pad_token is None else np.asarray(prompt) == pad_token
    padding = None if hidden is None or not hidden.any() else padded.Padding(hidden, length=length)
    choose = _choose(checkpoint, prompt=start, length=length, padding=padding)
    for place in range(start, length):
        row[0, place] = choose(checkpoint.trained, checkpoint.buffers, row, np.int32(place))
    return row[0, start:]


def _compiled(function: Callable, *arguments: Any, order: topk_order.Order, donate: tuple[int, ...] = ()) -> Callable:
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_matmul_precision("highest"), select.using("top_k", implementation=order):
        return jax.jit(function, donate_argnums=donate).lower(*structs).compile(compiler.options())


def _inputs(tokens: Array, *, used: Array | int) -> context.Inputs:
    """One document of text per row, of ``used`` tokens; what follows is padding."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    inside = places < used
    return context.Inputs(jnp.where(inside, tokens, 0), inside.astype(jnp.int32), jnp.where(inside, places, 0), jnp.zeros_like(tokens))


def _differentiate(checkpoint: Checkpoint, *, rows: int, length: int) -> Callable:
    """``(trained, buffers, gradients so far, row) -> (nats per token, hidden states, gradients)``."""
    abstract = transformer.Transformer(checkpoint.model)
    weight = 1.0 / (rows * (length - 1))

    def loss(trained: dict, buffers: dict, row: Array) -> tuple[Array, tuple[Array, Array]]:
        bound = param.bind(abstract, tree.merge(trained, buffers))
        hidden = bound(_inputs(row, used=length)).hidden
        nats = bound.token_losses(hidden[:, :-1], row[:, 1:])
        return nats.sum() * weight, (nats, hidden)

    def add(trained: dict, buffers: dict, gradients: dict, row: Array) -> tuple[Array, Array, dict]:
        (_, (nats, hidden)), of_row = jax.value_and_grad(loss, has_aux=True)(trained, buffers, row)
        return nats, hidden, jax.tree.map(jnp.add, gradients, of_row)

    arguments = (checkpoint.trained, checkpoint.buffers, checkpoint.trained, np.zeros((1, length), np.int32))
    return _compiled(add, *arguments, order=topk_order.Order(), donate=(2,))


class _Blocks:
    """Turns a row of hidden states to logits, a block of positions at a time."""

    def __init__(self, checkpoint: Checkpoint, *, length: int):
        self.checkpoint, self.length = checkpoint, length
        self.size = min(max(_BLOCK // checkpoint.model.vocab_size, 1), length)
        abstract = transformer.Transformer(checkpoint.model)

        def logits(trained: dict, buffers: dict, hidden: Array, start: Array) -> Array:
            block = jax.lax.dynamic_slice_in_dim(hidden[0], start, self.size)
            return param.bind(abstract, tree.merge(trained, buffers)).logits(block)

        hidden = np.zeros((1, length, checkpoint.model.hidden), np.float32)
        self.logits = _compiled(logits, checkpoint.trained, checkpoint.buffers, hidden, np.int32(0), order=topk_order.Order())

    def give(self, hidden: Float[Array, "1 s d"], receive: Callable[[np.ndarray], object]) -> None:
        """Calls ``receive`` with all logits of the row. The last block is cut: a slice that would overrun begins earlier."""
        for start in range(0, self.length, self.size):
            begin = min(start, self.length - self.size)
            block = np.asarray(self.logits(self.checkpoint.trained, self.checkpoint.buffers, hidden, np.int32(begin)))
            receive(block[start - begin :])


def _choose(checkpoint: Checkpoint, *, prompt: int, length: int, padding: padded.Padding | None) -> Callable:
    """``(trained, buffers, row, tokens used) -> the most likely next token``."""
    abstract = transformer.Transformer(checkpoint.model)

    def choose(trained: dict, buffers: dict, row: Array, used: Array) -> Array:
        bound, inputs = param.bind(abstract, tree.merge(trained, buffers)), _inputs(row, used=used)
        if padding is None:
            hidden = bound(inputs).hidden
        else:
            with padding.hidden():
                shifted = padding.context(inputs, config=checkpoint.model)
                hidden = bound(shifted.inputs, context=shifted).hidden
        return bound.logits(jax.lax.dynamic_index_in_dim(hidden[0], used - 1, keepdims=False)).argmax()

    order = topk_order.Order(entries=prompt // max(checkpoint.model.kind("csa").ratio, 1))
    row = np.zeros((1, length), np.int32)
    return _compiled(choose, checkpoint.trained, checkpoint.buffers, row, np.int32(0), order=order)
