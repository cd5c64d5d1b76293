"""Give a model the thresholds at which each expert takes its share of a text.

    python -m tools.calibrate_thresholds --load DIR --save DIR --data TEXT.jsonl

For a model trained by expert choice or token choice, an upcycled one, or one that is to route
another kind of text. The new checkpoint evaluates, generates and trains with thresholds; its
weights are those of the old one. Thresholds are exact cutoffs over the whole text, layer after
layer, each fed by layers that have theirs. Every eighth sequence is held out: on these, the mean
fan-out, the experts' loads and the loss are told, before and after. Larger models run under
torchrun, with the flags of tools.generate.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint import find_checkpoint, read_common_state
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import Progress, write_with_progress
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.inference.calibration import RoutingQuality

_HOLD_OUT = 8
REPORT = "calibration.json"


class CalibrateFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    save: str
    data: list[str]
    tokens: int
    seq_length: int | None
    batch_size: int


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv, CalibrateFlags())
    check_at_least_one(tokens=options.tokens, batch_size=options.batch_size)
    checkpoint, save = find_checkpoint(options.load), Path(options.save)
    check_new(save)
    first = is_first_rank()
    out = sys.stdout if first else open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        before, after, cutoffs, notes = _calibrated(options, checkpoint, out)
    print(_table(before, after), *notes, sep="\n", file=out)
    if not first:
        return
    from megatron_ext.hf.recalibrate import with_thresholds

    with new_folder(save) as beside:
        with quiet_megatron():
            conversion = with_thresholds(checkpoint, beside, save, cutoffs, options.tokenizer_model)
        write_with_progress("writing", conversion.bytes, conversion.write)
        measured = {"before": before, "after": after}
        report = {name: _plain(m) for name, m in measured.items() if m is not None}
        (beside / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {save}")


def _calibrated(options: CalibrateFlags, checkpoint: Path, out: Any) -> Any:
    """Figures on held-out text before (None without thresholds) and after, cutoffs, and notes."""
    from megatron_ext.data.token_stream import sequences_of
    from megatron_ext.hf.recalibrate import use_thresholds
    from megatron_ext.inference.calibration import calibrate, measure_routing
    from megatron_ext.inference.loading import load_model
    from megatron_ext.moe.router import routers_of
    from megatron_ext.moe.threshold_router import threshold_routers

    use_thresholds(read_common_state(checkpoint)["args"])  # refuses early
    layout, others = options.load_model_options()

    def load(change: Any = None) -> Any:
        return load_model(checkpoint, layout, with_thresholds=change, **others)

    trained = load()
    notes: list[str] = []
    length = options.seq_length or min(trained.max_length, 2048)
    if not 1 < length <= trained.max_length:
        raise UserError(f"--seq-length {length} must be from 2 to the model's {trained.max_length}")
    sequences = sequences_of(options.data, trained, length, options.tokens)
    text, held_out = _held_out(sequences)
    routers = routers_of([trained.module])
    thresholds = threshold_routers(routers)
    before = None
    if all(router.thresholds.update_count for router in thresholds):
        before = measure_routing(trained, held_out, options.batch_size)
    if not thresholds and not trained.args.moe_router_pre_softmax and routers:
        notes.append(
            "the weights of a token's experts summed to 1, which thresholds cannot do: they are "
            "softmax over all experts now, and the model needs training"
        )
    del trained, routers, thresholds
    trained = load(use_thresholds)
    with Progress("calibrating", trained.args.num_layers) as progress:
        cutoffs = calibrate(
            trained, text, options.batch_size, lambda layer: progress.update(layer + 1)
        )
    after = measure_routing(trained, held_out, options.batch_size)
    notes.append(f"calibrated on {text.numel():,} tokens, measured on {held_out.numel():,}")
    return before, after, cutoffs, notes


def _held_out(sequences: "Tensor") -> "tuple[Tensor, Tensor]":
    """What to calibrate on, and what to measure on."""
    if len(sequences) < 2:
        raise UserError("--data and --tokens give one sequence: calibrating needs two or more")
    every = min(_HOLD_OUT, len(sequences))
    held_out = [number % every == every - 1 for number in range(len(sequences))]
    return sequences[[not held for held in held_out]], sequences[held_out]


def _table(before: "RoutingQuality | None", after: "RoutingQuality") -> str:
    """Mean fan-out and the least and greatest load of an expert by layer, and the loss."""
    rows: list[tuple[str, ...]] = [("layer", "fan-out", "least load", "greatest", "no expert")]
    for layer in after.load:
        cells = [(_figures(m, layer) if m else ("-",) * 4) for m in (before, after)]
        rows.append((str(layer), *(f"{b} > {a}" for b, a in zip(*cells, strict=True))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    losses = " > ".join(f"{m.loss:.4f}" if m else "-" for m in (before, after))
    return "\n".join([*lines, f"loss {losses} nats per token (before > after, held-out text)"])


def _figures(measured: "RoutingQuality", layer: int) -> tuple[str, ...]:
    load = measured.load[layer]
    share = measured.no_expert[layer]
    return (
        f"{measured.fan_out(layer):.3f}",
        *(f"{float(value):.4f}" for value in (load.min(), load.max())),
        f"{share:.3f}",
    )


def _plain(measured: "RoutingQuality") -> dict[str, Any]:
    return {
        "loss": measured.loss,
        "tokens": measured.tokens,
        "layers": {
            layer: {
                "fan_out": measured.fan_out(layer),
                "no_expert_share": measured.no_expert[layer],
                "load": load.tolist(),
            }
            for layer, load in measured.load.items()
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.calibrate_thresholds", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR", help="run directory, or folder of checkpoints")
    add("--save", required=True, metavar="DIR", help="folder of checkpoints to make")
    add("--data", required=True, nargs="+", metavar="PATH",
        help="prefix of an indexed dataset, or text files: .jsonl, .parquet, .txt")
    add("--tokens", type=int, default=65536, metavar="N", help="to read at most (%(default)s)")
    add("--seq-length", type=int, metavar="N", help="of a sequence (the model's, at most 2048)")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (%(default)s)")
    add_loading_flags(parser)
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
