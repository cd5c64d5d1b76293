"""Measure the cost of the CPU device in a training step.

Runs Megatron's trainer on one rank (4 MoE layers, width 256, 8 sequences of 256 tokens), counts the
entries into its wrappers in one step, and multiplies them by the time that each adds to a call. In
the steps between, it also runs the alternative, a global `TorchFunctionMode`.

    python benchmarks/cpu_device.py [--pairs 10]
"""

import argparse
import contextlib
import cProfile
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch

original_zeros = torch.zeros

from megatron_ext.devices import activate, device_default_args  # noqa: E402

DEVICE = activate()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from megatron_ext import devices  # noqa: E402
from megatron_ext.devices import placement, randomness  # noqa: E402
from megatron_ext.training.data_loading import forward_step, train_valid_test_datasets  # noqa: E402

FOLDER = os.fspath(Path(devices.__file__).parent)
WARMUP = 3  # the last step is profiled

FLAGS = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4095"),
    *("--num-layers", "4", "--hidden-size", "256", "--num-attention-heads", "4"),
    *("--seq-length", "256", "--max-position-embeddings", "256", "--num-workers", "0"),
    *("--micro-batch-size", "8", "--global-batch-size", "8", "--split", "90,5,5"),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--eval-iters", "0"),
    *("--eval-interval", "1000", "--log-interval", "1000"),
    *("--num-experts", "4", "--moe-router-topk", "1", "--moe-router-score-function", "sigmoid"),
    *("--moe-ffn-hidden-size", "512", "--moe-token-dispatcher-type", "alltoall"),
    *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--no-create-attention-mask-in-dataloader"),
]


class PlacingMode(TorchFunctionMode):
    """Alternative to the wrappers: a mode that corrects the device of every torch call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs["device"] = placement.on_host(kwargs["device"])
        return func(*args, **kwargs)


class Measured:
    """Timed `train_step` of Megatron, alternately without and with the mode."""

    def __init__(self, train_step: Callable[..., Any]) -> None:
        self._train_step = train_step
        self._steps = 0
        self.seconds: dict[str, list[float]] = {"wrappers": [], "mode": []}
        self.profile = cProfile.Profile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if self._steps < WARMUP:
            return self._train_step(*args, **kwargs)
        if self._steps == WARMUP:
            return self.profile.runcall(self._train_step, *args, **kwargs)
        name = "mode" if self._steps % 2 else "wrappers"
        with PlacingMode() if name == "mode" else contextlib.nullcontext():
            start = time.perf_counter()
            result = self._train_step(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - start)
        return result


def entries(profile: cProfile.Profile) -> tuple[Counter[str], dict[str, float]]:
    """Return calls that enter the CPU device from outside, by function, and seconds per call."""
    profile.create_stats()
    calls: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for (file, _, name), (_, count, _, total, callers) in profile.stats.items():  # type: ignore[attr-defined]
        if file.startswith(FOLDER):
            outside = [times for (caller, *_), times in callers.items() if FOLDER not in caller]
            if entered := sum(times[1] for times in outside):
                calls[name] += entered
                seconds[name] = total / count
    return calls, seconds


def seconds_per_call(function: Callable[[], Any], repeats: int = 21, calls: int = 2000) -> float:
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        timings.append((time.perf_counter() - start) / calls)
    return median(timings)


def added_seconds() -> dict[str, float]:
    """Return the added seconds per call, by function; functions of `torch.cuda` count in full."""
    x, host = torch.ones(()), torch.device("cpu")
    loop = seconds_per_call(lambda: None)

    def swap() -> None:
        with randomness.drawing_on_host():
            pass

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "factory": (
            lambda: torch.zeros((), device="cuda"),
            lambda: original_zeros((), device=host),
        ),
        "tensor_to": (lambda: x.to(torch.float32), lambda: placement._to(x, torch.float32)),
        "tensor_type": (lambda: x.type(), lambda: placement._type(x)),
    }
    alone: dict[str, Callable[[], Any]] = {
        "<lambda>": torch.cuda.current_device,
        "_itself": x.cuda,
        "swapped": swap,
    }
    return {
        **{
            name: seconds_per_call(ours) - seconds_per_call(its)
            for name, (ours, its) in pairs.items()
        },
        **{name: seconds_per_call(function) - loop for name, function in alone.items()},
    }


def train(pairs: int) -> Measured:
    measured = Measured(training.train_step)
    training.train_step = measured
    iterations = WARMUP + 2 * pairs
    sys.argv[1:] = [*device_default_args(), *FLAGS, "--train-iters", str(iterations)]
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse_and_validate_args()
        training.pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            train_valid_test_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    torch.distributed.destroy_process_group()
    return measured


def report(measured: Measured) -> list[dict[str, Any]]:
    step, mode_step = (median(measured.seconds[name]) for name in ("wrappers", "mode"))
    # The speed of a machine drifts, so that ratios of neighboring steps vary less than ratios of
    # medians.
    mode_ratio = median(
        mode / plain for plain, mode in zip(measured.seconds["wrappers"], measured.seconds["mode"])
    )
    added, (calls, profiled) = added_seconds(), entries(measured.profile)
    rows: list[dict[str, Any]] = []
    for name, count in calls.most_common():
        cost = added.get(name, profiled[name])  # profiled: an upper bound, used for rare calls
        rows.append(
            {
                "case": name,
                "calls_per_step": count,
                "ns_per_call": round(cost * 1e9),
                "us_per_step": round(count * cost * 1e6, 1),
                "percent_of_step": round(100 * count * cost / step, 4),
            }
        )
    total = sum(row["us_per_step"] for row in rows)
    rows += [
        {
            "case": "CPU device",
            "calls_per_step": sum(calls.values()),
            "us_per_step": round(total, 1),
            "percent_of_step": round(total / (step * 1e4), 4),
            "step_ms": round(step * 1e3, 1),
        },
        {
            "case": "TorchFunctionMode instead",
            "us_per_step": round((mode_ratio - 1) * step * 1e6, 1),
            "percent_of_step": round(100 * (mode_ratio - 1), 4),
            "step_ms": round(mode_step * 1e3, 1),
        },
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs",
        type=int,
        default=10,
        help="Number of timed steps of each kind. Default: %(default)s.",
    )
    pairs = parser.parse_args().pairs
    if DEVICE != "cpu":
        print("CUDA is available: the CPU device is not used and costs nothing")
        return
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(environment, MASTER_PORT="0")
    rows = report(train(pairs))
    columns = ("case", "calls_per_step", "ns_per_call", "us_per_step", "percent_of_step", "step_ms")
    print(f"{columns[0]:<26}" + "".join(f"{column:>17}" for column in columns[1:]))
    for row in rows:
        print(f"{row['case']:<26}" + "".join(f"{row.get(c, ''):>17}" for c in columns[1:]))
    for row in rows:
        print(json.dumps({"benchmark": "cpu_device", **row}))


if __name__ == "__main__":
    main()
