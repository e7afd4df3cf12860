"""Where a stream of documents is cut into rows: the three packing policies, as functions of lengths and media spans alone.

``split_text_keep_spans``
    The documents are one long text; a row is the next S tokens of it. A cut moves back to the start of a media span that it would fall
    into, and a row is closed early when the next span would exceed its budget of patches or audio frames. Text has no padding at all.
    The tokens that delimit a span go with it: a row that ends with a lone start of an image asks the model to predict what is in
    another row. (Only of a span that fills a row with less than two places to spare they are left to the neighbours.)
``no_split``
    A document is never cut. Best fit decreasing: documents, largest first, go to the row with the least room for tokens that still
    takes them, patches and frames included. Text needs at most 11/9 of the optimal rows (Johnson 1973), and with the many short
    documents of a corpus practically none too many. Large is the sum of the shares that a document takes of a row's three limits: by
    tokens alone, short captions of large images would be left to the end, and fill rows with patches that are half empty of tokens
    (measured: 92 % of places used, and 97 % by the sum). A document that no row can hold is cut as above; its last part is packed
    like a short document.
``one_document``
    A row is a document, or a part of one that is longer than a row.

Best fit looks at a window of documents (`plan` decides which) and not at an endless queue of open rows: so a row is a pure function of
its window. Rejected for the same reason: first-fit and best-fit iterators with open bins, whose content is state, and which need
all bins' rows in memory. Next fit, which closes a row at the first document that does not fit, is random access too but pads 5 to 40 %.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from v4train.data import document as document_lib

Policy = Literal["split_text_keep_spans", "no_split", "one_document"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows are cut: their length S, their budgets P and A, the seed of the order, and what may be cut."""

    sequence_length: int
    max_patches: int
    max_audio_frames: int
    seed: int
    policy: Policy = "split_text_keep_spans"

    @property
    def limits(self) -> tuple[int, int, int]:
        """Tokens, patches and audio frames of a row."""
        return self.sequence_length, self.max_patches, self.max_audio_frames


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Media of a stream. A budget counts payload, so the tokens of each kind are summed up beside their places.

    Attributes:
        at: first token that goes with each span, in stream coordinates: its own first, or its delimiter.
        end: the last, plus 1.
        used: by kind, tokens of that kind in the spans before each; one entry more than there are spans.
    """

    at: Int64[np.ndarray, "spans"]
    end: Int64[np.ndarray, "spans"]
    used: dict[int, Int64[np.ndarray, "spans_1"]]

    @classmethod
    def of(cls, kind: np.ndarray, *, at: np.ndarray, n: np.ndarray) -> "Spans":
        """From kind, first token and length of each span, in order."""
        kinds = (document_lib.IMAGE, document_lib.AUDIO)
        return cls(at, at + n, {which: np.concatenate([[0], np.cumsum(np.where(kind == which, n, 0))]) for which in kinds})

    def delimited(self, which: np.ndarray, *, low: np.ndarray, high: np.ndarray, longest: int) -> "Spans":
        """With the tokens around them.

        Args:
            which: ``bool[spans]``, those that have delimiters.
            low: ``i64[spans]``, where the document (or the part of it) begins that the span is in.
            high: where it ends.
            longest: spans that would have more tokens than this stay as they are.
        """
        which = which & (self.end - self.at + 2 <= longest)
        previous, following = np.append(0, self.end[:-1]), np.append(self.at[1:], high[-1:])
        at = np.maximum(self.at - which, np.maximum(low, previous))
        end = np.minimum(self.end + which, np.minimum(high, following))
        # A single token between two spans goes with the first.
        return Spans(np.maximum(at, np.append(0, end[:-1])), end, self.used)

    def inside(self, cuts: np.ndarray) -> Int64[np.ndarray, "parts 2"]:
        """Patches and frames between consecutive cuts, none of which falls into a span."""
        spans = np.searchsorted(self.at, cuts)
        return np.stack([np.diff(used[spans]) for used in self.used.values()], axis=-1)


def cut_anywhere(starts: np.ndarray, *, spans: Spans | None, packing: Packing, begin: int = 0, end: int | None = None) -> np.ndarray:
    """``i64[rows + 1]``: where rows of ``split_text_keep_spans`` begin, and the end.

    Args:
        starts: ``i64[documents + 1]``, where each begins in the stream.
        spans: media, or None where there are none.
        packing: the limits.
        begin: first token to look at.
        end: the last, plus 1; by default all.
    """
    length, total = packing.sequence_length, int(starts[-1]) if end is None else end
    if spans is None:
        return np.minimum(np.arange(begin, total + length, length), total)
    budgets = [(_view(used), budget) for used, budget in zip(spans.used.values(), packing.limits[1:], strict=True) if used[-1]]
    span_at, span_end = _view(spans.at), _view(spans.end)
    cuts, many = [begin], len(spans.at)
    while begin < total:
        stop = min(begin + length, total)
        first = bisect.bisect_left(span_at, begin)
        for used, budget in budgets:
            last = bisect.bisect_right(used, used[first] + budget) - 1  # spans before `last` fit
            if last < many:
                stop = min(stop, span_at[last])
        span = bisect.bisect_left(span_at, stop) - 1
        if span >= 0 and stop < span_end[span]:
            stop = span_at[span]
        assert stop > begin, "a span that no row can hold passed the check"
        cuts.append(stop)
        begin = stop
    return np.array(cuts, np.int64)


def cut_documents(starts: np.ndarray, *, spans: Spans | None, packing: Packing) -> np.ndarray:
    """``i64[parts + 1]``: the starts of the documents, and cuts inside of those that no row can hold."""
    sizes = _sizes(starts, spans)
    too_large = np.flatnonzero((sizes > packing.limits[: sizes.shape[1]]).any(axis=1))
    if not len(too_large):
        return starts
    ends = [(int(starts[i]), int(starts[i + 1])) for i in too_large]
    inside = [cut_anywhere(starts, spans=spans, packing=packing, begin=a, end=b)[1:-1] for a, b in ends]
    return np.sort(np.concatenate([starts, *inside]))


def best_fit(cuts: np.ndarray, *, spans: Spans | None, packing: Packing) -> Int64[np.ndarray, "parts"]:
    """The row, from 0, of each part of a stream between consecutive cuts. Ties: the earlier part, the row that was opened first."""
    sizes = _sizes(cuts, spans)
    order = np.argsort(-sizes @ _weights(packing.limits)[: sizes.shape[1]], kind="stable")
    row_of = np.empty(len(order), np.int64)
    row_of[order] = (_best_fit_of_text if not sizes[:, 1:].any() else _best_fit_of_media)(sizes[order], packing.limits)
    return row_of


def _weights(limits: tuple[int, int, int]) -> np.ndarray:
    """What makes tokens, patches and frames shares of a row, times one large number, in integers."""
    whole = [max(1, limit) for limit in limits]
    scale = min(math.lcm(*whole), 2**60)
    return np.array([scale // limit for limit in whole], np.int64)


def _best_fit_of_text(sizes: np.ndarray, limits: tuple[int, int, int]) -> list[int]:
    """Rows of parts that come largest first: a binary search each."""
    found, rows, shortest = [], 0, int(sizes[-1, 0])
    # An open row is one number, its room times 2^32 plus its name, so that a list of numbers is sorted by both.
    open_rows: list[int] = []
    for need in sizes[:, 0].tolist():
        at = bisect.bisect_left(open_rows, need << 32)
        if at < len(open_rows):
            key = open_rows.pop(at)
        else:
            key, rows = (limits[0] << 32) + rows, rows + 1
        found.append(key & 0xFFFFFFFF)
        key -= need << 32
        if key >> 32 >= shortest:
            bisect.insort(open_rows, key)
    return found


def _best_fit_of_media(sizes: np.ndarray, limits: tuple[int, int, int]) -> list[int]:
    """The same with three limits: of the rows sorted by their room for tokens, the first with room for the media too.

    A row is in up to four sorted lists: of all rows, of those that can still take some image, some sound, or both. A part looks in the
    list of what it needs. Without that, the rows whose patches are used up would be looked at again for every image.
    """
    found, rows = [], 0
    least = [int(column[column > 0].min(initial=limit + 1)) for column, limit in zip(sizes.T, limits, strict=True)]
    shortest = int(sizes[:, 0].min())
    lists: list[list[int]] = [[], [], [], []]
    patches_left: list[int] = []
    frames_left: list[int] = []
    for tokens, patches, frames in sizes.tolist():
        here = lists[(patches > 0) + 2 * (frames > 0)]
        for at in range(bisect.bisect_left(here, tokens << 32), len(here)):
            name = here[at] & 0xFFFFFFFF
            if patches_left[name] >= patches and frames_left[name] >= frames:
                key = here[at]
                for kinds in _kinds_of(patches_left[name] >= least[1], frames_left[name] >= least[2]):
                    del lists[kinds][bisect.bisect_left(lists[kinds], key)]
                break
        else:
            key, name, rows = (limits[0] << 32) + rows, rows, rows + 1
            patches_left.append(limits[1])
            frames_left.append(limits[2])
        found.append(name)
        key -= tokens << 32
        patches_left[name] -= patches
        frames_left[name] -= frames
        if key >> 32 >= shortest:
            for kinds in _kinds_of(patches_left[name] >= least[1], frames_left[name] >= least[2]):
                bisect.insort(lists[kinds], key)
    return found


def _kinds_of(images: bool, sounds: bool) -> tuple[int, ...]:
    """The lists that a row is in: of everything, of what takes images (1), sounds (2), both (3)."""
    return ((0,), (0, 1), (0, 2), (0, 1, 2, 3))[images + 2 * sounds]


def _sizes(cuts: np.ndarray, spans: Spans | None) -> Int64[np.ndarray, "parts sizes"]:
    """Tokens, and with media also patches and frames, of the parts between consecutive cuts."""
    lengths = np.diff(cuts)[:, None]
    return lengths if spans is None else np.concatenate([lengths, spans.inside(cuts)], axis=1)


def _view(array: np.ndarray) -> Sequence[int]:
    """For `bisect`: five times faster than `searchsorted` for one number, and no copy as a list would be."""
    return np.ascontiguousarray(array).data
