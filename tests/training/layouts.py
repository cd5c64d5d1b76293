"""Parallel layouts that must train as one rank does, and functions that train and compare them."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import run_ranks
from tests.megatron import DELTA_NET, MAMBA, TINY

STEPS, WARMUP = 20, 8
MODEL = [
    *TINY,
    *("--num-layers", "4", "--moe-layer-freq", "[0,1,1,1]", "--train-iters", str(STEPS)),
    *("--et-warmup-iters", str(WARMUP), "--et-capacity-pool", "global", "--et-capacity", "0.1"),
]
# Samples in the pool of expert choice, the micro-batch of all ranks. A step of TINY has 8 samples.
POOL = 4


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a run.

    Attributes:
        name: Name in the table.
        ranks: Number of ranks.
        data_parallel: Data-parallel size.
        flags: Flags that a user adds to the command to select the layout.
        kind: Comparison that the layout belongs to, a key of :data:`KINDS`.
        pool: Number of samples in a micro-batch of all data-parallel ranks.
    """

    name: str
    ranks: int
    data_parallel: int
    flags: tuple[str, ...] = ()
    kind: str = "fp32"
    pool: int = POOL

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Flags of the layout and of its comparison, and the micro-batch size of a rank."""
        micro_batch = ("--micro-batch-size", str(self.pool // self.data_parallel))
        return (*micro_batch, *KINDS[self.kind].flags, *self.flags)


@dataclass(frozen=True)
class Kind:
    """Comparison of several layouts with the same run on one rank.

    Attributes:
        title: Heading of the table.
        about: Text above the table.
        flags: Flags that all runs share.
        loss: Tolerance for losses.
        rest: Tolerance for gradient norms, cutoffs and thresholds.
        counts_may: Whether the numbers of routed tokens may differ.
        after_warmup: Whether the runs start from the checkpoint of the fp32 run on one rank at the
            end of its warm-up.
    """

    title: str
    about: str
    flags: tuple[str, ...]
    loss: float
    rest: float
    counts_may: bool = False
    after_warmup: bool = False


KINDS = {
    "fp32": Kind(
        "fp32",
        "Expert choice, then thresholds, with a capacity that drops and adds tokens. The product "
        "of micro-batch size and data-parallel size, which is the pool of expert choice, is the "
        "same in all rows.",
        (),
        1e-5,
        1e-4,
    ),
    "thresholds": Kind(
        "Any micro-batch",
        "Thresholds only, from one rank's checkpoint at the end of the warm-up. With cutoffs over "
        "the whole step and no capacity, the run depends only on the global batch.",
        # The checkpoint was trained with a capacity.
        ("--et-cutoff-pool", "step", "--et-capacity", "none", "--override-opt-param-scheduler"),
        1e-5,
        1e-4,
        after_warmup=True,
    ),
    "bf16": Kind(
        "bf16",
        "Comparison with one rank in bf16; main parameters and gradients are fp32. A different "
        "order of sums in bf16 moves logits across cutoffs, so that counts may differ.",
        ("--bf16",),
        5e-3,
        1e-1,
        counts_may=True,
    ),
    "hybrid": Kind(
        "Gated DeltaNet",
        "The comparison in fp32 for a [hybrid model](../how-to/pretraining.md#hybrid-models), of "
        "whose four layers two have Gated DeltaNet in place of attention. The initial weights are "
        "larger, so that these layers matter, and the learning rate is smaller, so that Adam does "
        "not amplify the rounding of their smallest gradients.",
        (*("--hybrid-layer-pattern", "G-*EGE*E", *DELTA_NET),
         *("--init-method-std", "0.1", "--lr", "3e-3")),
        1e-5,
        1e-4,
    ),
    "mamba": Kind(
        "Mamba-2",
        "The same comparison for Mamba-2 in place of Gated DeltaNet.",
        (*("--hybrid-layer-pattern", "M-*EME*E", *MAMBA),
         *("--init-method-std", "0.1", "--lr", "3e-3")),
        1e-5,
        1e-4,
    ),
    "depths": Kind(
        "Multi-token prediction",
        "The comparison in fp32 for a model that also predicts "
        "[two further tokens](../how-to/pretraining.md#multi-token-prediction). The losses of "
        "these depths count as losses.",
        ("--mtp-num-layers", "2", "--mtp-loss-scaling-factor", "0.3"),
        1e-5,
        1e-4,
    ),
}  # fmt: skip

TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP2 = ("--expert-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
WHOLE_EXPERTS = ("--expert-tensor-parallel-size", "1")
SHARDED = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
INTERLEAVED = ("--num-layers-per-virtual-pipeline-stage", "1")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")

ONE_RANK = {kind: Layout("one rank", 1, 1, kind=kind) for kind in KINDS}
LAYOUTS = [
    Layout("DP 2", 2, 2),
    Layout("DP 4", 4, 4),
    Layout("DP 2, gradient reduction overlapped", 2, 2, OVERLAP[:1]),
    Layout("DP 2, distributed optimizer", 2, 2, SHARDED),
    Layout("DP 2, distributed optimizer, both overlapped", 2, 2, (*SHARDED, *OVERLAP)),
    Layout("EP 2", 2, 2, EP2),
    Layout("EP 2, distributed optimizer", 2, 2, (*EP2, *SHARDED)),
    Layout("EP 2, all-gather dispatcher", 2, 2, (*EP2, "--moe-token-dispatcher-type", "allgather")),
    Layout("EP 4", 4, 4, ("--expert-model-parallel-size", "4")),
    Layout("TP 2, expert TP 2", 2, 1, TP2),
    Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS)),
    Layout("TP 2, EP 2, expert TP 2", 4, 2, (*TP2, *EP2)),
    Layout("TP 2, EP 2, DP 2", 4, 2, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED)),
    Layout("CP 2", 2, 1, CP2),
    Layout("CP 2, TP 2, EP 2", 4, 1, (*CP2, *TP2, *EP2)),
    Layout("PP 2", 2, 1, PP2),
    Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED)),
    Layout("PP 2, EP 2", 4, 2, (*PP2, *EP2, *SHARDED)),
    Layout("PP 2, CP 2", 4, 1, (*PP2, *CP2)),
    Layout("full recomputation", 1, 1, (*FULL, "--recompute-num-layers", "1")),
    Layout("MoE layers recomputed", 1, 1, ("--recompute-granularity", "selective",
                                           "--recompute-modules", "moe")),
    Layout("DP 1, 1 micro-batch", 1, 1, kind="thresholds", pool=8),
    Layout("DP 1, 4 micro-batches", 1, 1, kind="thresholds", pool=2),
    Layout("DP 2, 4 micro-batches", 2, 2, kind="thresholds", pool=2),
    Layout("DP 2", 2, 2, kind="bf16"),
    Layout("TP 2, EP 2, distributed optimizer", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED),
           kind="bf16"),
    *(layout for kind in ("hybrid", "mamba") for layout in (
        Layout("DP 2, distributed optimizer", 2, 2, (*SHARDED, *OVERLAP), kind),
        Layout("EP 2", 2, 2, EP2, kind),
        Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED), kind),
        Layout("CP 2", 2, 1, CP2, kind),
        Layout("CP 2, TP 2, EP 2", 4, 1, (*CP2, *TP2, *EP2), kind),
        Layout("PP 2", 2, 1, PP2, kind),
        Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED), kind),
        Layout("full recomputation", 1, 1, (*FULL, "--recompute-num-layers", "1"), kind),
    )),
    Layout("DP 2, distributed optimizer", 2, 2, (*SHARDED, *OVERLAP), "depths"),
    Layout("EP 2", 2, 2, EP2, "depths"),
    Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED), "depths"),
    Layout("CP 2", 2, 1, CP2, "depths"),
    Layout("CP 2, TP 2, EP 2", 4, 1, (*CP2, *TP2, *EP2), "depths"),
    Layout("PP 2", 2, 1, PP2, "depths"),
    Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED), "depths"),
    Layout("full recomputation", 1, 1, (*FULL, "--recompute-num-layers", "1"), "depths"),
]  # fmt: skip


def layouts_of(kind: str) -> dict[str, Layout]:
    """Return the layouts of a comparison by their names."""
    return {layout.name: layout for layout in LAYOUTS if layout.kind == kind}


def _pretrain(flags: list[str]) -> None:
    from pretrain_et import main

    sys.argv = ["pretrain_et.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:  # a run that --exit-interval stops exits with code 0
            if end.code:
                raise


def train(
    run_dir: Path,
    layout: Layout,
    *flags: str,
    save: bool = False,
    pretrain: Callable[[list[str]], None] = _pretrain,
) -> list[Any]:
    """Train on real ranks and return the training rows.

    Args:
        run_dir: Run directory. The run resumes from its checkpoints if there are any.
        layout: Parallel layout.
        flags: Flags in addition to those of the layout.
        save: Whether the run saves checkpoints, which take a third of its time.
        pretrain: Function that trains on a rank.
    """
    unsaved = () if save else ("--save", "")
    argv = [*MODEL, "--run-dir", str(run_dir), *layout.all_flags, *unsaved, *flags]
    run_ranks(pretrain, layout.ranks, argv, timeout=200)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@dataclass(frozen=True)
class Difference:
    """Largest differences between two runs, and whether all their routing counts are equal."""

    loss: float
    rest: float
    counts: bool


def difference(rows: list[Any], expected: list[Any]) -> Difference:
    """Compare the training rows of two runs, which must contain the same steps."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    loss, rest, counts = 0.0, 0.0, True
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys()
        loss = max(loss, abs(row["loss"] - other["loss"]))
        rest = max(rest, abs(row["grad_norm"] - other["grad_norm"]))
        for key in row:
            name = key.rsplit("/", 1)[-1]
            if name in ("threshold", "cutoff"):
                pairs = _pairs(row[key], other[key])
                rest = max(rest, *(abs(a - b) for a, b in pairs))
            elif name.startswith("mtp_"):  # the loss of a depth of multi-token prediction
                loss = max(loss, abs(row[key] - other[key]))
            elif name in ("load", "fan_out_histogram", "saturation", "starvation"):
                counts = counts and row[key] == other[key]
    return Difference(loss, rest, counts)


def holds(measured: Difference, layout: Layout) -> bool:
    """Return whether a difference is within the tolerance of the layout's comparison."""
    kind = KINDS[layout.kind]
    return (
        measured.loss <= kind.loss
        and measured.rest <= kind.rest
        and (measured.counts or kind.counts_may)
    )


def _pairs(a: Any, b: Any) -> Iterator[tuple[float, float]]:
    return zip(a, b) if isinstance(a, list) else iter([(a, b)])
