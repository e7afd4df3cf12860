"""The one table of shape letters and logical axis names.

A shape is written in letters (``"B S D"``), in annotations and in calls to ``constrain`` alike. Each letter stands for a *logical
axis*; `sharding.rules` decides which mesh axes a logical axis is split over. Model code therefore never names a mesh axis.
"""

LETTERS: dict[str, str] = {
    "B": "batch",  # rows of a batch
    "S": "sequence",  # tokens of a row
    "D": "embed",  # hidden width d of the residual stream
    "N": "streams",  # mHC residual streams
    "H": "heads",  # query heads; as a parameter axis heads x head_dim, flattened
    "K": "head_dim",  # width of one head
    "R": "rank",  # low-rank latents (query, output)
    "G": "groups",  # groups of the output projection
    "O": "group_ranks",  # groups x rank, flattened
    "E": "experts",  # routed experts
    "F": "ffn",  # hidden width of an expert
    "V": "vocab",  # token ids
    "M": "modality",  # text, image, audio
    "L": "layers",  # stacked layers of one group
    "T": "tokens",  # B x S, flattened
    "P": "partial",  # sums over parts of a split width, before they are added
    "X": "matrices",  # independent matrices stacked for one Newton-Schulz run
}


def logical_axes(spec: str) -> tuple[str | None, ...]:
    """``"B S D"`` -> ``("batch", "sequence", "embed")``; ``_`` stands for an axis that is never split.

    Raises:
        KeyError: a letter is not in the table (a programming error, not a user's).
    """
    return tuple(None if letter == "_" else LETTERS[letter] for letter in spec.split())


def letters(axes: tuple[str | None, ...]) -> str:
    """``("embed", "rank")`` -> ``"D R"``: what `logical_axes` reads."""
    of_axis = {axis: letter for letter, axis in LETTERS.items()}
    return " ".join("_" if axis is None else of_axis[axis] for axis in axes)
