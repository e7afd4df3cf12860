"""Whether a program compiled for a GPU multiplies in FP8 units: by the instructions in its machine code, not by what we asked for.

A product of FP8 codes can be lost on the way: a compiler may convert the codes and multiply in bf16, and the numbers would be the same.
What it cannot hide is the instruction. The GPU's compiler leaves the program in PTX, where tensor cores are told the types of both factors:
``wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3`` on Hopper, ``mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32`` before.
XLA's own FP8 matmuls are calls of cuBLASLt and stand in the program's text: ``__cublas$lt$matmul$f8``.
"""

import pathlib
import re

_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.\S*e4m3\.e4m3")
_ENTRY = re.compile(r"\.entry\s+([\w$.]+)")
_CALL = "__cublas$lt$matmul$f8"


def kernels(directory: pathlib.Path, *, program: str) -> dict[str, int]:
    """Kernel -> how many instructions on FP8 codes it has; library calls are under the library's name.

    Args:
        directory: where the compiler has left its PTX (``xla_dump_to``).
        program: the compiled program's text.
    """
    found: dict[str, int] = {}
    for file in sorted(directory.glob("*.ptx")):
        kernel = ""
        for line in file.read_text(errors="replace").splitlines():
            if entry := _ENTRY.search(line):
                kernel = entry[1]
            if _INSTRUCTION.search(line):
                found[kernel] = found.get(kernel, 0) + 1
    calls = program.count(f'custom_call_target="{_CALL}"')
    return found | ({_CALL: calls} if calls else {})
