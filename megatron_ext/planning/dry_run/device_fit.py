"""Comparison of the memory that a rank needs with a device, and the change that helps most."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.planning.devices import MIB, Device
from megatron_ext.planning.dry_run.dry_run_report import EITHER, LABELS, STEP_ALONE, SUMS

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Demand:
    """Memory at the peak of the rank that needs most.

    Attributes:
        stage: Pipeline stage of the rank.
        parts: Bytes by purpose, the largest first.
        logits: Bytes of the logits of the vocabulary within the parts.
    """

    stage: int
    parts: dict[str, int]
    logits: int

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts.values())


def demand(facts: Facts, device: Device) -> Demand:
    """Return the memory of the rank that needs most.

    Args:
        facts: Facts of a dry run.
        device: The device of a rank. On a host the temporary tensors of torch's optimizers count,
            and everywhere those of Muon; the fused Adam of a GPU has none.
    """
    stages = range(len(facts["stages"]))
    return max((_demand_of_stage(facts, device, stage) for stage in stages), key=lambda d: d.total)


def _demand_of_stage(facts: Facts, device: Device, stage: int) -> Demand:
    of_stage = facts["stages"][stage]
    memory = of_stage["memory"]
    lasting = {LABELS[name]: size for name, size in memory.items() if name not in STEP_ALONE}
    # At its peak a rank takes a step, or its optimizer does, or it generates, or it exports.
    step = {LABELS[name]: size for name, size in memory.items() if name in STEP_ALONE}
    moments = [step]
    if not (device.is_card and facts.get("fused_optimizer", True)):
        moments.append({"temporary tensors of the optimizer": of_stage["optimizer_temporary"]})
    if not device.is_card and facts.get("saving"):
        moments.append({"copies while a checkpoint is saved": facts["saving"]})
    if "answers" in facts:
        moments.append({"keys and values": facts["answers"]})
    for label, sizes in (facts.get("together") or facts.get("moments", {})).items():
        if label.startswith(EITHER):
            moments.append({label.removeprefix(EITHER): sizes[stage]})
        elif label not in SUMS:
            lasting[label] = sizes[stage]
    largest = max(moments, key=lambda moment: sum(moment.values()))
    parts = sorted((lasting | largest).items(), key=lambda part: -part[1])
    logits = of_stage["logits"] if largest is step else 0
    return Demand(stage, {label: size for label, size in parts if size}, logits)


def fits(needed: Demand, device: Device) -> bool:
    """Return whether a rank fits a device, with the device's reserve."""
    return needed.total + device.reserve_next_to(needed.total) <= device.size


def table_of(needed: Demand, device: Device, stages: int) -> list[tuple[str, str, str]]:
    """Return the header and the rows of the table that compares a rank with its device.

    Args:
        needed: Memory of the rank.
        device: Its device.
        stages: Number of pipeline stages.
    """
    reserve = device.reserve_next_to(needed.total)
    total = needed.total + reserve
    rows = [
        *needed.parts.items(),
        (f"reserve for {device.reserve_for}", reserve),
        ("total with reserve", total),
        (device.name, device.size),
        ("headroom", device.size - total),
    ]
    cells = []
    for label, size in rows:
        cells.append((label, f"{size / MIB:,.2f}", f"{size / device.size:.1%}"))
        if needed.logits and label == LABELS["temporary"]:
            logits = needed.logits
            note = "  (logits in activations and temporary tensors)"
            cells.append((note, f"{logits / MIB:,.2f}", f"{logits / device.size:.1%}"))
    title = f"largest rank, of stage {needed.stage}" if stages > 1 else "a rank"
    return [(title, "MiB", "of the device"), *cells]


def verdict(needed: Demand, device: Device) -> str:
    """Return a sentence on whether a rank fits a device."""
    total = needed.total + device.reserve_next_to(needed.total)
    available = f"{device.size / MIB:,.0f} MiB of {device.name} ({device.source})"
    if fits(needed, device):
        return f"fits: a rank needs {total / MIB:,.0f} of the {available}"
    largest = next(iter(needed.parts))
    need = f"a rank needs {total / MIB:,.0f} of the {available}"
    return f"does not fit: {need}, most of it for {largest}"


def changes(args: Namespace, device: Device) -> Iterator[list[str]]:
    """Yield flags that may lower the memory of a rank, one change at a time."""
    if args.recompute_granularity is None:
        yield [
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        ]
    if not args.use_distributed_optimizer and args.data_parallel_size > 1:
        yield ["--use-distributed-optimizer"]
    if args.micro_batch_size > 1:
        yield ["--micro-batch-size", str(args.micro_batch_size // 2)]
    tensor, ranks = args.tensor_model_parallel_size, args.world_size
    if ranks >= 2 * tensor:
        yield ["--tensor-model-parallel-size", str(2 * tensor), "--sequence-parallel"]
    if args.num_experts and args.num_experts >= 2 * args.expert_model_parallel_size:
        yield ["--expert-model-parallel-size", str(2 * args.expert_model_parallel_size)]
    if args.num_layers >= 2 * args.pipeline_model_parallel_size:
        yield ["--pipeline-model-parallel-size", str(2 * args.pipeline_model_parallel_size)]
    if device.is_card and not (args.bf16 or args.fp16):
        yield ["--bf16"]


def measure_changes(
    args: Namespace,
    device: Device,
    measure: Callable[[Sequence[str]], Facts],
    spell: Callable[[Sequence[str]], str] = " ".join,
) -> list[tuple[str, int]]:
    """Return the memory that a rank needs after each valid change, the least first.

    Args:
        args: Arguments of the run that does not fit.
        device: The device of a rank.
        measure: Function that returns the facts of the run with further flags.
        spell: Function that returns how the user writes the flags.
    """
    results = []
    for flags in changes(args, device):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                facts = measure(flags)
            except UserError:  # the changed layout is invalid
                continue
        tensors = demand(facts, device).total
        results.append((spell(flags), tensors + device.reserve_next_to(tensors)))
    return sorted(results, key=lambda result: result[1])


def advice(results: Sequence[tuple[str, int]], needed: int, device: Device) -> str:
    """Return a sentence on the change that helps most.

    Args:
        results: Changes, and the bytes that a rank needs after them, the least first.
        needed: Bytes that a rank needs without them.
        device: The device of a rank.
    """
    better = [result for result in results if result[1] < needed]
    if not better:
        return "No single change of the layout helps: use more ranks, or a larger device."
    flags, size = better[0]
    enough = "which fits" if size <= device.size else "which is not enough alone"
    return f"{flags} helps most: a rank then needs {size / MIB:,.0f} MiB, {enough}."
