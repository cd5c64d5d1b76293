"""Compare one MoE layer under threshold routing with token choice and with plain matrix products.

8,192 tokens, 16 routed experts and a shared one of twice the model's width each, squared ReLU, and
one routed expert per token on average in every row. `of_matmul_rate` is the time of the layer's
matrix products alone, with the rows of each expert adjacent and equal loads, over the time of the
layer. Every step is timed next to its products, because the speed of a machine drifts by more than
rows differ; `of_token_choice` compares rows by that rate. The last row has squared ReLU as Megatron
writes it. Each rank has one thread, and times are processor time, on which other load on the
machine has less effect than on wall-clock time. Thresholds are computed by two steps of expert
choice first.

    python benchmarks/moe_layer.py [--d-model 256 768] [--ranks 1] [--steps 5]
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from tests import megatron
from tests.distributed import run_ranks

SEQUENCE, BATCH, EXPERTS = 1024, 8, 16
WARM_UP = 3

TOKEN_CHOICE = [
    *("--router-type", "token-choice", "--moe-router-pre-softmax"),
    *("--moe-aux-loss-coeff", "1e-3"),
]
ROUTERS = {
    "expert threshold": ["--et-warmup-iters", str(WARM_UP - 1)],
    "expert choice": ["--router-type", "expert-choice"],
    "token choice": TOKEN_CHOICE,
    "token choice, plain ReLU²": TOKEN_CHOICE,
}


def flags(d_model: int, dispatcher: str) -> list[str]:
    return [
        *("--hidden-size", str(d_model), "--moe-ffn-hidden-size", str(2 * d_model)),
        *("--moe-shared-expert-intermediate-size", str(2 * d_model)),
        *("--num-experts", str(EXPERTS), "--moe-router-topk", "1"),
        *("--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE)),
        *("--expert-model-parallel-size", str(dist.get_world_size())),
        *("--moe-token-dispatcher-type", dispatcher),
    ]


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of the slowest rank."""
    dist.barrier()
    start, start_busy = time.perf_counter(), time.process_time()
    function()
    seconds = [time.perf_counter() - start, time.process_time() - start_busy]
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest[0]), float(slowest[1])


def matmuls(tokens: int, d_model: int) -> Callable[[], None]:
    """Return the matrix products of a step, of a shared expert and of the local routed experts."""
    local = EXPERTS // dist.get_world_size()
    width = 2 * d_model
    sizes = [tokens] + [tokens // local] * local
    products = []
    for rows in sizes:
        x, h = torch.randn(rows, d_model), torch.randn(rows, width)
        w1, w2 = torch.randn(width, d_model), torch.randn(d_model, width)
        products += [(x, w1.T), (h, w2.T), (x, w2), (x.T, h), (h, w1), (h.T, x)]

    def run() -> None:
        for a, b in products:
            a @ b

    return run


def measure(router: str, dispatcher: str, d_model: int, steps: int) -> dict[str, float]:
    """Return medians of a step's seconds and share of the matmul rate, and experts per token."""
    from megatron.core import activations

    from megatron_ext.model import language_model

    if router.endswith("plain ReLU²"):
        language_model.squared_relu = activations.squared_relu
    with contextlib.redirect_stdout(io.StringIO()):
        _, _, model = megatron.start(*flags(d_model, dispatcher), *ROUTERS[router])
    from megatron_ext.moe.router import routers_of
    from megatron_ext.training.step import RoutingStep

    layer, end = model[0].decoder.layers[-1].mlp, RoutingStep()
    generator = torch.Generator().manual_seed(dist.get_rank())
    batch = BATCH // dist.get_world_size()
    hidden = torch.randn(SEQUENCE, batch, d_model, generator=generator)

    def step() -> None:
        x = hidden.clone().requires_grad_()
        layer.zero_grad()
        layer(x)[0].sum().backward()
        end.resolve(routers_of(model))
        end.commit()

    for _ in range(WARM_UP):
        step()
    [figures] = end.metrics.values()
    products = matmuls(SEQUENCE * batch, d_model)
    products()
    # A machine's speed drifts, so ratios of neighbors in time vary less than ratios of medians.
    pairs = [(timed(step), timed(products)) for _ in range(steps)]
    return {
        "seconds": median(clock for (clock, _), _ in pairs),
        "busy": median(busy for (_, busy), _ in pairs),
        "rate": median(bare / busy for (_, busy), (_, bare) in pairs),
        "fan_out": figures["fan_out"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--d-model", type=int, nargs="+", default=[256, 768],
        help="Hidden sizes to measure. Default: 256 768.",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, default=1, help="Number of ranks of the layer. Default: 1."
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="Number of timed steps per case. Default: 5."
    )
    args = parser.parse_args()
    rows = []
    for d_model in args.d_model:
        print(f"\nd_model {d_model}, {args.ranks} ranks")
        columns = ("ms", "cpu_ms", "of_token_choice", "of_matmul_rate", "fan_out")
        print(f"  {'':<38}" + "".join(f"{column:>17}" for column in columns), flush=True)
        for dispatcher in ("alltoall", "allgather"):
            reference = 0.0
            for router in ("token choice", *(name for name in ROUTERS if name != "token choice")):
                case = (router, dispatcher, d_model, args.steps)
                times = run_ranks(measure, args.ranks, *case, timeout=600)[0]
                reference = reference or times["rate"]
                row = {
                    "d_model": d_model,
                    "ranks": args.ranks,
                    "router": router,
                    "dispatcher": dispatcher,
                    "ms": round(1e3 * times["seconds"], 1),
                    "cpu_ms": round(1e3 * times["busy"], 1),
                    "of_token_choice": round(reference / times["rate"], 3),
                    "of_matmul_rate": round(times["rate"], 3),
                    "fan_out": round(times["fan_out"], 3),
                }
                rows.append(row)
                print(
                    f"  {router + ', ' + dispatcher:<38}"
                    + "".join(f"{row[column]:>17}" for column in columns),
                    flush=True,
                )
    print()
    for row in rows:
        print(json.dumps({"benchmark": "moe_layer", **row}))


if __name__ == "__main__":
    main()
