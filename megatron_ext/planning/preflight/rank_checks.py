"""What the ranks of a launch are like: their clocks, and how fast each does work of its own."""

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
_SECONDS = 0.5  # of work in a round
_SIZES = {True: 256, False: 8192}  # of the matrices, on the CPU and on a GPU


def clock_offsets(launch: Launch) -> list[tuple[float, float]]:
    """For each rank how far its clock is ahead of rank 0's, and how wrong that may be, in seconds.

    Rank 0 tells the time to one rank after the other; a rank takes it to be that of the middle of
    its question and the answer.
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
        asked = time.time()
        launch.store.set(f"clock/{launch.rank}/question", "")
        answer = float(launch.wait(f"clock/{launch.rank}/answer"))
        answered = time.time()
        offset, error = (asked + answered) / 2 - answer, (answered - asked) / 2
    return [(float(o), float(e)) for o, e in launch.gather("clocks", [offset, error])]


def own_work(launch: Launch) -> list[dict[str, Any]]:
    """Seconds that each rank takes for the same matrix products, all ranks at once; the best of
    some rounds."""
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
    here = {"seconds": min(seconds), "flops": flops, "node": platform.node()}
    return launch.gather("speeds", here)


def clocks(launch: Launch, tolerance: float) -> CheckResult:
    """Compare the clocks of nodes.

    Raises:
        UserError: one is off by more than `tolerance` seconds.
    """
    offsets = clock_offsets(launch)
    furthest = max(range(launch.size), key=lambda rank: abs(offsets[rank][0]))
    offset, error = offsets[furthest]
    if abs(offset) - error > tolerance:
        raise UserError(
            f"the clock of rank {furthest}'s node is {offset:+.3f} s off rank 0's: start NTP there "
            "(see chronyc tracking), for times of logs and files mislead"
        )
    return CheckResult(f"differ by {abs(offset):.3f} s at most, measured within {error:.3f} s")


def speeds(launch: Launch, factor: float) -> CheckResult:
    """Compare how fast ranks do work of their own; a warning names those that hold up the rest."""
    rows = own_work(launch)
    flops = [row["flops"] / 1e12 for row in rows]
    message = f"{min(flops):,.3g} to {max(flops):,.3g} TFLOP/s"
    slow = slow_ranks([row["seconds"] for row in rows], factor)
    if not slow:
        return CheckResult(message, figures={"ranks": rows})
    names = [f"rank {r} on {rows[r]['node']} takes {times:.1f} times" for r, times in slow[:8]]
    message += (
        f"; {', '.join(names)} the median for the same work: see its temperature, power limit "
        "and what else runs there, or leave its node out"
    )
    return CheckResult(message, WARNING, {"ranks": rows})


def slow_ranks(seconds: list[float], factor: float) -> list[tuple[int, float]]:
    """Ranks that take more than `factor` times the median, and how many times, slowest first."""
    median = statistics.median_low(seconds)
    slow = [(rank, s / median) for rank, s in enumerate(seconds) if s > factor * median]
    return sorted(slow, key=lambda row: -row[1])
