"""What makes a conversion keep up with a disk: other threads prepare the next tensors, and matrices are turned in blocks."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# numpy works without Python's lock; each thread holds a tensor.
_THREADS = 2
_BAND = 256


def prepared(work: Iterator[Callable[[], T]]) -> Iterator[T]:
    """The results of the calls, in order. Three exist at a time: the one in use, and two that are being prepared.

    Raises:
        Exception: that of the call whose turn it is.
    """
    waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            for make in work:
                waiting.append(pool.submit(make))
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def contiguous(x: np.ndarray) -> np.ndarray:
    """A copy in C order of what may be a view of a turned matrix; the array itself if it is in C order.

    numpy reads a turned matrix column by column, a cache line for each element; in bands of rows of the original both sides stay in the
    cache. 10 to 20 times faster for the matrices of an expert.
    """
    if x.ndim != 2 or x.flags.c_contiguous:
        return np.asarray(x, order="C")
    out = np.empty(x.shape, x.dtype)
    for start in range(0, x.shape[1], _BAND):
        out[:, start : start + _BAND] = x[:, start : start + _BAND]
    return out
