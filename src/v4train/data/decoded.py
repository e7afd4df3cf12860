"""Documents that must be decoded as a whole before a part of one can be used, and the latest of them in memory.

A long document is cut into consecutive rows, and a small store goes through many epochs: decoding anew for every piece would repeat the
work. The memory is bounded in bytes, because documents differ by a factor of a million; the latest one is kept whatever its size.
"""

import collections
import threading
from collections.abc import Callable

import numpy as np

from v4train.data import document as document_lib


def size_of(document: document_lib.Document) -> int:
    """Bytes of a decoded document, with what Python needs to hold it."""
    return 1000 + sum(a.nbytes for a in (document.tokens, document.spans, document.patches, document.patch_xy, document.audio))


class Latest:
    """The documents that were decoded last, up to some bytes. Thread-safe."""

    def __init__(self, capacity_bytes: int):
        self.capacity_bytes = capacity_bytes
        self._held: collections.OrderedDict[int, document_lib.Document] = collections.OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, i: int) -> document_lib.Document | None:
        """Document ``i`` if it is held."""
        with self._lock:
            document = self._held.get(i)
            if document is not None:
                self._held.move_to_end(i)
            return document

    def put(self, i: int, document: document_lib.Document) -> None:
        """Holds a document, at the cost of those that were not used for the longest time."""
        with self._lock:
            if i in self._held:
                return
            self._held[i] = document
            self._bytes += size_of(document)
            while self._bytes > self.capacity_bytes and len(self._held) > 1:
                self._bytes -= size_of(self._held.popitem(last=False)[1])


def read_pieces(
    read: Callable[[int], document_lib.Document], documents: np.ndarray, starts: np.ndarray, stops: np.ndarray, *, out: np.ndarray
) -> dict[int, document_lib.DamagedRecordError]:
    """Tokens ``starts:stops`` of whole documents, one piece after another, into ``out``; which pieces failed, and why."""
    done, bad = 0, {}
    for i, (number, start, stop) in enumerate(zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True)):
        try:
            out[done : done + stop - start] = read(number).tokens[start:stop]
        except document_lib.DamagedRecordError as error:
            bad[i] = error
        done += stop - start
    return bad


def copy_span(document: document_lib.Document, k: int, *, skip: int, values: np.ndarray, xy: np.ndarray | None) -> None:
    """Payload ``skip : skip + len(values)`` of the document's span number ``k`` into ``values`` and, of an image, ``xy``."""
    kind = document.spans["kind"][k]
    first = int(document.spans["n"][:k][document.spans["kind"][:k] == kind].sum()) + skip
    if kind == document_lib.IMAGE:
        values[...] = document.patches[first : first + len(values)]
        if xy is not None:
            xy[...] = document.patch_xy[first : first + len(values)]
    else:
        values[...] = document.audio[first : first + len(values)]
