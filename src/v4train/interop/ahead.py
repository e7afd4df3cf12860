"""Work that is prepared by another thread, one piece ahead of its use: reading and rounding while the piece before is written."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prepared(work: Iterator[Callable[[], T]]) -> Iterator[T]:
    """The results of the calls, in order. Two exist at a time: the one in use, and the one that is being prepared.

    Raises:
        Exception: that of the call whose turn it is.
    """
    waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            for make in work:
                waiting.append(pool.submit(make))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
