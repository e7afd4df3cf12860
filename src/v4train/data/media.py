"""Images to patches and speech to dMel frames, in plain numpy.

Both are deterministic and training-free, so they run once, when a store is built; a training run reads bytes and the model casts
them on the device.

* **Image**: the pixels are cut into p x p squares; a patch is its ``3 p^2`` bytes in row, column, channel order, and ``(x, y)`` is
  its column and row in the grid of patches. `fit_grid` chooses the grid; the scaling is for whoever decodes the image.
* **Audio (dMel)**: 80 mel bands between 0 and 8 kHz every 50 ms over a Hann window of 100 ms, ``log10`` of the magnitude, clamped
  to [-7, 2] and quantised to 16 levels, one byte each. (He Bai et al., "dMel: Speech Tokenization made Simple", 2407.15835.) Raw
  waveforms would cost 640 samples a token and learned codecs a second model; both are rejected as the default.
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8

SAMPLE_RATE = 16_000  # Hz
MEL_CHANNELS = 80
MEL_LEVELS = 16
HOP_SECONDS = 0.05
WINDOW_SECONDS = 0.1
LOG_RANGE = (-7.0, 2.0)  # log10 of the mel magnitude


@dataclasses.dataclass(frozen=True)
class Patches:
    """An image as the model reads it: ``values u8[n, 3p^2]`` and their grid coordinates ``xy i16[n, 2]``."""

    values: UInt8[np.ndarray, "n patch"]
    xy: Int16[np.ndarray, "n 2"]


def fit_grid(width: int, height: int, *, patch: int, max_patches: int, upscale: bool = False) -> tuple[int, int]:
    """Columns and rows of patches that an image is scaled to: at most ``max_patches``, with nearly its proportions.

    The image is scaled by one factor to the budget's area (never enlarged, unless ``upscale``), and both sides are rounded to whole
    patches; if the product then exceeds the budget, the side is shortened whose shortening changes the proportions least. A
    strip longer than the whole budget keeps one row and loses length.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        patch: side of a patch, pixels.
        max_patches: the budget.
        upscale: enlarge a small image to its budget.
    """
    assert width > 0
    assert height > 0
    scale = math.sqrt(max_patches * patch * patch / (width * height))
    scale = scale if upscale else min(1.0, scale)
    columns = min(max_patches, max(1, round(width * scale / patch)))
    rows = min(max_patches, max(1, round(height * scale / patch)))
    while columns * rows > max_patches:
        wanted = math.log(width / height)
        narrower = abs(math.log((columns - 1) / rows) - wanted) if columns > 1 else math.inf
        lower = abs(math.log(columns / (rows - 1)) - wanted) if rows > 1 else math.inf
        columns, rows = (columns - 1, rows) if narrower <= lower else (columns, rows - 1)
    return columns, rows


def image_to_patches(image: UInt8[np.ndarray, "height width 3"], *, patch: int) -> Patches:
    """Cuts an RGB image into squares of ``patch`` pixels, row by row.

    Raises:
        ValueError: not ``u8[height, width, 3]``, or a side that is not a multiple of ``patch``.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image is u8[height, width, 3], got {image.dtype}{list(image.shape)}: convert it to 8-bit RGB first")
    height, width = image.shape[0] // patch, image.shape[1] // patch
    if (height * patch, width * patch) != image.shape[:2] or not height * width:
        raise ValueError(f"an image of {image.shape[1]} x {image.shape[0]} pixels is not whole patches of {patch} pixels: resize it")
    values = image.reshape(height, patch, width, patch, 3).swapaxes(1, 2).reshape(height * width, 3 * patch * patch)
    y, x = np.divmod(np.arange(height * width, dtype=np.int16), np.int16(width))
    return Patches(values=np.ascontiguousarray(values), xy=np.stack([x, y], axis=-1))


def patches_to_image(patches: Patches) -> UInt8[np.ndarray, "height width 3"]:
    """The inverse of `image_to_patches`."""
    patch = round((patches.values.shape[1] / 3) ** 0.5)
    width, height = patches.xy.astype(np.int64).max(axis=0) + 1
    return patches.values.reshape(height, width, patch, patch, 3).swapaxes(1, 2).reshape(height * patch, width * patch, 3)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """The HTK mel scale."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@functools.cache
def mel_filters(sample_rate: int) -> Float[np.ndarray, "bins channels"]:
    """Triangles, equally wide in mel, each of unit area in Hz, over the bins of a 100 ms transform."""
    window = round(WINDOW_SECONDS * sample_rate)
    frequency = np.arange(window // 2 + 1) * sample_rate / window
    top = 2595.0 * np.log10(1.0 + min(sample_rate / 2, SAMPLE_RATE / 2) / 700.0)
    edges = mel_to_hz(np.linspace(0.0, top, MEL_CHANNELS + 2))
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequency[:, None] - left) / (centre - left)
    falling = (right - frequency[:, None]) / (right - centre)
    return np.clip(np.minimum(rising, falling), 0.0, None) * (2.0 / (right - left))


def dmel(pcm: Float[np.ndarray, "samples"] | Int[np.ndarray, "samples"], *, sample_rate: int = SAMPLE_RATE) -> UInt8[np.ndarray, "n 80"]:
    """Quantised log-mel frames of mono sound; ints are 16-bit, floats in [-1, 1]. The last frame is padded with silence.

    Raises:
        ValueError: not one channel, nothing in it, or a rate below 8 kHz.
    """
    if pcm.ndim != 1 or not pcm.size:
        raise ValueError(f"sound is one channel of samples, got shape {list(pcm.shape)}: mix it down first")
    if sample_rate < SAMPLE_RATE // 2:
        raise ValueError(f"a sample rate of {sample_rate} Hz is too low for 80 mel bands: resample to {SAMPLE_RATE} Hz")
    signal = pcm.astype(np.float64) / (32768.0 if pcm.dtype.kind == "i" else 1.0)
    window, hop = round(WINDOW_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)
    frames = max(0, -(-(len(signal) - window) // hop)) + 1
    signal = np.pad(signal, (0, (frames - 1) * hop + window - len(signal)))
    framed = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop]
    magnitude = np.abs(np.fft.rfft(framed * np.hanning(window + 1)[:-1], axis=-1))
    low, high = LOG_RANGE
    log_mel = np.clip(np.log10(np.maximum(magnitude @ mel_filters(sample_rate), 10.0**low)), low, high)
    return np.rint((log_mel - low) / (high - low) * (MEL_LEVELS - 1)).astype(np.uint8)
