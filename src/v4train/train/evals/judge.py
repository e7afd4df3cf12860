"""What a model makes of given documents: nats of some of their tokens, by the forward pass of training.

Documents are packed into rows of one fixed shape, several to a row, each a segment of its own: nothing crosses a segment's boundary, so
a document's figures are those that it has alone (to rounding), and questions of forty tokens do not each fill a row of 4,096. One
program of one shape serves any number of documents of any length up to a row; it is compiled when it is first used.

Rejected: a row for each document, padded to powers of two, as evaluation harnesses do. It compiles a program for each length, and most
of what it computes is padding. Rejected too: the decode engine, which has the prompt's cache to reuse between choices, but does not run
on a training mesh, and is another program than the one whose loss the run reports.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from v4train.core import axes, compiler, param
from v4train.data import batch as batch_lib
from v4train.model import config as model_config
from v4train.model import transformer
from v4train.numerics import config as numerics_config
from v4train.numerics import policy
from v4train.sharding import constrain, rules
from v4train.train import loss as loss_lib
from v4train.train import precision

_GRAIN = 128
"""Rows are whole numbers of it long: what attention and heavy compression divide a row into."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A document of text, and which of its tokens are asked for.

    Attributes:
        tokens: ids, `bos` first.
        start: the first token whose probability is asked for, at least 1: nothing predicts the first token.
    """

    tokens: Int[np.ndarray, "n"]
    start: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``nats``: of the tokens asked for, together. ``right``: whether each of them was the likeliest after those before it."""

    nats: float
    right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Forward:
    """``(all parameters, batch) -> f32[B, S, 2]``: nats of each token's successor, and whether it is the likeliest."""

    model: transformer.Transformer
    declarations: dict
    numerics: numerics_config.NumericsConfig

    def __call__(self, params: dict, batch: batch_lib.Batch) -> Float[Array, "b s 2"]:
        bound = param.bind(self.model, policy.cast_for_compute(params, declarations=self.declarations, config=self.numerics))
        ids, _ = loss_lib.targets(batch, ahead=1)
        with precision.formats(self.numerics):
            return bound.verdicts(bound(loss_lib.model_inputs(batch, config=self.model.config)).hidden, ids)


class Judge:
    """Answers for one model, numerics and mesh, in rows of one length.

    Attributes:
        length: tokens of a row: the longest document.
        rows: of a batch.
    """

    def __init__(
        self, model: model_config.ModelConfig, *, numerics: numerics_config.NumericsConfig, mesh: jax.sharding.Mesh, rows: int, length: int
    ):
        """Args:
        model: whose parameters will be given; its MTP block is not run.
        numerics: formats.
        mesh: where the parameters are.
        rows: at most so many in a batch; made a multiple of the parts that the mesh divides a batch into.
        length: tokens of the longest document; made a multiple of what rows are divided into.
        """
        self._model, self._numerics, self._mesh = model.model_copy(update={"mtp": None}), numerics, mesh
        parts = math.prod(mesh.shape[name] for name in rules.rule("batch", mesh=mesh))
        grain = _GRAIN * mesh.shape["context"]
        self.rows, self.length = max(rows // parts, 1) * parts, -(-length // grain) * grain
        self._program: Callable[[dict, batch_lib.Batch], jax.Array] | None = None

    def __call__(self, params: dict, documents: Sequence[Asked]) -> list[Verdict]:
        """A verdict on each document; equal documents are computed once, and so get equal ones.

        Args:
            params: all parameters and buffers of the model.
            documents: none longer than `length`.
        """
        params = {name: part for name, part in params.items() if name != "mtp"}
        keys = [(document.start, document.tokens.tobytes()) for document in documents]
        different = dict(zip(keys, documents, strict=True))
        rows = pack([len(document.tokens) for document in different.values()], length=self.length)
        names, found = list(different), {}
        for first in range(0, len(rows), self.rows):
            chosen = rows[first : first + self.rows]
            out = self._run(params, self._batch([[different[names[i]].tokens for i in row] for row in chosen]))
            for row, members in enumerate(chosen):
                at = 0
                for i in members:
                    document = different[names[i]]
                    told = out[row, at + document.start - 1 : at + len(document.tokens) - 1]
                    found[names[i]] = Verdict(float(told[:, 0].sum(dtype=np.float64)), bool((told[:, 1] == 1).all()))
                    at += len(document.tokens)
        return [found[key] for key in keys]

    def _batch(self, rows: list[list[np.ndarray]]) -> batch_lib.Batch:
        """The global batch; rows that nothing is left for are padding."""
        image = self._model.image
        no_media = {"max_patches": 0, "max_audio_frames": 0, "image_patch": 1 if image is None else image.patch}
        batch = batch_lib.empty(self.rows, sequence_length=self.length, pad=0, **no_media)
        for row, documents in enumerate(rows):
            at = 0
            for number, tokens in enumerate(documents, 1):
                here = (row, slice(at, at + len(tokens)))
                batch.tokens[here], batch.segment_ids[here], batch.positions[here] = tokens, number, np.arange(len(tokens))
                batch.loss_weight[here] = 1
                at += len(tokens)
        return batch

    def _run(self, params: dict, batch: batch_lib.Batch) -> np.ndarray:
        place = {name: self._sharding(array) for name, array in vars(batch).items()}
        placed = batch_lib.Batch(
            **{
                name: jax.make_array_from_callback(array.shape, place[name], lambda index, array=array: array[index])
                for name, array in vars(batch).items()
            }
        )
        if self._program is None:
            self._program = self._compile(params, placed)
        return np.asarray(self._program(params, placed))

    def _compile(self, params: dict, batch: batch_lib.Batch) -> Callable[[dict, batch_lib.Batch], jax.Array]:
        abstract = transformer.Transformer(self._model)
        forward = _Forward(abstract, param.declarations(abstract), self._numerics)
        replicated = NamedSharding(self._mesh, PartitionSpec())
        with constrain.on_mesh(self._mesh):
            return jax.jit(forward, out_shardings=replicated).lower(params, batch).compile(compiler.options())

    def _sharding(self, array: np.ndarray) -> jax.sharding.Sharding:
        by_token = array.ndim == 2 and array.shape[1] == self.length
        letters = "B S" if by_token else " ".join(["B", *"_" * (array.ndim - 1)])
        return rules.sharding(axes.logical_axes(letters), shape=array.shape, mesh=self._mesh)


def pack(lengths: Sequence[int], *, length: int) -> list[list[int]]:
    """Numbers of documents by row of ``length`` tokens: best fit, the longest first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of a row, and its number; ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[i] <= length, f"a document of {lengths[i]} tokens in rows of {length}"
        at = bisect.bisect_left(room, (lengths[i], 0))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


def shared(first: Int[np.ndarray, "n"], second: Int[np.ndarray, "m"]) -> int:
    """How many ids two encodings have in common, from their beginnings."""
    shortest = min(len(first), len(second))
    different = np.flatnonzero(first[:shortest] != second[:shortest])
    return int(different[0]) if len(different) else shortest
