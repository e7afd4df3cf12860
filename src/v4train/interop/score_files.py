"""The files of `v4train score`: tokens in, results out.

``tokens.npy`` is an integer array ``[B, S]``. The output is an uncompressed ``.npz``, written from front to back while the rows go through
the model: logits are never all in memory. It appears under its name only when it is complete.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import IO

import numpy as np
from jaxtyping import Int

from v4train.interop import score

_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was written, without the logits. ``greedy`` is None if it was not asked for."""

    loss: float
    grad_norm: float
    greedy: Int[np.ndarray, "n"] | None


def read_tokens(path: str | os.PathLike[str]) -> Int[np.ndarray, "b s"]:
    """Reads ``tokens.npy``.

    Raises:
        ValueError: it is absent or is no integer array of two axes with rows of at least two tokens.
    """
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: --tokens takes an i32 array [B, S] that numpy.save wrote") from None
    except (ValueError, EOFError, OSError) as e:
        raise ValueError(f"{path} is not a .npy file that can be read: {e}") from None
    if not isinstance(tokens, np.ndarray):
        tokens.close()
        raise ValueError(f"{path} is an archive of several arrays; save the tokens alone, with numpy.save")
    problems = []
    if not np.issubdtype(tokens.dtype, np.integer):
        problems.append(f"its dtype is {tokens.dtype}, expected int32")
    if tokens.ndim != 2:
        problems.append(f"its shape is {list(tokens.shape)}, expected two axes [B, S]")
    elif tokens.shape[0] < 1 or tokens.shape[1] < 2:
        problems.append(
            f"its shape is {list(tokens.shape)}, expected at least one row of at least two tokens, or there is nothing to predict"
        )
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return tokens


def check(tokens: Int[np.ndarray, "b s"], *, checkpoint: score.Checkpoint, count: int, source: str) -> None:
    """Checks that a model takes these tokens.

    Raises:
        ValueError: ids outside the vocabulary, rows that are too long, or no prompt to continue.
    """
    vocab, longest, length = checkpoint.model.vocab_size, checkpoint.model.max_positions, tokens.shape[1]
    problems, wrong = [], np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(wrong):
        listed = ", ".join(f"[{row}, {place}] = {tokens[row, place]}" for row, place in wrong[:_LISTED])
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        problems.append(f"the model's token ids are 0 .. {vocab - 1}, but {listed}{more}")
    if max(length, length // 2 + count) > longest:
        what = f"rows of {length} tokens" if length > longest else f"{length // 2} tokens and {count} greedy ones"
        problems.append(f"{what} are more than the model's {longest} positions")
    if count < 0:
        problems.append(f"--greedy {count}: expected a number of tokens, 0 for none")
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")


def write(
    out: str | os.PathLike[str],
    *,
    checkpoint: score.Checkpoint,
    tokens: Int[np.ndarray, "b s"],
    count: int = 0,
    pad_token: int | None = None,
) -> Summary:
    """Scores ``tokens`` and writes ``logits``, ``loss``, ``grad_norm`` and, if ``count`` is not 0, ``greedy``.

    Args:
        out: the file to write; an existing one is replaced when the new one is complete.
        checkpoint: the model.
        tokens: rows of one document each.
        count: greedy tokens to continue the first half of row 0 with.
        pad_token: see `score.greedy`.

    Raises:
        ValueError: ``out`` cannot be written, which is found out before anything is computed.
    """
    with _complete(pathlib.Path(out)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        shape = (*tokens.shape, checkpoint.model.vocab_size)
        with archive.open("logits.npy", "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            result = score.evaluate(
                checkpoint, tokens=tokens, on_logits=lambda block: member.write(np.ascontiguousarray(block).data.cast("B"))
            )
        continued = None
        if count:
            prompt = tokens[0, : tokens.shape[1] // 2]
            continued = score.greedy(checkpoint, prompt=prompt, count=count, pad_token=pad_token)
        values = {"loss": np.float32(result.loss), "grad_norm": np.float32(result.grad_norm), "greedy": continued}
        for name, value in values.items():
            if value is not None:
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(value))
    return Summary(result.loss, result.grad_norm, continued)


@contextlib.contextmanager
def _complete(out: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends without an error, and vanishes otherwise."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory; name a file")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        file = open(temporary, "wb")  # noqa: SIM115 - closed below
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--out {out}: there is no directory {out.parent}; make it first") from None
    except OSError as e:
        raise ValueError(f"--out {out} cannot be written: {e.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
