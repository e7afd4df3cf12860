"""dMel frames to sound: a vocoder to listen with, without parameters and without claims.

A dMel frame keeps the magnitude of 80 mel bands in 16 steps of 0.6 decades (12 dB), every 50 ms. Lost are the phase, what happens
within a band and within 50 ms, and all loudness between two steps. What comes back is *an approximation*: words are understood
where the levels allow it, voices are not recognised. It shows that a span is the speech that its caption says, in the right
place, unclipped and not reversed. It is not what a trained vocoder would make of the same frames.

1. Levels to magnitudes, ``10^(-7 + 9 level / 15)``; level 0 is silence.
2. Mel bands to the 801 bins of the transform. Given are the bands ``m = f F``, ``F`` the filters, wanted is a spectrum ``f >= 0``: the
   multiplicative update of Lee and Seung (2001), ``f <- f * (m F') / (f F F')``, keeps it positive and never raises the error.
   The pseudo-inverse is one product but rings into negative magnitudes, which sound like bells.
3. Phases by Griffin and Lim (1984), accelerated after Perraudin, Balazs and Søndergaard (2013): back to sound and forth again,
   keep the phase, restore the magnitude. The Hann window of 100 ms overlaps by half, which is the least that can be inverted.

The starting phases are drawn from a fixed seed: the same frames always sound the same. A minute of sound takes a few seconds.
"""

import io
import wave

import numpy as np
from jaxtyping import Int16, UInt8

from v4train.data import media

RATE = media.SAMPLE_RATE
_WINDOW, _HOP = round(media.WINDOW_SECONDS * RATE), round(media.HOP_SECONDS * RATE)
_SPECTRUM_STEPS, _PHASE_STEPS = 40, 32
_MOMENTUM = 0.99
_TINY = 1e-12


def pcm(frames: UInt8[np.ndarray, "n 80"]) -> Int16[np.ndarray, "samples"]:
    """Mono sound of 16 kHz; ``n`` frames become ``(n + 1) * 50`` ms. Loudness is kept unless it would clip."""
    magnitude = _spectrum(_magnitudes(frames))
    signal = _griffin_lim(magnitude)
    peak = float(np.abs(signal).max())
    return np.rint(signal * (32767 / max(1.0, peak / 0.98))).clip(-32768, 32767).astype(np.int16)


def wav(samples: Int16[np.ndarray, "samples"]) -> bytes:
    """A WAV file of mono sound of 16 kHz."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


def _magnitudes(frames: np.ndarray) -> np.ndarray:
    low, high = media.LOG_RANGE
    magnitude = 10.0 ** (low + (high - low) * frames / (media.MEL_LEVELS - 1))
    return np.where(frames == 0, 0.0, magnitude)


def _spectrum(mel: np.ndarray) -> np.ndarray:
    """``f64[n, 80] -> f64[n, 801]``."""
    filters = media.mel_filters(RATE)
    wanted = mel @ filters.T
    spectrum = wanted.copy()
    for _ in range(_SPECTRUM_STEPS):
        spectrum *= wanted / (spectrum @ filters @ filters.T + _TINY)
    return spectrum


def _griffin_lim(magnitude: np.ndarray) -> np.ndarray:
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    before = np.zeros_like(phase)
    for _ in range(_PHASE_STEPS):
        rebuilt = _forward(_backward(magnitude * phase))
        phase = rebuilt + _MOMENTUM * (rebuilt - before)
        phase /= np.abs(phase) + _TINY
        before = rebuilt
    return _backward(magnitude * phase)


def _hann() -> np.ndarray:
    return np.hanning(_WINDOW + 1)[:-1]


def _forward(signal: np.ndarray) -> np.ndarray:
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP] * _hann(), axis=-1)


def _backward(spectrum: np.ndarray) -> np.ndarray:
    """Weighted overlap-add: the signal whose transform is nearest to ``spectrum``."""
    window = _hann()
    frames = np.fft.irfft(spectrum, n=_WINDOW, axis=-1) * window
    halves = frames.reshape(len(frames), 2, _HOP)
    weight = (window**2).reshape(2, _HOP)
    total, scale = np.zeros((len(frames) + 1, _HOP)), np.zeros((len(frames) + 1, _HOP))
    total[:-1] += halves[:, 0]
    total[1:] += halves[:, 1]
    scale[:-1] += weight[0]
    scale[1:] += weight[1]
    return (total / np.maximum(scale, 1e-3)).reshape(-1)
