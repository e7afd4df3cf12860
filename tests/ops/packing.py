"""Rows of packed documents that are hard for compressed attention, and the plain definition of their blocks."""

from typing import NamedTuple

import numpy as np

LENGTH = 37  # neither a multiple of a ratio nor of a chunk
# Documents of each row as (position of the first token, number of tokens); what is left of a row is padding.
ROWS = {
    "one document": [(0, 37)],
    "three documents": [(0, 9), (0, 14), (0, 14)],
    "continues in the middle of a block": [(6, 11), (0, 26)],
    "continues at the start of a block": [(8, 29), (0, 8)],
    "shorter than a block": [(0, 3), (0, 2), (0, 3), (0, 20), (0, 4), (0, 1)],
    "padding": [(0, 22)],
    "nothing but padding": [],
}


class Block(NamedTuple):
    """A complete block of a document, found by walking."""

    tokens: list[int]  # indices in the row
    previous: list[int] | None  # the same of the block before it, if that is complete in the row
    segment: int
    position: int  # in the document, of the first token


def layout(rows: dict[str, list[tuple[int, int]]] = ROWS, *, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """``segment_ids`` and ``positions``, i32 ``[B, S]``."""
    segment_ids, positions = np.zeros((2, len(rows), length), np.int32)
    for b, documents in enumerate(rows.values()):
        at = 0
        for segment, (first, size) in enumerate(documents, 1):
            segment_ids[b, at : at + size] = segment
            positions[b, at : at + size] = np.arange(first, first + size)
            at += size
    return segment_ids, positions


def blocks(segment_ids: np.ndarray, positions: np.ndarray, *, ratio: int) -> list[list[Block]]:
    """Per row, the blocks ``[m i, m i + m)`` of every document whose tokens are all in the row, in order."""
    found = []
    for segments, places in zip(segment_ids, positions, strict=True):
        row = []
        for segment in sorted(set(segments.tolist()) - {0}):
            index_of = {int(places[t]): t for t in range(len(segments)) if segments[t] == segment}

            def tokens(i: int, index_of: dict = index_of) -> list[int] | None:
                wanted = range(ratio * i, ratio * i + ratio)
                return [index_of[p] for p in wanted] if i >= 0 and all(p in index_of for p in wanted) else None

            for i in range(max(index_of) // ratio + 1):
                if (own := tokens(i)) is not None:
                    row.append(Block(own, tokens(i - 1), segment, ratio * i))
        found.append(row)
    return found
