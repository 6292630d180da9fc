"""What accelerators can do at most: the peak that a run's utilisation (MFU) is measured against.

Only devices whose maker tells dense bfloat16 operations are known; of another a run tells no utilisation, rather than a
wrong one.
"""

import re
from typing import NamedTuple


class Device(NamedTuple):
    """An accelerator: dense bfloat16 FLOP/s, bytes/s and bytes of its memory."""

    flops: float
    bandwidth: float
    memory: float


# Makers' data sheets, all from memory unless said otherwise; where a sheet tells sparse operations, half of them. Those
# marked * were compared with other projects' tables that cite the sheets.
DEVICES: dict[tuple[str, ...], Device] = {
    ("B200",): Device(2250e12, 8.0e12, 180e9),  # NVIDIA HGX B200 *
    ("H200", "NVL"): Device(835e12, 4.8e12, 141e9),  # NVIDIA H200
    ("H200",): Device(989e12, 4.8e12, 141e9),  # NVIDIA H200 *
    ("GH200",): Device(989e12, 4.0e12, 96e9),  # NVIDIA GH200, the one with HBM3 *
    ("H100", "PCIE"): Device(756e12, 2.0e12, 80e9),  # NVIDIA H100 *
    ("H100", "NVL"): Device(835e12, 3.9e12, 94e9),  # NVIDIA H100 *
    ("H100",): Device(989e12, 3.35e12, 80e9),  # NVIDIA H100, SXM *
    ("A100", "40GB"): Device(312e12, 1.555e12, 40e9),  # NVIDIA A100 *
    ("A100", "PCIE"): Device(312e12, 1.935e12, 80e9),  # NVIDIA A100 *
    ("A100",): Device(312e12, 2.039e12, 80e9),  # NVIDIA A100, SXM *
    ("A30",): Device(165e12, 0.933e12, 24e9),  # NVIDIA A30 *
    ("A10",): Device(125e12, 0.6e12, 24e9),  # NVIDIA A10 *
    ("A40",): Device(149.7e12, 0.696e12, 48e9),  # NVIDIA A40 *
    ("L40S",): Device(362e12, 0.864e12, 48e9),  # NVIDIA L40S *
    ("L40",): Device(181e12, 0.864e12, 48e9),  # NVIDIA L40 *
    ("L4",): Device(121e12, 0.3e12, 24e9),  # NVIDIA L4
    ("RTX", "A6000"): Device(154.8e12, 0.768e12, 48e9),  # NVIDIA GA102 whitepaper
    ("RTX", "5090"): Device(209.5e12, 1.792e12, 32e9),  # NVIDIA RTX Blackwell whitepaper, sums in float32
    ("RTX", "4090"): Device(165.2e12, 1.008e12, 24e9),  # NVIDIA Ada whitepaper, sums in float32
    ("RTX", "3090"): Device(71e12, 0.936e12, 24e9),  # NVIDIA GA102 whitepaper, sums in float32
    ("MI325X",): Device(1307e12, 6.0e12, 256e9),  # AMD Instinct MI325X *
    ("MI300X",): Device(1307e12, 5.3e12, 192e9),  # AMD Instinct MI300X *
    ("MI250X",): Device(191.5e12, 1.6e12, 64e9),  # AMD Instinct MI250X, one of its two dies, which is a device *
}
"""By words of a device's name, as torch tells it; the first whose words are all there counts."""
OTHERS = {"LAPTOP", "MIG", "D", "TI", "MOBILE"}
"""Words of names that mean a smaller or other device than the one without them."""


def device_peak(name: str) -> Device | None:
    """What a device can do at most, by the name that torch gives it; None if that is not known here."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    if words & OTHERS:
        return None
    return next((device for known, device in DEVICES.items() if words.issuperset(known)), None)
