"""How far a checkpoint's results in v4train are from those of the public PyTorch class on the same weights and tokens.

A *golden case* is a directory in the released layout with a ``golden.npz`` beside the weights: ``tokens`` i32 [B, S], ``logits`` f32 [B, S,
V], ``loss``, ``grad_names`` and ``grad_norms`` (L2 norm of each tensor's gradient, under the class's names), and ``greedy``, continuations
of the first half of row 0. Norms and not gradients, so that a case stays small: a gradient with a wrong element has another norm.

The bounds are those of two fp32 programs that sum in different orders; a wrong formula misses them by orders of magnitude.
"""

import dataclasses
import math
import os
import pathlib

import jax
import numpy as np
from jaxtyping import Float, Int

from v4train.core import param
from v4train.interop import names, score
from v4train.model import config as config_lib

LOGITS = 2e-4
"""Largest difference of a logit."""
LOSS = 1e-5
"""Largest difference of the loss, nats."""
GRADIENT_NORM = 1e-4
"""Largest relative difference of a gradient's norm."""
NOISE = 3e-5
"""Part of the whole gradient's norm below which a tensor's is measured against this: of a gate that picks one expert, all is rounding."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the class computed.

    Attributes:
        tokens: its input, rows of one document.
        logits: for every token.
        loss: mean next-token cross-entropy, nats.
        gradient_norms: of every tensor that got a gradient, by the class's name.
        greedy: what it generated after the first half of row 0; None if it did not.
        pad_token: the padding id that ``generate`` was told, or None.
    """

    tokens: Int[np.ndarray, "b s"]
    logits: Float[np.ndarray, "b s v"]
    loss: float
    gradient_norms: dict[str, float]
    greedy: Int[np.ndarray, "n"] | None = None
    pad_token: int | None = None


@dataclasses.dataclass(frozen=True)
class Parity:
    """Differences from a `Reference`.

    Attributes:
        logits: the largest absolute one.
        loss: absolute, nats.
        gradient_norm: relative, of the norm of all gradients together.
        gradient_norms: relative, of each tensor by the class's name; infinite for a tensor that only one side gives a gradient.
        greedy: whether every token is the same; None if there are none to compare.
    """

    logits: float
    loss: float
    gradient_norm: float
    gradient_norms: dict[str, float]
    greedy: bool | None

    def failures(self) -> list[str]:
        """What is out of bounds, in words; empty if all is well."""
        found = [
            (f"logits differ by up to {self.logits:.3g}", self.logits, LOGITS),
            (f"losses differ by {self.loss:.3g} nats", self.loss, LOSS),
            (f"gradient norms differ by {self.gradient_norm:.3g}", self.gradient_norm, GRADIENT_NORM),
            *((f"{name}: gradient norms differ by {x:.3g}", x, GRADIENT_NORM) for name, x in self.gradient_norms.items()),
        ]
        # Written so that NaN fails.
        failed = [f"{text}, allowed {bound:g}" for text, value, bound in found if not value <= bound]
        return [*failed, *(["greedy tokens differ"] if self.greedy is False else [])]


def compare(directory: str | os.PathLike[str], *, pad_token: int | None = 0) -> Parity:
    """Compares a golden case.

    Args:
        directory: the case.
        pad_token: the padding id that its greedy tokens were generated with; `score.greedy` hides it as the class does.

    Raises:
        ValueError: the directory is no golden case.
    """
    return measure(score.load(directory), reference=read(directory, pad_token=pad_token))


def read(directory: str | os.PathLike[str], *, pad_token: int | None = 0) -> Reference:
    """Reads ``golden.npz`` of a case; see `compare`."""
    path = pathlib.Path(directory) / "golden.npz"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a golden case has config.json, model.safetensors and golden.npz")
    with np.load(path) as stored:
        missing = {"tokens", "logits", "loss", "grad_names", "grad_norms", "greedy"} - set(stored.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        norms = dict(zip(stored["grad_names"].tolist(), stored["grad_norms"].tolist(), strict=True))
        return Reference(stored["tokens"], stored["logits"], float(stored["loss"]), norms, stored["greedy"], pad_token)


def measure(checkpoint: score.Checkpoint, *, reference: Reference, noise: float = NOISE) -> Parity:
    """Scores the reference's tokens and takes the differences; ``noise`` as in `NOISE`."""
    expected = reference.logits.reshape(-1, reference.logits.shape[-1])
    place, largest = 0, 0.0

    def take(block: np.ndarray) -> None:
        nonlocal place, largest
        largest = float(np.maximum(largest, np.abs(block - expected[place : place + len(block)]).max()))  # keeps NaN
        place += len(block)

    result = score.evaluate(checkpoint, tokens=reference.tokens, on_logits=take)
    assert place == len(expected), (place, expected.shape)
    norms = gradient_norms(result.gradients, model=checkpoint.model)
    same = None
    if reference.greedy is not None:
        prompt = reference.tokens[0, : reference.tokens.shape[1] // 2]
        ours = score.greedy(checkpoint, prompt=prompt, count=len(reference.greedy), pad_token=reference.pad_token)
        same = bool(np.array_equal(ours, reference.greedy))
    whole = math.sqrt(sum(norm**2 for norm in reference.gradient_norms.values()))
    every = {
        name: _relative(norms.get(name), reference.gradient_norms.get(name), least=noise * whole)
        for name in norms | reference.gradient_norms
    }
    return Parity(largest, abs(result.loss - reference.loss), _relative(result.grad_norm, whole, least=0.0), every, same)


def gradient_norms(gradients: dict, *, model: config_lib.ModelConfig) -> dict[str, float]:
    """L2 norms under the class's names. The indexer, which its loss does not teach, is left out."""
    leaves = jax.tree_util.tree_flatten_with_path(gradients)[0]
    flat = {param.path_name(path): np.asarray(leaf) for path, leaf in leaves}
    squares: dict[str, float] = {}
    for slot in names.slots(model):
        if slot.path in flat and slot.spelled and "/indexer/" not in slot.path:
            block = flat[slot.path][slot.index].astype(np.float64)
            squares[slot.spelled] = squares.get(slot.spelled, 0.0) + float(np.sum(block**2))
    return {name: math.sqrt(square) for name, square in squares.items()}


def _relative(found: float | None, expected: float | None, *, least: float) -> float:
    if expected is None:  # the class has no gradient where it computes nothing, as in a compressor without a whole block
        return math.inf if found else 0.0
    if found is None:
        return math.inf
    return 0.0 if found == expected else abs(found - expected) / max(expected, least)
