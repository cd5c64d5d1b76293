"""Peak speed of a device, against which the model FLOP utilization (MFU) is reported."""

import re
import time
from argparse import Namespace

import torch

from megatron_ext.devices import is_cpu_device


def peak_flops(args: Namespace) -> float | None:
    """Return the peak FLOP/s of one device.

    It is the value of `--peak-tflops`, that of the data sheet for a known GPU, or measured on a
    CPU; None for any other GPU.
    """
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    if not is_cpu_device():
        return known_peak(torch.cuda.get_device_name())
    a, b = torch.randn(2, 1024, 1024)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 1024**3 / fastest


# Peak TFLOP/s of dense bf16 products on tensor cores, from the data sheets of the manufacturers.
_DENSE_BF16_TFLOPS = {
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L20": 119.5,
    "L40": 181.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B100": 1750.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "GB300": 2500.0,
}


# Parts of a device's name that do not change its peak.
_WITHOUT_EFFECT = re.compile(r"nvidia|tesla|sxm\d*|\d+gb?|hbm\d\w?|3e")


def known_peak(device: str) -> float | None:
    """Return the peak FLOP/s of a GPU for dense bf16 products, or None if it is unknown.

    >>> known_peak("NVIDIA H100 NVL")
    835000000000000.0
    >>> known_peak("NVIDIA H1000")
    """
    words = re.split(r"[\s_-]+", device.lower())
    name = " ".join(word for word in words if not _WITHOUT_EFFECT.fullmatch(word))
    peaks = {key.lower(): peak for key, peak in _DENSE_BF16_TFLOPS.items()}
    peak = peaks.get(name, peaks.get(name.removesuffix(" pcie")))
    return None if peak is None else peak * 1e12
