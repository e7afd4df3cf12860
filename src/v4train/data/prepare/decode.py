"""Image and sound files, as they come, to patches and dMel frames.

* **Image**: upright (EXIF), on a background where it is transparent, scaled once by Lanczos onto the grid of patches that
  `media.fit_grid` chooses. JPEGs are decoded at a reduced scale where that suffices, which is 2 to 4 times faster.
* **Sound**: channels are averaged and any rate is resampled to 16 kHz, because mel bands are defined there: dMel of 48 kHz sound without
  resampling would have other magnitudes for the same loudness.

Whatever a file does to the library that reads it is a `BadMediaError`: the file is at fault, not the program. The sizes are read from
the header first, so that a file that claims a billion pixels costs nothing.
"""

import contextlib
import importlib.util
import io
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np

from v4train.data import media
from v4train.data.prepare import config as config_lib

LIBRARIES = {"image": ("PIL",), "audio": ("soundfile", "soxr")}
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # by a quarter


class BadMediaError(ValueError):
    """An image or a sound that cannot become tokens; says why."""


class OverLimitError(BadMediaError):
    """An image or a sound that is larger than the spec wants: a filter, whose name this is, and no fault of the file."""


def check_extras(kinds: set[config_lib.Kind]) -> None:
    """Whether the libraries that these kinds of media need are there.

    Raises:
        ValueError: one is not installed.
    """
    needed = [name for kind, names in LIBRARIES.items() if kind in kinds for name in names]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{' and '.join(sorted(kinds - {'text'}))} need {', '.join(missing)}, not installed here"
        raise ValueError(f"{message}: run `pip install 'v4train[prepare]'`")


def image(source: bytes | pathlib.Path, *, config: config_lib.ImageConfig) -> media.Patches:
    """An image file as patches.

    Raises:
        BadMediaError: not an image, damaged, or too large.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            with _no_limit(), PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
                pixels = _pixels(file, config=config)
    except BadMediaError:
        raise
    except FileNotFoundError as error:
        raise BadMediaError(f"there is no file {error.filename}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything for a damaged file
        raise BadMediaError(f"unreadable image: {_first_line(error)}") from None
    return media.image_to_patches(pixels, patch=config.patch)


@contextlib.contextmanager
def _no_limit() -> Iterator[None]:
    """Without the library's own limit, at which it raises before `_pixels` can ask for the spec's."""
    import PIL.Image

    before = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


def _pixels(file, *, config: config_lib.ImageConfig) -> np.ndarray:
    import PIL.Image
    import PIL.ImageOps

    stored = file.size
    if stored[0] * stored[1] > config.max_pixels:
        raise OverLimitError("image.max_pixels")
    if file.mode in ("I", "F"):  # converting would cut them off at 0 and 255: black or white
        raise BadMediaError("unreadable image: its pixels are 32-bit numbers, whose range nobody states")
    turned = file.getexif().get(_ORIENTATION, 1) in _TURNED
    width, height = stored[::-1] if turned else stored
    columns, rows = media.fit_grid(width, height, patch=config.patch, max_patches=config.max_patches, upscale=config.upscale == "to_budget")
    size = (columns * config.patch, rows * config.patch)
    if file.format == "JPEG":
        # Half again as large as needed: the exact scaling below still decides how it looks.
        ample = (size[0] * 3 // 2, size[1] * 3 // 2)
        file.draft(None, ample[::-1] if turned else ample)
    upright = PIL.ImageOps.exif_transpose(file)
    if upright.mode.startswith("I;16"):
        upright = PIL.Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, (*config.background, 255)), layer)
    return np.asarray(upright.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS))


def sound(source: bytes | pathlib.Path, *, config: config_lib.SoundConfig) -> np.ndarray:
    """A sound file as dMel frames, ``u8[n, 80]``.

    Raises:
        BadMediaError: not a sound, damaged, empty or too long.
    """
    import soundfile
    import soxr

    if isinstance(source, pathlib.Path) and not source.is_file():
        raise BadMediaError(f"there is no file {source}")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            rate, frames = file.samplerate, file.frames
            if frames > config.max_seconds * rate:
                raise OverLimitError("audio.max_seconds")
            samples = file.read(dtype="float32", always_2d=True)
    except BadMediaError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # libsndfile's errors and its reader's
        raise BadMediaError(f"unreadable sound: {_first_line(error)}") from None
    if len(samples) < frames:
        raise BadMediaError(f"unreadable sound: it ends after {len(samples)} of {frames} samples")
    if not len(samples):
        raise BadMediaError("a sound without samples")
    channels = samples.shape[1]
    # `mean` over an axis of two elements is several times slower.
    mono = sum((samples[:, i] for i in range(1, channels)), start=samples[:, 0]) / channels
    if not np.isfinite(mono).all():
        raise BadMediaError("a sound with samples that are not numbers")
    return media.dmel(mono if rate == media.SAMPLE_RATE else soxr.resample(mono, rate, media.SAMPLE_RATE, quality="HQ"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
