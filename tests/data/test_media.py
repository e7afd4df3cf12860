"""Patches and dMel against slow, independent computations."""

import numpy as np
import pytest

from v4train.data import media


def test_patches_are_the_squares_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    patches = media.image_to_patches(image, patch=2)
    assert patches.values.shape == (12, 12)
    for value, (x, y) in zip(patches.values, patches.xy.tolist(), strict=True):
        np.testing.assert_array_equal(value, image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel())
    np.testing.assert_array_equal(media.patches_to_image(patches), image)


def test_an_image_that_is_not_whole_patches_is_refused():
    with pytest.raises(ValueError, match="7 x 6 pixels is not whole patches of 2"):
        media.image_to_patches(np.zeros((6, 7, 3), np.uint8), patch=2)
    with pytest.raises(ValueError, match="8-bit RGB"):
        media.image_to_patches(np.zeros((6, 8), np.uint8), patch=2)


def test_the_grid_of_an_image_fits_its_budget_and_its_proportions():
    """Within the budget, no larger than the image, nearly its proportions and most of the budget."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(x) for x in rng.integers(1, 3000, 2))
        budget = int(rng.integers(1, 200))
        columns, rows = media.fit_grid(width, height, patch=16, max_patches=budget)
        assert 1 <= columns * rows <= budget
        assert columns <= max(1, round(width / 16))
        assert rows <= max(1, round(height / 16))
        if width * height > 256 * budget and 0.5 < width / height < 2 and budget > 20:
            assert columns * rows > 0.7 * budget
            assert abs(np.log(columns / rows) - np.log(width / height)) < 0.35
    assert media.fit_grid(32, 16, patch=16, max_patches=100) == (2, 1)
    assert media.fit_grid(32, 16, patch=16, max_patches=32, upscale=True) == (8, 4)
    assert media.fit_grid(200, 800, patch=16, max_patches=12) == (2, 6), "not 1 x 7, which is further from 1 : 4"
    assert media.fit_grid(800, 200, patch=16, max_patches=12) == (6, 2)
    assert media.fit_grid(10000, 1, patch=16, max_patches=10) == (10, 1)


def dmel_by_definition(signal: np.ndarray, *, rate: int) -> np.ndarray:
    """One frame and one band at a time, with a discrete Fourier transform written out."""
    window, hop = rate // 10, rate // 20
    n = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82)
    edges = 700 * (10 ** (mel / 2595) - 1)
    levels = []
    at = 0
    while at == 0 or at + window - hop < len(signal):
        frame = np.zeros(window)
        part = signal[at : at + window]
        frame[: len(part)] = part
        bins = np.arange(window // 2 + 1)
        magnitude = np.abs(np.exp(-2j * np.pi * bins[:, None] * n / window) @ (frame * hann))
        row = []
        for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            hz = bins * rate / window
            triangle = np.interp(hz, [left, centre, right], [0, 2 / (right - left), 0])
            value = min(2.0, max(-7.0, float(np.log10(max(1e-7, float(triangle @ magnitude))))))
            row.append(round((value + 7) / 9 * 15))
        levels.append(row)
        at += hop
    return np.array(levels, np.uint8)


@pytest.mark.parametrize("samples", [100, 1600, 1601, 2400, 4000])
def test_dmel_is_its_definition(samples):
    signal = np.random.default_rng(samples).normal(0, 0.1, samples)
    frames = media.dmel(signal)
    expected = dmel_by_definition(signal, rate=16_000)
    assert frames.shape == expected.shape
    assert int(np.abs(frames.astype(int) - expected).max()) <= 1  # a value on the edge of two levels may round either way
    assert (frames == expected).mean() > 0.999


def test_dmel_of_silence_and_of_a_tone():
    assert not media.dmel(np.zeros(1600, np.int16)).any()
    tone = np.rint(20000 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16_000)).astype(np.int16)
    frames = media.dmel(tone)
    assert frames.shape == (9, 80)
    assert set(frames.argmax(axis=1).tolist()) <= {27, 28, 29}  # 1 kHz is 1000 mel of 2840: a third of 80 bands
    assert frames.max() < media.MEL_LEVELS


def test_dmel_names_what_is_wrong():
    with pytest.raises(ValueError, match="mix it down"):
        media.dmel(np.zeros((2, 1600)))
    with pytest.raises(ValueError, match="4000 Hz"):
        media.dmel(np.zeros(1600), sample_rate=4000)
