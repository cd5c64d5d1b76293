"""Compare the exact search for the cutoffs of a step with gathering and with estimates.

Every method finds, for each expert, the k-th largest router logit over the tokens of all ranks (k
is 1/16 of them), on real gloo ranks and in the same run:

    ours, expert choice      in each layer's forward pass, with the routing map
    ours, expert threshold   at the end of the step, all layers in one search, with the counts for
                         the routing metrics
    gather and top-k         all logits on every rank, as the paper's code does
    mean of rank quantiles   as megatron-core 0.19.2's quantile balancing does
    histogram of 1,000 bins  from one below the least to one above the greatest threshold,
                             interpolated, as its proposed successor does
    thresholds, ema          update of the thresholds by cutoffs that are known: without a search,
    thresholds, adaptive     by either estimator

Logits are new in every step. `equal` ranks draw them from one distribution, `skewed` ranks from
different ones. Times are the median and the minimum over steps of the slowest rank; bytes are those
that a rank sends if collectives use rings, counted at the calls; syncs are operations that would
wait for a GPU; memory is the peak of new tensors.

    python benchmarks/router_stage.py [--ranks 4] [--tokens 524288] [--experts 16] [--layers 1]

Each flag takes several values, of which all combinations are measured.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Self
from unittest import mock

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.moe.forecast import Forecast
from megatron_ext.moe.order_statistics import kth_largest, top_k_mask
from megatron_ext.moe.threshold_estimators import StepCounts
from megatron_ext.moe.thresholds import Thresholds
from tests.collectives import counted_collectives
from tests.distributed import run_ranks

# ranks, tokens of all ranks, experts, layers
DEFAULT_CASES = [
    (1, 65536, 16, 1),
    (2, 65536, 64, 1),
    (4, 8192, 16, 1),
    (4, 65536, 256, 1),
    (4, 524288, 16, 1),
    (4, 8192, 16, 48),
    (2, 4096, 128, 48),
    (8, 65536, 16, 1),
]
FORECAST_STEPS = 3  # steps before the first timed one
BINS = 1000


def rank_of(tokens: int) -> int:
    return tokens // 16


class Ours:
    """Search of the library, with its forecasts from step to step."""

    def __init__(self, layers: int) -> None:
        self.forecasts = [Forecast() for _ in range(layers)]

    def expert_choice(self, logits: list[Tensor]) -> list[Tensor]:
        cutoffs = []
        positions = torch.arange(len(logits[0])) + dist.get_rank() * len(logits[0])
        for layer, forecast in zip(logits, self.forecasts):
            cutoff = kth_largest([layer], [rank_of], dist.group.WORLD, [forecast.bracket()])
            top_k_mask(layer, cutoff, positions, dist.group.WORLD)
            forecast.observe(cutoff.value)
            cutoffs.append(cutoff.value)
        return cutoffs

    def expert_threshold(self, logits: list[Tensor]) -> list[Tensor]:
        brackets = [forecast.bracket() for forecast in self.forecasts]
        counts = torch.zeros(len(logits), 5 * logits[0].shape[1] + 1, dtype=torch.int64)
        ranks = [rank_of] * len(logits)
        values = kth_largest(logits, ranks, dist.group.WORLD, brackets, counts).value
        cutoffs = list(values.view(len(logits), -1))
        for forecast, cutoff in zip(self.forecasts, cutoffs):
            forecast.observe(cutoff)
        return cutoffs


class Estimates:
    """Thresholds of every layer, updated by known cutoffs as at the end of a step."""

    def __init__(self, experts: int, layers: int, adaptive: bool) -> None:
        self.layers = [Thresholds(experts, 0.99, adaptive=adaptive) for _ in range(layers)]

    def update(self, cutoffs: list[Tensor], tokens: int) -> list[Tensor]:
        counts = StepCounts(torch.full_like(cutoffs[0], rank_of(tokens) + 9).long(),
                            rank_of(tokens), tokens)  # fmt: skip
        for thresholds, cutoff in zip(self.layers, cutoffs):
            thresholds.update(cutoff, counts)
        return cutoffs


def gathered(logits: Tensor) -> Tensor:
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits)
    return torch.cat(parts)


def gather_and_top_k(logits: list[Tensor]) -> list[Tensor]:
    cutoffs = []
    for layer in logits:
        whole = gathered(layer)
        cutoffs.append(whole.topk(rank_of(len(whole)), dim=0).values[-1])
        _ = layer >= cutoffs[-1]
    return cutoffs


def mean_of_rank_quantiles(logits: list[Tensor]) -> list[Tensor]:
    own = [layer.topk(rank_of(len(layer)), dim=0).values[-1] for layer in logits]
    stacked = torch.stack(own)
    dist.all_reduce(stacked)
    return list(stacked / dist.get_world_size())


def histogram(logits: list[Tensor], thresholds: list[Tensor]) -> list[Tensor]:
    counts, ranges = [], []
    for layer, threshold in zip(logits, thresholds):
        low, high = float(threshold.min()) - 1, float(threshold.max()) + 1
        width = (high - low) / BINS
        bins = ((layer - low) / width).clamp_(0, BINS - 1).to(torch.int64)
        bins += BINS * torch.arange(layer.shape[1])
        flat = torch.bincount(bins.view(-1), minlength=BINS * layer.shape[1])
        counts.append(flat.view(-1, BINS).to(torch.int32))
        ranges.append((low, width))
    stacked = torch.stack(counts)  # [layers, experts, bins]
    dist.all_reduce(stacked)
    k = rank_of(len(logits[0]) * dist.get_world_size())
    cutoffs = []
    for count, (low, width) in zip(stacked, ranges):
        at_least = count.flip(1).cumsum(1).flip(1)
        bin = (at_least >= k).sum(dim=1, keepdim=True) - 1
        missing = (at_least.gather(1, bin) - k) / count.gather(1, bin)
        cutoffs.append((low + width * (bin + missing.double())).squeeze(1).float())
    return cutoffs


class OperationCounter(TorchDispatchMode):
    """Counter of operations for which the host of a GPU would wait, and of memory.

    `syncs` are operations whose result, or its size, the host needs. `peak` is the greatest number
    of bytes of new tensors at a time.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.syncs, self.peak = 0, 0
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.syncs += name in self.WAITING or by_mask
        storages = {StorageWeakRef(x.untyped_storage()) for x in args if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and StorageWeakRef(x.untyped_storage()) not in storages:
                self.storages[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.storages = {ref: nbytes for ref, nbytes in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return result

    def __enter__(self) -> Self:
        tolist = Tensor.tolist  # not dispatched on the CPU

        def counting(tensor: Tensor) -> Any:
            self.syncs += 1
            return tolist(tensor)

        self.patch = mock.patch.object(Tensor, "tolist", counting)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.patch.stop()


def draw(step: int, tokens: int, experts: int, layers: int, skewed: bool) -> list[Tensor]:
    """Return this rank's logits, `[tokens, experts]` per layer; they drift from step to step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 * step + rank)
    offsets = torch.linspace(-1, 1, experts) + 0.002 * step
    shift, scale = (rank / ranks, 1 + rank / ranks) if skewed else (0.0, 1.0)
    return [
        torch.randn(tokens, experts, generator=generator).mul_(scale).add_(offsets + shift)
        for _ in range(layers)
    ]


def greatest(value: float) -> float:
    """Return the greatest value over all ranks."""
    result = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return float(result)


def load_error(logits: list[Tensor], cutoffs: list[Tensor]) -> float:
    """Return the largest difference of an expert's load from k, as a share of k."""
    loads = torch.stack([(layer >= cutoff).sum(dim=0) for layer, cutoff in zip(logits, cutoffs)])
    dist.all_reduce(loads)
    k = rank_of(len(logits[0]) * dist.get_world_size())
    return float((loads - k).abs().max()) / k


def measure(
    tokens: int, experts: int, layers: int, skewed: bool, steps: int
) -> list[dict[str, Any]]:
    """Measure one case, on every rank, and return its rows."""
    ranks = dist.get_world_size()
    thresholds: list[Tensor] = []  # exact cutoffs of the last step
    known: list[Tensor] = []  # and of this one
    estimates = [Estimates(experts, layers, adaptive) for adaptive in (False, True)]
    methods: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        "ours, expert choice": Ours(layers).expert_choice,
        "ours, expert threshold": Ours(layers).expert_threshold,
        "gather and top-k": gather_and_top_k,
        "mean of rank quantiles": mean_of_rank_quantiles,
        "histogram of 1,000 bins": lambda logits: histogram(logits, thresholds),
        "thresholds, ema": lambda _: estimates[0].update(known, tokens),
        "thresholds, adaptive": lambda _: estimates[1].update(known, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    calls: dict[str, list[int]] = {name: [] for name in methods}
    volume: dict[str, list[float]] = {name: [] for name in methods}
    errors = dict.fromkeys(methods, 0.0)
    for step in range(FORECAST_STEPS + steps):
        logits = draw(step, tokens // ranks, experts, layers, skewed)
        exact: list[Tensor] = []
        # The gathered answer is the first, because the others are compared with it.
        for name in sorted(methods, key=lambda name: name != "gather and top-k"):
            if step < FORECAST_STEPS and not name.startswith(("ours", "gather")):
                continue
            dist.barrier()
            with counted_collectives() as collectives:
                start = time.perf_counter()
                cutoffs = methods[name](logits)
                elapsed = time.perf_counter() - start
            exact = exact or cutoffs
            known[:] = exact
            if step < FORECAST_STEPS:
                continue
            difference = (torch.stack(cutoffs) - torch.stack(exact)).abs().max()
            errors[name] = max(errors[name], float(difference))
            seconds[name].append(greatest(elapsed))
            calls[name].append(len(collectives.calls))
            volume[name].append(collectives.sent)
        thresholds[:] = exact or cutoffs
    for layer, cutoff in zip(logits, exact):  # by a third method
        whole = gathered(layer)
        k = rank_of(len(whole))
        assert torch.equal(whole.kthvalue(len(whole) - k + 1, dim=0).values, cutoff)
    rows = []
    for name, method in methods.items():
        loads = load_error(logits, method(logits))
        with OperationCounter() as counter:
            method(logits)
        rows.append(
            {
                "ranks": ranks,
                "tokens": tokens,
                "experts": experts,
                "layers": layers,
                "data": "skewed" if skewed else "equal",
                "method": name,
                "ms": round(1e3 * median(seconds[name]), 2),
                "ms_least": round(1e3 * min(seconds[name]), 2),
                "kB_sent": round(sum(volume[name]) / steps / 1e3, 1),
                "collectives": max(calls[name]),
                "syncs": counter.syncs,
                "MB_extra": round(greatest(counter.peak) / 1e6, 1),
                "cutoff_error": float(f"{errors[name]:.2g}"),
                "load_error_percent": round(100 * loads, 2),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    for case, group in itertools.groupby(
        rows, key=lambda row: [row[key] for key in ("ranks", "tokens", "experts", "layers", "data")]
    ):
        ranks, tokens, experts, layers, data = case
        print(f"\n{ranks} ranks, {tokens:,} tokens, {experts} experts, {layers} layers, {data}")
        columns = list(rows[0])[6:]
        print(f"  {'':<24}" + "".join(f"{column:>20}" for column in columns), flush=True)
        for row in group:
            print(f"  {row['method']:<24}" + "".join(f"{row[column]:>20}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, text in (
        ("ranks", 4, "Numbers of ranks to measure."),
        ("tokens", 524288, "Numbers of tokens on all ranks to measure."),
        ("experts", 16, "Numbers of experts to measure."),
        ("layers", 1, "Numbers of layers to measure."),
    ):
        text += f" Default: {default}, or a list of cases without any of these flags."
        parser.add_argument(f"--{name}", type=int, nargs="+", help=text)
    parser.add_argument(
        "--data",
        choices=("equal", "skewed"),
        nargs="+",
        help="Distributions of the logits over ranks to measure. Default: both.",
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="Number of timed steps per case. Default: 5."
    )
    args = parser.parse_args()
    grid = (args.ranks, args.tokens, args.experts, args.layers)
    cases = DEFAULT_CASES
    if any(grid):
        cases = list(
            itertools.product(
                args.ranks or [4], args.tokens or [524288], args.experts or [16], args.layers or [1]
            )
        )
    rows = []
    for ranks, tokens, experts, layers in cases:
        for data in args.data or ("equal", "skewed"):
            skewed = data == "skewed"
            if skewed and ranks == 1:
                continue
            case = (tokens, experts, layers, skewed, args.steps)
            results = run_ranks(measure, ranks, *case, timeout=600)[0]
            print_table(results)
            rows += results
    print()
    for row in rows:
        print(json.dumps({"benchmark": "router_stage", **row}))


if __name__ == "__main__":
    main()
