"""Compare the training speed of routers, and the phases of a step.

Trains with `pretrain_et.py` on mock data: expert threshold, expert choice, token choice balanced
by auxiliary loss and by bias, and a dense model with as many active parameters. Real ranks of all
five take steps in turn, forth and back, so that other load on the machine affects all of them
equally. Half of the steps are timed without further measurement, for tokens per second; in the
other half each rank measures every phase (`_phases.py`), and the overhead is reported.

    step ms         median over steps of the slowest rank
    spread %        interquartile range of the steps over the median
    speed           against token choice with auxiliary loss, median over turns
    experts         routed experts per token, mean over layers and steps
    overhead %      time that the measurement of phases adds to a step

On several ranks the experts are distributed over all of them. Expert threshold trains by expert
choice for two steps of the warm-up, and then by thresholds.

    python benchmarks/end_to_end.py [--ranks 1 2] [--hidden-size 256] [--layers 4]
        [--seq-length 256] [--rounds 2]
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any
from unittest import mock

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from tests.distributed import run_ranks

WARMUP = 4  # steps that are not timed
TURNS = 4  # steps of a round: forth and back, without and with phases
TIMEOUT = 600
SEQUENCES = 8  # of a rank in a step
MIXTURE = (
    *("--num-experts", "16", "--moe-router-topk", "1", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-score-function", "sigmoid"),
)
TOKEN_CHOICE = (*MIXTURE, "--router-type", "token-choice")
REFERENCE = "token choice, aux loss"
ROUTERS: dict[str, tuple[str, ...]] = {
    "expert threshold": (
        *(*MIXTURE, "--router-type", "expert-threshold", "--et-warmup-iters", "2"),
        *("--et-ema-decay", "0.9"),
    ),
    "expert choice": (*MIXTURE, "--router-type", "expert-choice"),
    REFERENCE: (
        *(*TOKEN_CHOICE, "--moe-router-load-balancing-type", "aux_loss"),
        *("--moe-aux-loss-coeff", "1e-3"),
    ),
    "token choice, loss-free": (
        *(*TOKEN_CHOICE, "--moe-router-load-balancing-type", "none"),
        *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "5e-3"),
    ),
    "dense": (),
}


@dataclass
class TimedStep:
    """Step on one rank: seconds, seconds of each measured phase, and routed experts per token."""

    seconds: float
    phases: Counter[str] = field(default_factory=Counter)
    experts: float = 0.0


def model_flags(hidden: int, layers: int, sequence: int) -> list[str]:
    """Return flags of the paper's model: granularity 2, a shared expert, a dense first layer."""
    sizes = {
        "num-layers": layers,
        "hidden-size": hidden,
        "num-attention-heads": max(1, hidden // 64),
        "ffn-hidden-size": 4 * hidden,
        "seq-length": sequence,
        "max-position-embeddings": sequence,
        "vocab-size": 1023,
        "micro-batch-size": SEQUENCES,
    }
    return [
        *("--recipe", str(Path(__file__).parent.parent / "examples" / "recipes" / "base.yaml")),
        *(word for name, size in sizes.items() for word in (f"--{name}", str(size))),
        *("--mock-data", "--tokenizer-type", "NullTokenizer", "--split", "90,5,5"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--use-distributed-optimizer"),
        *("--eval-iters", "0", "--eval-interval", "1000000", "--log-interval", "1000000"),
        *("--num-workers", "0"),
    ]


def router_flags(router: str, hidden: int, layers: int, ranks: int) -> list[str]:
    if router == "dense":
        return []
    return [
        *ROUTERS[router],
        *("--moe-ffn-hidden-size", str(2 * hidden)),
        *("--moe-shared-expert-intermediate-size", str(2 * hidden)),
        *("--moe-layer-freq", f"[0]+[1]*{layers - 1}"),
        *("--expert-model-parallel-size", str(ranks)),
    ]


def keeps_phases(number: int) -> bool:
    return number >= WARMUP and (number - WARMUP) % TURNS >= TURNS // 2


def train(flags: list[str], port: int, name: str) -> list[TimedStep]:
    """Train on this rank, with each step in the turn of `name` according to the store on `port`."""
    import pretrain_et
    from benchmarks._phases import Phases
    from megatron_ext.training import trainer

    turns = dist.TCPStore("127.0.0.1", port, is_master=False)
    turns.set(f"{name}/here/{dist.get_rank()}", "")
    steps: list[TimedStep] = []
    commit_after = trainer.commit_after

    def taking_turns(train_step: Any, routing: Any) -> Any:
        inner = commit_after(train_step, routing)

        def timed(*args: Any, **kwargs: Any) -> Any:
            number = len(steps)
            turns.wait([f"{name}/{number}"], timedelta(seconds=TIMEOUT))
            phases = Phases()
            model, optimizer = args[2:4]
            dist.barrier()
            with contextlib.ExitStack() as stack:
                if keeps_phases(number):
                    stack.enter_context(phases.measuring(model, optimizer))
                start = time.perf_counter()
                result = inner(*args, **kwargs)
                seconds = time.perf_counter() - start
            fan_outs = [layer["fan_out"] for layer in routing.metrics.values()]
            steps.append(TimedStep(seconds, phases.seconds, mean(fan_outs) if fan_outs else 0.0))
            turns.set(f"{name}/{number}/{dist.get_rank()}", "")
            return result

        return timed

    sys.argv = ["pretrain_et.py", *flags]
    with mock.patch.object(trainer, "commit_after", taking_turns), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain_et.main()
    return steps


def take_turns(
    flags: dict[str, list[str]], ranks: int, rounds: int
) -> dict[str, list[list[TimedStep]]]:
    """Train all models side by side, and return the steps of each of their ranks."""
    turns = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    steps = WARMUP + TURNS * rounds
    started: dict[str, Future[list[list[TimedStep]]]] = {}

    def wait(*keys: str) -> None:
        while not turns.check(list(keys)):
            time.sleep(2e-3)
            for future in started.values():
                if future.done():
                    future.result()  # raises the error of a rank

    with ThreadPoolExecutor(len(flags)) as threads:
        for name, words in flags.items():
            words = [
                *words,
                "--global-batch-size",
                str(SEQUENCES * ranks),
                "--train-iters",
                str(steps),
            ]
            started[name] = threads.submit(
                run_ranks, train, ranks, words, turns.port, name, timeout=TIMEOUT
            )
            wait(
                f"{name}/here/0"
            )  # one after the other, because starting ranks changes the environment
        for number in range(steps):
            for name in list(flags) if number % 2 else reversed(flags):
                turns.set(f"{name}/{number}", "")
                wait(*(f"{name}/{number}/{rank}" for rank in range(ranks)))
        return {name: future.result() for name, future in started.items()}


def summary(
    steps: dict[str, list[list[TimedStep]]], ranks: int, tokens: int
) -> list[dict[str, Any]]:
    """Return one row per model.

    Args:
        steps: Steps of every model, by rank.
        ranks: Number of ranks.
        tokens: Tokens of all ranks in a step.
    """
    timed = range(WARMUP, len(steps[REFERENCE][0]))
    slowest = {
        name: [max(step.seconds for step in turn) for turn in zip(*of_ranks)]
        for name, of_ranks in steps.items()
    }
    rows = []
    for name, of_ranks in steps.items():
        plain = [n for n in timed if not keeps_phases(n)]
        watched = [n for n in timed if keeps_phases(n)]
        seconds = [slowest[name][n] for n in plain]
        low, middle, high = quantiles(seconds, n=4)
        ratios = [slowest[REFERENCE][n] / slowest[name][n] for n in plain]
        phases: Counter[str] = Counter()
        for rank in of_ranks:
            for n in watched:
                phases.update(rank[n].phases)
        whole = phases.total()
        cost = median(slowest[name][n] for n in watched) / middle - 1
        rows.append(
            {
                "ranks": ranks,
                "router": name,
                "tokens_per_s": round(tokens / middle, 1),
                "step_ms": round(1e3 * middle, 1),
                "spread_percent": round(100 * (high - low) / middle, 1),
                "speed": round(median(ratios), 4),
                "speed_least": round(min(ratios), 4),
                "speed_most": round(max(ratios), 4),
                "experts": round(mean(rank[n].experts for rank in of_ranks for n in timed), 3),
                "overhead_percent": round(100 * cost, 1),
                "phases_percent": {name: round(100 * s / whole, 2) for name, s in phases.items()},
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], phases: Sequence[str]) -> None:
    print(f"\n{rows[0]['ranks']} rank(s); phases in % of the step")
    heads = ["router", "tokens/s", "step ms", "spread %", "speed", "(least", "most)", "experts"]
    heads += ["overhead %", "|", *phases]
    widths = [24, *(max(8, len(head)) for head in heads[1 : -len(phases) - 1]), 1]
    widths += [max(6, len(phase)) for phase in phases]
    print("  ".join(head.rjust(width) for head, width in zip(heads, widths)))
    for row in rows:
        cells = [row["router"], f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:,.0f}"]
        cells += [f"{row['spread_percent']:.1f}", f"{row['speed']:.3f}"]
        cells += [f"{row['speed_least']:.3f}", f"{row['speed_most']:.3f}"]
        cells += [f"{row['experts']:.2f}", f"{row['overhead_percent']:.1f}", "|"]
        cells += [f"{row['phases_percent'].get(phase, 0.0):.2f}" for phase in phases]
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--ranks",
        nargs="+",
        type=int,
        default=[1, 2],
        help="Numbers of ranks to measure. Default: 1 2.",
    )
    add(
        "--hidden-size",
        type=int,
        default=256,
        help="Hidden size of the model. Default: %(default)s.",
    )
    add(
        "--layers", type=int, default=4, help="Number of layers of the model. Default: %(default)s."
    )
    add(
        "--seq-length",
        type=int,
        default=256,
        help="Length of a sequence in tokens. Default: %(default)s.",
    )
    rounds = f"Number of rounds of {TURNS} timed steps each. Default: %(default)s."
    add("--rounds", type=int, default=2, help=rounds)
    options = parser.parse_args()
    hidden, layers, sequence = options.hidden_size, options.layers, options.seq_length
    phases = "attention, experts, dispatch, router, cutoffs, gradients, optimizer, data, other"
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        flags = {
            name: model_flags(hidden, layers, sequence) + router_flags(name, hidden, layers, ranks)
            for name in ROUTERS
        }
        steps = take_turns(flags, ranks, options.rounds)
        speed = summary(steps, ranks, tokens=SEQUENCES * sequence * ranks)
        print_table(speed, phases.split(", "))
        rows += speed
    print()
    for row in rows:
        print(json.dumps({"benchmark": "end_to_end", **row}))


if __name__ == "__main__":
    main()
