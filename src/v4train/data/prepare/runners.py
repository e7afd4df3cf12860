"""Who does the jobs: this process, processes of this machine, or a Ray cluster. The results do not depend on it.

A runner takes a function and jobs and yields results as they are done, in any order. Only a few jobs are handed out ahead, so that a
million of them cost nothing. Workers are spawned, never forked: a fork of a process with threads may inherit a locked lock.

A worker whose parent was killed must go, or it would write into a directory that somebody else has taken over: it waits for the
parent's end in a thread, and leaves at once.
"""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from v4train.data.prepare import part

J = TypeVar("J")
R = TypeVar("R")
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} | {"TOKENIZERS_PARALLELISM": "false"}
_REPORT_SECONDS = 0.25
_counters: Any = None  # in a worker: records, tokens and bytes of all workers, in shared memory


class Live:
    """Counts of work in progress, shared with the workers of this machine."""

    def __init__(self, context: Any):
        self.shared = context.Array("q", 3)

    def read(self) -> part.Advance:
        with self.shared.get_lock():
            return part.Advance(*self.shared)


def here(function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    """Does the jobs in this process, one after another."""
    for job in jobs:
        yield function(job)


def processes(
    function: Callable[[J], R], jobs: Iterable[J], *, workers: int, watch: Callable[[Live], None] = lambda _: None
) -> Iterator[R]:
    """Does the jobs in processes of this machine.

    Args:
        function: at the top of a module.
        jobs: its arguments.
        workers: number of processes.
        watch: called about four times a second with counts of the work in progress.

    Raises:
        ValueError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    live = Live(context)
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(live.shared,))
    waiting: set[concurrent.futures.Future] = set()
    try:
        with _one_thread_each():
            for job in jobs:
                waiting.add(pool.submit(function, job))
                while len(waiting) >= 2 * workers:
                    yield from _finished(waiting, live, watch)
            while waiting:
                yield from _finished(waiting, live, watch)
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError(
            "a worker process died, most likely for want of memory: free some, or use fewer `workers`, then run the same command again; "
            "what was finished is kept"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()) if waiting else ():
            process.kill()  # stopped early: what they are at is lost in any case (Python 3.14 has `kill_workers` for this)
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: set[concurrent.futures.Future], live: Live, watch: Callable[[Live], None]) -> Iterator[Any]:
    done, _ = concurrent.futures.wait(waiting, timeout=_REPORT_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED)
    watch(live)
    for future in done:
        waiting.discard(future)
        yield future.result()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Libraries in the workers use one thread: the workers are as many as there are cores, and sums are added in one order."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _begin(shared: Any) -> None:
    global _counters
    _counters = shared
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class Meter:
    """Adds what a worker does to the shared counts, a few times a second."""

    def __init__(self) -> None:
        self._sums, self._last = [0, 0, 0], time.monotonic()

    def __call__(self, step: part.Advance) -> None:
        for i, value in enumerate((step.records, step.tokens, step.size)):
            self._sums[i] += value
        if _counters is not None and time.monotonic() - self._last > _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Adds what has not been added yet."""
        if _counters is not None:
            with _counters.get_lock():
                for i, value in enumerate(self._sums):
                    _counters[i] += value
        self._sums, self._last = [0, 0, 0], time.monotonic()


def write_part(job: part.Job) -> part.Report:
    """`part.write`, with its progress told to the parent."""
    meter = Meter()
    report = part.write(job, advance=meter)
    meter.flush()
    return report


def ray_tasks(function: Callable[[J], R], jobs: Iterable[J], *, workers: int) -> Iterator[R]:
    """Does the jobs as Ray tasks, one CPU each; the output directory and the inputs must be on a file system that all nodes see.

    Connects to the cluster that ``RAY_ADDRESS`` names, or starts one on this machine with ``workers`` CPUs.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--runner ray needs Ray, which is not installed: run `pip install 'v4train[ray]'`") from None
    started = not ray.is_initialized()
    if started:
        options = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, runtime_env={"env_vars": _ONE_THREAD}, **options)
    try:
        remote = ray.remote(num_cpus=1)(function)
        ahead = 2 * int(ray.cluster_resources().get("CPU", workers))
        waiting: list = []
        for job in jobs:
            waiting.append(remote.remote(job))
            if len(waiting) >= ahead:
                done, waiting = ray.wait(waiting)
                yield from ray.get(done)
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    finally:
        if started:
            ray.shutdown()
