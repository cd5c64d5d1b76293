"""Report of a dry run: tables, and one JSON object on the last line."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ext.planning.devices import named_device
from megatron_ext.planning.dry_run.saving import describe_saving

LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporary": "temporary tensors",
    "router_logits": "router logits until the step's end",
    "gather_buffer": "gathered activations",
}
"""Purposes of the memory of a rank, by their keys."""

STEP_ALONE = ("activations", "temporary", "router_logits", "gather_buffer")
"""Memory that a training step needs while it runs, and text generation does not."""

EITHER = "or "
"""Beginning of the rows of memory that a rank needs at another time than in a step."""

SUMS = ("policy: weights, gradients, optimizer", "what a step needs besides", "together at most")
"""Rows that sum up what other rows of a report state by purpose."""

# Cards of data centers, which the last sentence of the memory compares with.
_COMPARED = ("a100-40gb", "h100-80gb", "h200-141gb", "b200-180gb")

_NOTE = """
Activations are the tensors that autograd saves; temporary tensors are all others that a step
creates, at the moment at which most are stored. Both, the expert dispatch and the FLOPs as executed
assume evenly loaded experts; the collectives of routing are those of random logits. All other
numbers do not depend on the data. The bytes of a rank are those of its input or of its output,
whichever are more; of an all-to-all those of its input. They include the part that a rank sends to
itself."""


def print_report(
    facts: dict[str, Any], device: Sequence[Sequence[str]], verdict: Sequence[str]
) -> None:
    """Print the tables and the line of JSON.

    Args:
        facts: Facts of the dry run.
        device: Header and rows of the table that compares a rank with its device.
        verdict: Whether the rank fits and what would help, in sentences.
    """
    sizes = " x ".join(f"{size} {name.replace('_', ' ')}" for name, size in facts["layout"].items())
    print(f"{facts['world_size']:,} ranks: {sizes}")
    print(f"{facts['tokens_per_step']:,} tokens a step, {facts['micro_batches']} micro-batch(es)")
    parameters = facts["parameters"]
    rows = [
        ("embeddings and output head", parameters["embeddings"]),
        ("routed experts", parameters["experts"]),
        ("everything else", parameters["others"]),
        ("total", parameters["total"]),
        ("active a token", parameters["active"]),
    ]
    _table(("parameters", ""), [(name, f"{count:,}") for name, count in rows])
    flops = facts["flops_per_token"]
    _table(
        ("FLOPs a token, forward and backward", ""),
        [
            ("Megatron's formula", f"{flops['megatron']:.4g}"),
            ("as executed, recomputation and masked scores too", f"{flops['executed']:.4g}"),
        ],
    )
    _print_memory(facts["stages"])
    if "together" in facts:
        _print_together(facts["together"])
    _table(device[0], device[1:])
    print()
    for sentence in verdict:
        print(sentence)
    print(fit(largest_rank(facts)))
    if facts.get("saving") is not None:
        print(describe_saving(facts["saving"]))
    for stage in facts["stages"]:
        _print_collectives(stage, len(facts["stages"]) > 1)
    print(_NOTE)
    print(json.dumps(facts))


def largest_rank(facts: Mapping[str, Any]) -> int:
    """Return the bytes of the rank that needs most memory, in training or in generation.

    Args:
        facts: Facts of a dry run. `together` has the bytes of all models on a rank, and `answers`
            those of the keys and values of a model that also generates text.
    """
    if "together" in facts:
        *_, sums = facts["together"].values()
        return int(max(sums))
    sizes = []
    for stage in facts["stages"]:
        memory = stage["memory"]
        step = sum(memory.get(name, 0) for name in STEP_ALONE)
        sizes.append(sum(memory.values()) + max(0, facts.get("answers", 0) - step))
    return max(sizes)


def fit(size: int) -> str:
    """Return a sentence on the devices whose memory is enough for a rank.

    Args:
        size: Bytes that the rank needs.
    """
    cards = [named_device(name) for name in _COMPARED]
    room = {card.name: card.size - card.reserve for card in cards}
    names = {
        "fits": [name for name in room if size <= room[name]],
        "does not fit": [name for name in room if size > room[name]],
    }
    parts = [f"{verb} {', '.join(devices)}" for verb, devices in names.items() if devices]
    return (
        f"Of common cards the largest rank, with {_mib(size)} MiB, {' and '.join(parts)} (a tenth "
        "of the card's memory left to CUDA, NCCL and fragmentation)."
    )


def _print_memory(stages: Sequence[dict[str, Any]]) -> None:
    """Print the bytes on a rank of each stage by purpose."""
    header = ["memory of a rank (MiB)", *(f"stage {stage['stage']}" for stage in stages)]
    if len(stages) == 1:
        header = ["memory of a rank (MiB)", ""]
    rows = [
        [label, *(_mib(stage["memory"][name]) for stage in stages)]
        for name, label in LABELS.items()
    ]
    rows.append(["total", *(_mib(sum(stage["memory"].values())) for stage in stages)])
    rows.append(["(number of parameters)", *(f"{stage['parameters']:,}" for stage in stages)])
    _table(header, rows)


def _print_together(rows: Mapping[str, Sequence[int]]) -> None:
    """Print the bytes on the ranks of each stage by purpose; the last row is the sum."""
    stages = len(next(iter(rows.values())))
    names = [f"stage {stage}" for stage in range(stages)] if stages > 1 else [""]
    header = ["total memory of a rank (MiB)", *names]
    _table(header, [[label, *map(_mib, sizes)] for label, sizes in rows.items()])


def _print_collectives(stage: dict[str, Any], has_stages: bool) -> None:
    """Print the collectives of the last phase, and those that differ in earlier phases."""
    where = f" of stage {stage['stage']}" if has_stages else ""
    phases = list(stage["collectives"].items())
    _, main = phases[-1]
    if not main:
        print("\nno collectives between ranks")
        return
    header = (f"a step{where}, on each rank", "", "group", "ranks", "calls", "MiB")
    _table(header, [_collective_row(row) for row in main], left=3)
    for phase, rows in phases[:-1]:
        different = [row for row in rows if row not in main]
        if different:
            header = (f"instead, by {phase}", "", "group", "ranks", "calls", "MiB")
            _table(header, [_collective_row(row) for row in different], left=3)


def _collective_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a collective's row."""
    group = row["group"].replace("_GROUP", "").replace("_PARALLEL", "").replace("_", " ").lower()
    return (
        row["purpose"],
        row["operation"],
        "world" if group == "default pg" else group,
        f"{row['ranks']:,}",
        f"{row['calls']:,}",
        _mib(row["bytes"]),
    )


def _mib(size: int) -> str:
    """Return bytes in MiB."""
    return f"{size / 2**20:,.2f}" if size == 0 or size >= 2**20 / 100 else "<0.01"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print aligned columns, of which the first `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print()
    for line, row in enumerate([header, *rows]):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if line == 0:
            print("-" * (sum(widths) + 2 * (len(widths) - 1)))
