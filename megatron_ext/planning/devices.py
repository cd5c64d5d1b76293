"""Memory of devices: known cards, and the device of this machine."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import psutil

from megatron_ext.errors import UserError

MIB, GIB = 2**20, 2**30

KNOWN_DEVICES = {
    "t4-16gb": 15_360,
    "v100-16gb": 16_160,
    "v100-32gb": 32_510,
    "a10-24gb": 23_028,
    "l4-24gb": 23_034,
    "rtx4090-24gb": 24_564,
    "rtx5090-32gb": 32_607,
    "l40s-48gb": 46_068,
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100-80gb": 81_559,
    "h100-94gb": 95_830,
    "gh200-96gb": 97_871,
    "h200-141gb": 143_771,
    "b200-180gb": 183_359,
}
"""Memory of known cards in MiB, as `nvidia-smi --query-gpu=memory.total` reports it."""

_RESERVED = 0.1
"""Share of a card that is reserved for CUDA, NCCL and fragmentation of the allocator."""

_HOST_OVERHEAD = 0.55
"""Share of the tensors that the allocator of a host takes, fitted to measured runs."""


@dataclass(frozen=True)
class Device:
    """Memory that a rank has.

    Attributes:
        name: Name of the card or of this machine.
        size: Bytes of memory.
        reserve: Bytes that are not available to tensors.
        reserve_for: Purpose of the reserve, as text.
        source: Origin of the size, as text.
        is_card: Whether it is a GPU; otherwise it is a share of the memory of a host.
        named: Whether the user named the device.
        overhead: Bytes that the allocator takes for each byte of tensors. On a host three layouts
            of a model of 40 M parameters needed 1.52 to 1.55 times the bytes of their tensors.
    """

    name: str
    size: int
    reserve: int
    reserve_for: str
    source: str
    is_card: bool = True
    named: bool = False
    overhead: float = 0.0

    def reserve_next_to(self, size: int) -> int:
        """Return the bytes that are not available to tensors of `size` bytes."""
        return self.reserve + int(self.overhead * size)


def named_device(text: str) -> Device:
    """Return the device that `--device` names.

    Args:
        text: Name of a known card, the beginning of one such as "h100", or a size in GiB.

    Raises:
        UserError: There is no such card, several have this name, or the size is not above 0.
    """
    try:
        size = float(text)
    except ValueError:
        name = _known_name(text)
        return _card(name, KNOWN_DEVICES[name] * MIB, "--device", named=True)
    if not 0 < size < float("inf"):
        raise UserError(
            f"--device {text} must be above 0 GiB, or the name of a card such as h100-80gb."
        )
    return _card(f"a device of {size:g} GiB", int(size * GIB), "--device", named=True)


def device_of(text: str | None, ranks: int) -> Device:
    """Return the device that `--device` names, or else that of this machine.

    Args:
        text: Value of the flag, or None.
        ranks: Number of ranks of the run.

    Raises:
        UserError: There is no such device.
    """
    return found_device(ranks) if text is None else named_device(text)


def found_device(ranks: int) -> Device:
    """Return the device of a rank on this machine: its smallest GPU, or its share of the host.

    Args:
        ranks: Number of ranks of the run. As many of them share the memory of the host as
            LOCAL_WORLD_SIZE or NPROC_PER_NODE says, or all of them.
    """
    if gpu := _smallest_gpu():
        name, size = gpu
        return _card(name, size, f"GPU of {platform.node()}")
    per_host = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("NPROC_PER_NODE") or ""
    sharing = min(ranks, int(per_host)) if per_host.isdecimal() and int(per_host) else ranks
    total = host_memory()
    return Device(
        f"{platform.node()} for each of {sharing:,} rank(s)",
        total // sharing,
        psutil.Process().memory_info().rss,
        f"Python, torch and Megatron, and {_HOST_OVERHEAD:.0%} of the tensors for the allocator",
        f"no GPU found; {total / GIB:,.1f} GiB of memory in all",
        is_card=False,
        overhead=_HOST_OVERHEAD,
    )


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container if it has fewer."""
    total = psutil.virtual_memory().total
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    for file in map(Path, limits):
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


def _card(name: str, size: int, source: str, named: bool = False) -> Device:
    return Device(
        name, size, int(_RESERVED * size), "CUDA, NCCL and fragmentation", source, named=named
    )


def _known_name(text: str) -> str:
    """Return the full name of a known card."""
    word = re.sub(r"[\s_/-]|nvidia", "", text.lower())
    matches = [name for name in KNOWN_DEVICES if name.replace("-", "").startswith(word) and word]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"--device {text} may be {' or '.join(matches)}. Write one of them.")
    near = get_close_matches(text.lower(), KNOWN_DEVICES, n=1, cutoff=0.4)
    advice = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(KNOWN_DEVICES)}."
    raise UserError(
        f"--device {text} is not a known card. {advice} A size in GiB is also accepted."
    )


def _smallest_gpu() -> tuple[str, int] | None:
    """Return the name and bytes of the smallest GPU, or None; CUDA is not initialized."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=20
        ).stdout.splitlines()
        cards = [line.rsplit(",", 1) for line in lines if line.strip()]
        sizes = [(name.strip(), int(size) * MIB) for name, size in cards]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return min(sizes, key=lambda card: card[1], default=None)
