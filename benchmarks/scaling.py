"""Model the communication of a step on 8 to 8,192 ranks: exact cutoffs or gathered logits.

The traffic is that of the code that trains: `--dry-run` traces one rank of each pipeline stage
under torch's fake process group, by expert choice and by thresholds. If the work of a rank does
not depend on the number of ranks, it is traced once, and the groups that Megatron creates for
every other number are substituted; only the padding of gradient buffers is then wrong, by less
than the number of ranks of the group times 128 elements. A cost model of latency and bandwidth
(`_cost_model.py`) converts calls and bytes into time, without overlap. Per model, batch and number
of ranks:

    thresholds       cutoffs at the end of the step, all layers in one search
    expert choice    cutoffs in every layer's forward pass
    gather logits    in every layer's forward pass all logits on every rank, 4 bytes times tokens
                     times experts, as the paper's code does, instead of either

`weak` has 16,384 tokens per rank in one micro-batch; `fixed` has the global batch of the recipe, on
numbers of ranks that divide it. The number of rounds of the search is that of random logits.

    python benchmarks/scaling.py [--models d20 48x128] [--ranks 8 64 512] [--batches weak fixed]
        [--output runs/scaling] [--intra-latency-us 2 ...] [flags of pretrain_et.py: the layout]
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.fspath(ROOT))

from megatron_ext.devices import activate  # noqa: E402

activate(use_cuda=False)

import matplotlib  # noqa: E402
import torch.distributed as dist  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from megatron.training.training import destroy_global_state  # noqa: E402

from benchmarks._cost_model import Network, NetworkLink, Place  # noqa: E402
from megatron_ext.arguments import parse_args  # noqa: E402
from megatron_ext.moe.router import routers_of  # noqa: E402
from megatron_ext.planning.dry_run import stage_ranks  # noqa: E402
from megatron_ext.planning.dry_run.simulated_rank import Rank, fake_rank  # noqa: E402
from megatron_ext.planning.dry_run.traffic import Amount, Collective  # noqa: E402


@dataclass(frozen=True)
class Model:
    """Model with the sizes of its batches, in sequences.

    Attributes:
        flags: Flags of `pretrain_et.py`, without batch and layout.
        micro_batch: Micro-batch of each rank for weak scaling.
        batch: Global batch of the recipe, or None without one.
    """

    flags: tuple[str, ...]
    micro_batch: int
    batch: int | None


RECIPES = ROOT / "examples" / "recipes"
MODELS = {
    "d20": Model(("--recipe", str(RECIPES / "d20.yaml")), 8, 256),
    # The shape of Qwen3-30B-A3B.
    "48x128": Model(
        (
            *("--recipe", str(RECIPES / "base.yaml"), "--vocab-size", "151936"),
            *("--num-layers", "48", "--hidden-size", "2048", "--num-attention-heads", "32"),
            *("--kv-channels", "128", "--group-query-attention", "--num-query-groups", "4"),
            *("--seq-length", "4096", "--max-position-embeddings", "4096"),
            *("--num-experts", "128", "--moe-router-topk", "8", "--moe-ffn-hidden-size", "768"),
            *("--ffn-hidden-size", "6144", "--train-iters", "10000", "--lr", "1e-3"),
            *("--use-distributed-optimizer", "--bf16"),
        ),
        4,
        None,
    ),
}
LAYOUT = ("--expert-model-parallel-size", "8")
POOL = "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP"  # ranks over whose tokens a cutoff is taken
METHODS = ("thresholds", "expert choice", "gather logits")


@dataclass(frozen=True)
class Batch:
    """Batch of each data-parallel rank in a step, in sequences."""

    micro_batch: int
    micro_batches: int


@contextlib.contextmanager
def _ranks(
    flags: Sequence[str], ranks: int, batch: Batch
) -> Iterator[tuple[argparse.Namespace, Any]]:
    """Set Megatron's global state to that of a run on some ranks, for the duration of a block."""
    data_size = data_parallel(flags, ranks)
    global_batch = batch.micro_batch * batch.micro_batches * data_size
    sizes = ("--micro-batch-size", str(batch.micro_batch), "--global-batch-size", str(global_batch))
    words = [*flags, "--dry-run", str(ranks), *sizes]
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield parse_args(words)
        finally:
            destroy_global_state()


def data_parallel(flags: Sequence[str], ranks: int) -> int:
    """Return the data-parallel size."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    names = [f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context")]
    for name in names:
        parser.add_argument(name, type=int, default=1)
    for size in vars(parser.parse_known_args(list(flags))[0]).values():
        ranks //= size
    return ranks


def trace(flags: Sequence[str], ranks: int, batch: Batch) -> list[dict[str, Any]]:
    """Return the traffic of each stage's first rank by method, and the sizes of gathered logits."""
    stages = []
    with _ranks(flags, ranks, batch) as (args, config):
        for number in stage_ranks(args):
            with fake_rank(args, number):
                rank = Rank(args, config)
                stages.append(
                    {
                        "layers": len(routers_of(rank.model)),
                        "experts": config.num_moe_experts,
                        "sequence": args.seq_length,
                        "thresholds": rank.take_step(by_threshold=True).collectives,
                        "expert choice": rank.take_step(by_threshold=False).collectives,
                    }
                )
    return stages


def group_places(
    flags: Sequence[str], ranks: int, batch: Batch, ranks_per_node: int
) -> list[dict[str, Place]]:
    """Return the groups that Megatron creates for the first rank of each stage, by name."""
    stages = []
    with _ranks(flags, ranks, batch) as (args, _):
        for number in stage_ranks(args):
            with fake_rank(args, number):
                groups = list(dist.distributed_c10d._world.pg_map)
                members = {g.group_desc: dist.get_process_group_ranks(g) for g in groups}
            stages.append({name: Place.of(m, ranks_per_node) for name, m in members.items()})
    return stages


def extend(
    traced: dict[str, Any], places: dict[str, Place], ranks: int, batch: Batch
) -> dict[str, dict[Collective, Amount]]:
    """Return the traffic by method of a stage with other groups and the same work of a rank.

    Args:
        traced: Result of :func:`trace`, with groups of any size.
        places: Groups of the stage.
        ranks: Data-parallel size.
        batch: Batch of each rank.
    """
    amounts: dict[str, dict[Collective, Amount]] = {}
    for method in ("thresholds", "expert choice"):
        amounts[method] = {
            key._replace(ranks=places[key.group].ranks): amount
            for key, amount in traced[method].items()
            if places[key.group].ranks > 1
        }
    gather = Collective("routing", "all-gather", POOL, places[POOL].ranks)
    calls = traced["layers"] * batch.micro_batches
    tokens = batch.micro_batch * traced["sequence"] * ranks
    rest = {k: v for k, v in amounts["thresholds"].items() if not k.purpose.startswith("routing")}
    gathers = {gather: Amount(calls, calls * 4 * tokens * traced["experts"])} if calls else {}
    amounts["gather logits"] = rest | gathers
    return amounts


def priced(
    traffic: dict[Collective, Amount], places: dict[str, Place], network: Network
) -> dict[str, Any]:
    """Return calls, bytes and milliseconds of a stage's step by purpose."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    ms: dict[str, float] = {"routing": 0.0}
    for key, amount in traffic.items():
        purpose = "routing" if key.purpose.startswith("routing") else key.purpose
        mean = amount.bytes / amount.calls
        seconds = amount.calls * network.seconds(key.operation, mean, places[key.group])
        calls[purpose] += amount.calls
        size[purpose] += amount.bytes
        ms[purpose] = ms.get(purpose, 0.0) + 1e3 * seconds
    total = sum(ms.values())
    return {
        "routing_calls": calls["routing"],
        "routing_bytes": size["routing"],
        "routing_ms": round(ms["routing"], 3),
        "total_ms": round(total, 3),
        "routing_percent": round(100 * ms["routing"] / total, 3) if total else 0.0,
        "ms": {purpose: round(value, 3) for purpose, value in ms.items()},
        "bytes": dict(size),
    }


def batches_of(
    model: Model, kind: str, ranks: Sequence[int], flags: Sequence[str]
) -> dict[int, Batch]:
    """Return the work of a rank by number of ranks, for numbers that divide the batch."""
    if kind == "weak":
        return {n: Batch(model.micro_batch, 1) for n in ranks}
    batches = {}
    for n in ranks:
        share, rest = divmod(model.batch or 0, data_parallel(flags, n))
        if share and not rest:
            micro = next(m for m in range(model.micro_batch, 0, -1) if share % m == 0)
            batches[n] = Batch(min(micro, share), share // min(micro, share))
    return batches


def measure(
    name: str, model: Model, kind: str, ranks: Sequence[int], layout: Sequence[str],
    network: Network,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of a model and a kind of batch, for the slowest stage."""
    flags = [*model.flags, *layout]
    batches = batches_of(model, kind, ranks, flags)
    traced: dict[Batch, list[dict[str, Any]]] = {}
    for n, batch in sorted(
        batches.items(), reverse=True
    ):  # the largest number of ranks, so that no group has one rank
        if batch not in traced:
            traced[batch] = trace(flags, n, batch)
    rows = []
    for n, batch in batches.items():
        apart = data_parallel(flags, n)
        stages = group_places(flags, n, batch, network.ranks_per_node)
        traffic = [extend(t, p, apart, batch) for t, p in zip(traced[batch], stages)]
        sequence = traced[batch][0]["sequence"]
        for method in METHODS:
            costs = [priced(t[method], p, network) for t, p in zip(traffic, stages)]
            stage, slowest = max(enumerate(costs), key=lambda cost: cost[1]["total_ms"])
            rows.append(
                {
                    "model": name,
                    "batch": kind,
                    "ranks": n,
                    "tokens": batch.micro_batch * batch.micro_batches * apart * sequence,
                    "micro_batches": batch.micro_batches,
                    "method": method,
                    "stage": stage,
                    **slowest,
                }
            )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['model']}, {rows[0]['batch']} batch; a step of a rank")
    purposes = sorted({p for row in rows for p in row["ms"]} - {"routing"})
    heads = ["ranks", "tokens", "method", "calls", "routing MB", "routing ms", "routing %"]
    heads += [f"{purpose} ms" for purpose in purposes] + ["total ms"]
    widths = [6, 12, 15, *(max(10, len(head)) for head in heads[3:])]
    print("  ".join(head.rjust(width) for head, width in zip(heads, widths)))
    for row in rows:
        cells = [f"{row['ranks']:,}", f"{row['tokens']:,}", row["method"]]
        cells += [f"{row['routing_calls']:,}", f"{row['routing_bytes'] / 1e6:,.2f}"]
        cells += [f"{row['routing_ms']:,.2f}", f"{row['routing_percent']:.2f}"]
        cells += [f"{row['ms'].get(purpose, 0.0):,.2f}" for purpose in purposes]
        cells += [f"{row['total_ms']:,.1f}"]
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)), flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of the routing statistics by method, and of all other traffic, over ranks."""
    matplotlib.use("agg")
    panels = sorted({(row["model"], row["batch"]) for row in rows})
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, (model, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        chosen = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        for method in METHODS:
            line = [row for row in chosen if row["method"] == method]
            counts = [row["ranks"] for row in line]
            axes.plot(counts, [row["routing_ms"] for row in line], "o-", label=method)
        rest = [row["total_ms"] - row["routing_ms"] for row in line]
        axes.plot(counts, rest, "--", color="gray", label="all other traffic")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set(title=f"{model}, {batch} batch", xlabel="ranks", ylabel="ms a step (modelled)")
        axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    models, counts = list(MODELS), [8, 32, 128, 512, 2048, 8192]
    text = f"Models to compute. Default: {' '.join(models)}."
    add("--models", nargs="+", choices=MODELS, default=models, help=text)
    text = f"Numbers of ranks to compute. Default: {' '.join(map(str, counts))}."
    add("--ranks", nargs="+", type=int, default=counts, help=text)
    text = "Batch that grows with the ranks, or that is the same on all of them. Default: both."
    add("--batches", nargs="+", choices=("weak", "fixed"), help=text)
    text = "Folder to write the picture to. Default: %(default)s."
    add("--output", type=Path, default=Path("runs/scaling"), help=text)
    for name, default, text in (
        ("ranks-per-node", 8, "Number of GPUs per node."),
        ("intra-latency-us", 2.0, "Latency between GPUs of a node in microseconds."),
        ("intra-gb-s", 450.0, "Bandwidth of a GPU within a node, one way, in GB/s (NVLink 4)."),
        ("inter-latency-us", 5.0, "Latency between nodes in microseconds."),
        ("inter-gb-s", 50.0, "Bandwidth of a GPU's network adapter, one way, in GB/s (NDR 400)."),
    ):
        text += " Default: %(default)s."
        add(f"--{name}", type=type(default), default=default, help=text)
    options, layout = parser.parse_known_args()
    network = Network(
        NetworkLink(1e-6 * options.intra_latency_us, 1e9 * options.intra_gb_s),
        NetworkLink(1e-6 * options.inter_latency_us, 1e9 * options.inter_gb_s),
        options.ranks_per_node,
    )
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for kind in options.batches or ("weak", "fixed"):
            model = MODELS[name]
            if kind == "fixed" and model.batch is None:
                continue
            measured = measure(name, model, kind, options.ranks, [*LAYOUT, *layout], network)
            if measured:
                print_table(measured)
            rows += measured
    if rows:
        draw(rows, options.output / "scaling.png")
        print(f"\npicture: {options.output / 'scaling.png'}")
    for row in rows:
        print(json.dumps({"benchmark": "scaling", **row}))


if __name__ == "__main__":
    main()
