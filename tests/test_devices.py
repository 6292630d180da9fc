"""Devices are known by the names that torch gives them, or not at all."""

import pytest

from xblip.devices import DEVICES, device_peak


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known(name, tera):
    assert device_peak(name).flops == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_unknown(name):
    assert device_peak(name) is None


def test_cards_of_one_kind_differ_in_memory():
    assert device_peak("NVIDIA A100-SXM4-40GB").memory == 40e9 < device_peak("NVIDIA A100 80GB PCIe").memory


def test_every_device_can_be_met():
    for words, device in DEVICES.items():
        assert device_peak(" ".join(words)) == device
        assert device.flops * 2 > 1e14 and 10 < device.flops / device.bandwidth < 1000
