"""Checks of the ranks of a launch: their clocks and their speed of computation."""

import os
import platform
import statistics
import time
from typing import Any

import torch

from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.planning.preflight.findings import WARNING, CheckResult
from megatron_ext.training.launch import Launch

_ROUNDS = 3
_SECONDS = 0.5  # length of a round
_SIZES = {True: 256, False: 8192}  # rows of the matrices, on the CPU and on a GPU


def clock_offsets(launch: Launch) -> list[tuple[float, float]]:
    """Return the offset of each rank's clock from that of rank 0, and its possible error.

    Each rank in turn requests the time from rank 0. The answer is assumed to hold for the middle
    between the request and its arrival.

    Returns:
        For each rank the seconds by which its clock is ahead, and the largest error of this
        measurement in seconds.
    """
    assert launch.store is not None
    offset, error = 0.0, 0.0
    if launch.rank == 0:
        for rank in range(1, launch.size):
            launch.store.set(f"clock/{rank}/turn", "")
            launch.wait(f"clock/{rank}/question")
            launch.store.set(f"clock/{rank}/answer", repr(time.time()))
    else:
        launch.wait(f"clock/{launch.rank}/turn")
        start = time.time()
        launch.store.set(f"clock/{launch.rank}/question", "")
        answer = float(launch.wait(f"clock/{launch.rank}/answer"))
        end = time.time()
        offset, error = (start + end) / 2 - answer, (end - start) / 2
    return [(float(o), float(e)) for o, e in launch.gather("clocks", [offset, error])]


def own_work(launch: Launch) -> list[dict[str, Any]]:
    """Time the same matrix products on all ranks at once.

    Returns:
        For each rank the seconds of its fastest round, its FLOP/s and the name of its node.
    """
    if not is_cpu_device():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    size = _SIZES[is_cpu_device()]
    dtype = torch.float32 if is_cpu_device() else torch.bfloat16
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))

    def work(products: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(products):
            torch.matmul(a, b)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    work(3)
    products = launch.share("work", max(1, round(_SECONDS / (work(10) / 10))))
    seconds = []
    for number in range(_ROUNDS):
        launch.agree(f"work {number}", lambda: None)
        seconds.append(work(products))
    flops = 2 * size**3 * products / min(seconds)
    speed = {"seconds": min(seconds), "flops": flops, "node": platform.node()}
    return launch.gather("speeds", speed)


def clocks(launch: Launch, tolerance: float) -> CheckResult:
    """Compare the clocks of nodes.

    Args:
        launch: Ranks of the launch.
        tolerance: Largest allowed offset in seconds.

    Raises:
        UserError: A clock is off by more than the tolerance.
    """
    offsets = clock_offsets(launch)
    furthest = max(range(launch.size), key=lambda rank: abs(offsets[rank][0]))
    offset, error = offsets[furthest]
    if abs(offset) - error > tolerance:
        raise UserError(
            f"The clock of rank {furthest}'s node is {offset:+.3f} s off rank 0's. Start NTP there "
            "(see chronyc tracking), because the times of its logs and files are wrong."
        )
    return CheckResult(f"differ by {abs(offset):.3f} s at most, measured within {error:.3f} s")


def speeds(launch: Launch, factor: float) -> CheckResult:
    """Compare the speeds of the ranks.

    Args:
        launch: Ranks of the launch.
        factor: A warning names the ranks that take more than this many times the median.
    """
    rows = own_work(launch)
    flops = [row["flops"] / 1e12 for row in rows]
    message = f"{min(flops):,.3g} to {max(flops):,.3g} TFLOP/s"
    slow = slow_ranks([row["seconds"] for row in rows], factor)
    if not slow:
        return CheckResult(message, values={"ranks": rows})
    names = [f"rank {r} on {rows[r]['node']} takes {times:.1f} times" for r, times in slow[:8]]
    message += (
        f"; {', '.join(names)} the median for the same work: check temperature, power limit "
        "and other processes of the node, or leave it out"
    )
    return CheckResult(message, WARNING, {"ranks": rows})


def slow_ranks(seconds: list[float], factor: float) -> list[tuple[int, float]]:
    """Return the slow ranks, slowest first.

    Args:
        seconds: Seconds that each rank takes for the same work.
        factor: Ranks that take more than this many times the median are slow.

    Returns:
        The number of each slow rank, and its time as a multiple of the median.
    """
    median = statistics.median_low(seconds)
    slow = [(rank, s / median) for rank, s in enumerate(seconds) if s > factor * median]
    return sorted(slow, key=lambda row: -row[1])
