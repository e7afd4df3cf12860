"""How many bytes of UTF-8 each id of a tokenizer stands for, so that losses of models with different vocabularies can be compared.

An id cannot simply be decoded: alone, a part of a character is no UTF-8 and becomes the replacement character, which has 3 bytes, and some
decoders drop the space before a first word. So the file is asked what its ids are:

* byte-level BPE (DeepSeek, GPT, Llama 3): every character of a token's name is one byte;
* byte fallback (Llama 2, Gemma): a token ``<0xE4>`` is one byte, and others are decoded;
* all others are decoded behind another token, whose own text is taken off.

Ids that stand apart from text (specials, added tokens: see `tokenizer`) are 0 bytes.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int32

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def of_file(content: dict[str, Any], *, vocab: dict[str, int], size: int, decode: Callable[[list[int]], str]) -> Int32[np.ndarray, "v"]:
    """Bytes of each id.

    Args:
        content: the parsed tokenizer.json.
        vocab: text ids by name, without added tokens.
        size: number of all ids.
        decode: ids to text.
    """
    counts = np.zeros(size, np.int32)
    control = {token["id"] for token in content.get("added_tokens") or []}
    kinds = {step.get("type") for step in _steps(content.get("decoder"))}
    names = {i: name for name, i in vocab.items() if i not in control}
    if "ByteLevel" in kinds:
        for i, name in names.items():
            counts[i] = len(name)
        return counts
    anchor = next((i for i, name in names.items() if name.isascii() and name.isalnum()), None)
    before = [] if anchor is None else [anchor]
    own = len(decode(before).encode()) if before else 0
    for i, name in names.items():
        byte = "ByteFallback" in kinds and _BYTE.fullmatch(name)
        counts[i] = 1 if byte else max(len(decode([*before, i]).encode()) - own, 0)
    return counts


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's parts, without nesting."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", []) for step in _steps(inner)]
    return [decoder]
