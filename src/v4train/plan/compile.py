"""The real training step, compiled for a machine that is not here: its bytes and its collectives, from the compiler and not from a formula.

An estimate knows what we meant; only the compiler knows what it made of it: whether a constraint became a gather of everything, whether
layers are really recomputed, what the padding of tiles costs. So the step that the trainer would run (the caller gives ``lower``) is
lowered for the devices of a topology and compiled as for a run. That needs minutes of a CPU and no accelerator.

What the compilers say when a program does not fit differs: the TPU's refuses it (``CompileTimeHbmOom``), the GPU's makes a program of any
size and warns. Here both become a `Report` whose total is compared with the chip's memory, with the largest buffers by name (`buffers`).

A second thing that is an error of ours and no error of the compiler's: *involuntary full rematerialization*. If the partitioner
finds no way from one sharding to another it makes every device hold the whole array, says so on stderr, and goes on. Where the array is a
table of a few kilobytes, that is right; where it is a stack of weights it is the end of scaling. They are collected (`Report.replicated`).

Everything but the size of the code is known when the compiler has given every value its place. What a TPU's compiler does after that,
writing the program, takes most of its time. `until_buffers` compiles in a process of its own and ends it there: a compiler that runs in a
thread cannot be stopped.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from v4train.core import compiler
from v4train.ops import select
from v4train.plan import buffers, collectives, fp8, targets

_REPLICATED = re.compile(r"Involuntary full rematerialization.*for HLO operation %?[\w.\-]+ = (\S+?)\{?[\d,]*\}? .*?op_name=\"([^\":]*)")
_NOT_FIT = ("CompileTimeHbmOom", "RESOURCE_EXHAUSTED")
_PROGRAM, _ASSIGNMENT = "*after_optimizations.txt", "*buffer-assignment.txt"
_LOWERED, _TOLD, _REFUSED = "lowered", "told", "refused"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one step.

    Attributes:
        target: what it was compiled for.
        devices: in all.
        mesh: axis name -> size.
        arguments: bytes per device of state and batch.
        results: of what is returned in memory of its own; most of the state is given back where it came.
        temporaries: of everything in between.
        code: of the program; 0 if it was not written (`until_buffers`).
        listing: its collectives.
        replicated: arrays that the partitioner made whole on every device because it found no other way, with how often.
        largest: the largest temporaries.
        seconds: to lower and to compile.
        fp8: what multiplies codes of FP8, with the number of its calls (`plan.fp8`); for GPUs.
    """

    target: targets.Target
    devices: int
    mesh: dict[str, int]
    arguments: int
    results: int
    temporaries: int
    code: int
    listing: collectives.Listing
    replicated: dict[tuple[str, str], int]
    largest: tuple[buffers.Buffer, ...]
    seconds: tuple[float, float]
    fp8: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return self.arguments + self.results + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.target.hbm_bytes

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values; bytes are per device."""
        totals = self.listing.totals().items()
        return {
            "target": self.target.name,
            "devices": self.devices,
            "mesh": self.mesh,
            "fits": self.fits,
            "device_bytes": self.target.hbm_bytes,
            "bytes": {
                "total": self.total,
                "arguments": self.arguments,
                "results": self.results,
                "temporaries": self.temporaries,
                "code": self.code,
            },
            "collectives": [{"kind": kind, "axes": list(axes), **dataclasses.asdict(total)} for (kind, axes), total in totals],
            "rounds": [{"loop": loop, "sent_bytes": sent} for loop, sent in self.listing.rounds.items()],
            "replicated": [{"shape": shape, "op": op, "times": n} for (shape, op), n in self.replicated.items()],
            "largest": [dataclasses.asdict(buffer) for buffer in self.largest],
            "fp8_products": self.fp8,
            "seconds": {"lower": round(self.seconds[0], 1), "compile": round(self.seconds[1], 1)},
        }

    def check(self) -> None:
        """Refuses a program that does not fit.

        Raises:
            ValueError: it needs more bytes than a device has; the message names the largest.
        """
        if self.fits:
            return
        lines = [f"  {_gb(b.size):>10}  {b.shape:<28} {b.op_name}" for b in self.largest]
        raise ValueError(
            f"does not fit: {self.target.name} has {_gb(self.target.hbm_bytes)} a device, and the compiled step needs {_gb(self.total)}: "
            f"{_gb(self.arguments)} state and batch, {_gb(self.results)} results, {_gb(self.temporaries)} temporaries. "
            "The largest of these, side by side in memory:\n" + "\n".join(lines) + "\nMake the mesh larger, rows per device "
            "(train.microbatches) or sequence shards (mesh.context) smaller, or recompute more (model.remat)."
        )


def ahead_of_time(target: targets.Target, *, mesh: jax.sharding.Mesh, lower: Callable[[], jax.stages.Lowered]) -> Report:
    """Lowers and compiles a program for the devices of a topology.

    Args:
        target: what the devices are.
        mesh: of `targets.devices`.
        lower: traces and lowers the program on this mesh.

    Raises:
        Exception: from JAX, if the program cannot be compiled for another reason than its size.
    """
    started = time.perf_counter()
    with select.compiling_for(target.platform):
        lowered = lower()
    between = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="v4train-aot-") as directory, _without_cache():
        compiled, told = _compile(lowered, compiler.ahead_of_time(target.platform) | {"xla_dump_to": directory})
        seconds = (between - started, time.perf_counter() - between)
        found = _account(pathlib.Path(directory), target=target, mesh=dict(mesh.shape), told=told, seconds=seconds)
    memory = None if compiled is None else compiled.memory_analysis()
    if memory is None:
        return found
    return dataclasses.replace(
        found,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def until_buffers(
    target: targets.Target, *, mesh: dict[str, int], lower: Callable[[], jax.stages.Lowered], poll_seconds: float = 2.0
) -> Report:
    """As `ahead_of_time`, but ends the compiler when it has given every value its place: all but ``code`` is known then.

    Args:
        target: what the devices are.
        mesh: axis name -> size.
        lower: can be pickled; traces and lowers the program on the target's devices, in another process.
        poll_seconds: between two looks at what the compiler has written.

    Raises:
        ValueError: what ``lower`` raised; or the process ended before, and what it wrote to stderr stands above.
    """
    with tempfile.TemporaryDirectory(prefix="v4train-aot-") as directory:
        dump, started = pathlib.Path(directory), time.time()
        process = multiprocessing.get_context("spawn").Process(target=_compile_into, args=(directory, target, lower))
        process.start()
        try:
            sizes = (0, 0)
            while process.is_alive():
                process.join(poll_seconds)
                before, sizes = sizes, (_size(dump, _PROGRAM), _size(dump, _ASSIGNMENT))
                if all(sizes) and sizes == before and "\nENTRY " in _largest_file(dump, _PROGRAM):
                    break
        finally:
            process.kill()
            process.join()
        if (dump / _REFUSED).exists():
            raise ValueError((dump / _REFUSED).read_text())
        told = (dump / _TOLD).read_text(errors="replace").splitlines() if (dump / _TOLD).exists() else []
        if not _size(dump, _ASSIGNMENT):
            print("\n".join(told), file=sys.stderr)
            raise ValueError(
                f"--target {target.name}: the compiler ended before it knew where the values lie (exit code {process.exitcode})"
            )
        lowered = (dump / _LOWERED).stat().st_mtime
        return _account(dump, target=target, mesh=mesh, told=told, seconds=(lowered - started, time.time() - lowered))


def _compile_into(directory: str, target: targets.Target, lower: Callable[[], jax.stages.Lowered]) -> None:
    """What the process of `until_buffers` does: compiles, and leaves everything that is to be known in ``directory``."""
    dump = pathlib.Path(directory)
    try:
        with select.compiling_for(target.platform):
            lowered = lower()
    except ValueError as e:
        (dump / _REFUSED).write_text(str(e))
        return
    (dump / _LOWERED).touch()
    jax.config.update("jax_enable_compilation_cache", False)
    with (dump / _TOLD).open("w") as file:
        os.dup2(file.fileno(), 2)
        lowered.compile(compiler.ahead_of_time(target.platform) | {"xla_dump_to": directory})


def _account(dump: pathlib.Path, *, target: targets.Target, mesh: dict[str, int], told: list[str], seconds: tuple[float, float]) -> Report:
    """What the compiler's own files say."""
    text = _largest_file(dump, _PROGRAM)
    account = buffers.read(_largest_file(dump, _ASSIGNMENT), program=text)
    return Report(
        target=target,
        devices=math.prod(mesh.values()),
        mesh=mesh,
        arguments=account.arguments,
        results=account.results,
        temporaries=account.temporaries,
        code=0,
        listing=collectives.read(text, mesh=mesh),
        replicated=_replicated(told),
        largest=account.largest,
        seconds=seconds,
        fp8=fp8.products(text),
    )


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any]) -> tuple[jax.stages.Compiled | None, list[str]]:
    """The program, or None if the compiler says that it does not fit; and what it wrote to stderr."""
    told: list[str] = []
    with _listening(told):
        try:
            return lowered.compile(options), told
        except jax.errors.JaxRuntimeError as e:
            if not any(words in str(e) for words in _NOT_FIT):
                raise
            return None, told


def _largest_file(directory: pathlib.Path, pattern: str) -> str:
    """What the compiler wrote about the largest module that it compiled."""
    found = max(directory.glob(pattern), key=lambda path: path.stat().st_size, default=None)
    return "" if found is None else found.read_text()


def _size(directory: pathlib.Path, pattern: str) -> int:
    return max((path.stat().st_size for path in directory.glob(pattern)), default=0)


def _replicated(told: list[str]) -> dict[tuple[str, str], int]:
    """Shape and origin of what the partitioner made whole on every device."""
    found: dict[tuple[str, str], int] = {}
    for line in told:
        if match := _REPLICATED.search(line):
            key = (match[1], match[2])
            found[key] = found.get(key, 0) + 1
    return found


@contextlib.contextmanager
def _listening(told: list[str]) -> Iterator[None]:
    """Collects the lines that the compiler, which is C++, writes to stderr; what is no warning that we read is passed on at the end."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            told += file.read().decode(errors="replace").splitlines()
            for line in told:
                if not _REPLICATED.search(line):
                    print(line, file=sys.stderr)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """A program from the compilation cache comes without the compiler's account of it."""
    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
