"""Machines as people write them."""

import pytest

from v4train.core import hardware
from v4train.plan import machine


@pytest.mark.parametrize(
    ("text", "name", "devices", "slices"),
    [
        ("H200x512", "H200", 512, 1),
        ("h100 x 8", "H100", 8, 1),
        ("H100 PCIex16", "H100 PCIe", 16, 1),
        ("v5px512", "TPU v5p", 512, 1),
        ("v5p:8x8x8", "TPU v5p", 512, 1),
        ("v5p:8x8x8:2", "TPU v5p", 1024, 2),
        ("H100:64x8", "H100", 512, 1),
        ("tpu7xx256", "TPU7x", 256, 1),
        ("tpu7x:4x4x8", "TPU7x", 256, 1),  # JAX shows its two halves
        ("tpu7x:4x4x8:2", "TPU7x", 512, 2),
    ],
)
def test_chips_and_their_number(text, name, devices, slices):
    found = machine.parse(text)
    assert (found.name, found.devices, found.slices) == (name, devices, slices)
    assert found.chip == hardware.CHIPS[name]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("H200", "write it like H200x512"),
        ("512", "write it like H200x512"),
        ("", "write it like"),
        ("H201x8", r"no chip 'H201'.*nearest: .*H200"),
        ("v5q:8x8", r"no chip 'v5q'.*nearest: .*v5p"),
        ("H200x0", "0 chips cannot train"),
        ("H100x64x8", "a topology is written with a colon"),
        ("v5p:8x8x8:0", "0 chips cannot train"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        machine.parse(text)


def test_the_option_that_named_it_is_the_one_that_is_complained_about():
    with pytest.raises(ValueError, match=r"^--target 'H200' is not a chip"):
        machine.parse("H200", option="--target")


def test_a_label_for_people():
    assert machine.parse("v5p:8x8x8:2").label == "2 slices of 512 x TPU v5p"
    assert machine.parse("H200x8").label == "8 x H200"
