"""Chips are found by the names that JAX gives devices, and only by those."""

import jax
import pytest

from v4train.core import hardware


@pytest.mark.parametrize(
    ("device_kind", "teraflops", "gigabytes"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H100 NVL", 835, 94),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA GH200 480GB", 990, 96),
        ("NVIDIA B200", 2250, 180),
        ("NVIDIA GB200", 2500, 186),
        ("NVIDIA GB300", 2500, 279),
        ("NVIDIA L4", 121, 24),
        ("NVIDIA L40S", 362, 48),
    ],
)
def test_gpus(device_kind, teraflops, gigabytes):
    found = hardware.chip(device_kind)
    assert found is not None
    assert (found.bf16_flops, found.hbm_bytes) == (teraflops * 1e12, gigabytes * 10**9)
    assert hardware.peak_flops(device_kind) == teraflops * 1e12


@pytest.mark.parametrize(
    ("device_kind", "teraflops", "gibibytes"),
    [
        ("TPU v3", 61.5, 16),
        ("TPU v4", 275, 32),
        ("TPU v4 lite", 138, 8),
        ("TPU v5 lite", 197, 16),
        ("TPU v5e", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v5p", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("TPU v6e", 918, 32),
        ("TPU7x", 2307 / 2, 192 // 2),  # JAX shows the two cores of a chip
    ],
)
def test_tpus(device_kind, teraflops, gibibytes):
    found = hardware.chip(device_kind)
    assert found is not None
    assert (found.bf16_flops, found.hbm_bytes) == (teraflops * 1e12, gibibytes * 2**30)


@pytest.mark.parametrize(
    "device_kind",
    ["cpu", "", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A1000", "NVIDIA A10", "TPU v99", "TPU8i", "NVIDIA L40", "NVIDIA H200 MIG 1g.18gb"],
)
def test_unknown_devices_have_no_peak(device_kind):
    assert hardware.chip(device_kind) is None
    assert hardware.peak_flops(device_kind) is None


def test_this_machine_is_looked_up_by_its_device_kind():
    assert hardware.peak_flops(jax.devices("cpu")[0].device_kind) is None


def test_figures_are_in_flops_and_bytes():
    for name, chip in hardware.CHIPS.items():
        assert 1e13 < chip.bf16_flops < 1e16, name
        assert 8e9 <= chip.hbm_bytes < 1e12, name
