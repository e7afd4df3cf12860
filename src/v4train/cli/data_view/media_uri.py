"""Pictures and sounds as ``data:`` addresses, so that a page needs no second file.

Pictures are PNG, which keeps every byte. An 8-bit PNG takes no more than the standard library's zlib, so no imaging library is needed.
"""

import base64
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

from v4train.data.inspection import rows as rows_lib
from v4train.data.inspection import sound

_GREY, _RGB = 0, 2  # PNG's colour types


def png(pixels: UInt8[np.ndarray, "height width 3"] | UInt8[np.ndarray, "height width"]) -> bytes:
    """A PNG file of exactly these pixels."""
    height, width = pixels.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), np.ascontiguousarray(pixels).reshape(height, -1)], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, _RGB if pixels.ndim == 3 else _GREY, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def picture(image: rows_lib.Image) -> str:
    """The address of an image."""
    return _address("image/png", png(image.pixels))


def spectrogram(part: rows_lib.Sound) -> str:
    """The address of a picture of dMel levels: time to the right, frequency upwards, white is loud."""
    return _address("image/png", png((part.frames.T[::-1] * 17).astype(np.uint8)))


def speech(part: rows_lib.Sound) -> str:
    """The address of the sound, as `sound.pcm` approximates it."""
    return _address("audio/wav", sound.wav(sound.pcm(part.frames)))


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
