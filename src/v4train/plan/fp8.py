"""Whether a program compiled for a GPU multiplies codes of FP8: by what stands in the program, not by what we asked for.

A product of FP8 codes can be lost on the way: emulated, it multiplies their values in bf16, and the numbers are the same. Two things in a
compiled program multiply codes: a kernel of ours (Triton's) that takes two arrays of them, and the library's FP8 matmul. Products that were
emulated take none.

It does not look into the kernel: that Triton makes ``wgmma`` of 8 bits of its dot is the compiler's business, and is not shown.
"""

import re

_KERNEL = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton", operand_layout_constraints=\{(.*?)\}, api_version.*?op_name="([^"]*)"')
_LIBRARY = re.compile(r'custom_call_target="(__cublas\$lt\$matmul\$f8)"')
_CODES = "f8e4m3fn["


def products(program: str) -> dict[str, int]:
    """Name of a kernel or library function that multiplies arrays of E4M3 -> how often the program calls it.

    Args:
        program: the compiled program's text.
    """
    found: dict[str, int] = {}
    for operands, path in _KERNEL.findall(program):
        if operands.count(_CODES) >= 2:
            name = path.split("/")[-2] if path.endswith("/pallas_call") else path
            found[name] = found.get(name, 0) + 1
    for name in _LIBRARY.findall(program):
        found[name] = found.get(name, 0) + 1
    return found
