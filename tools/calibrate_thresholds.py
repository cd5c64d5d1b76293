"""Calibrate the thresholds of a model so that each expert takes its share of a text.

    python -m tools.calibrate_thresholds --load DIR --save DIR --data TEXT.jsonl

Use it for a model trained by expert choice or token choice, for an upcycled one, or for text of
another kind than the training text. The new checkpoint evaluates, generates and trains with the
thresholds; its weights are unchanged. Thresholds are exact cutoffs over the whole text, layer after
layer, each computed from the output of calibrated layers. Every eighth sequence is reserved, and
the mean fan-out, the loads of the experts and the loss on these are printed before and after.
Larger models run under torchrun, with the flags of tools.generate.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint import read_common_state
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool_or_ranks
from megatron_ext.inference.loading_flags import (
    LoadingFlags,
    add_loading_flags,
    check_at_least_one,
    is_first_rank,
)
from megatron_ext.model_location import announced, locate_checkpoint
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import Progress, write_with_progress
from megatron_ext.quiet import quiet_megatron

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.inference.calibration import RoutingQuality

_HOLD_OUT = 8


class CalibrateFlags(LoadingFlags):
    """Values of the command line."""

    load: str
    save: str
    data: list[str]
    tokens: int
    seq_length: int | None
    batch_size: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(argv, CalibrateFlags())
    check_at_least_one(tokens=options.tokens, batch_size=options.batch_size)
    location, save = locate_checkpoint(options.load), Path(options.save)
    check_new(save)
    checkpoint = announced(location)
    first = is_first_rank()
    out = sys.stdout if first else open(os.devnull, "w")  # noqa: SIM115
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        before, after, cutoffs, tokens, notes = _calibrate(options, checkpoint, out)
    print(_table(before, after), *notes, sep="\n", file=out)
    if not first:
        return
    from megatron_ext.hf.recalibrate import CALIBRATION, with_thresholds
    from megatron_ext.hf.starting_recipe import how_to_continue

    with new_folder(save) as folder:
        with quiet_megatron():
            conversion = with_thresholds(checkpoint, folder, save, cutoffs, options.tokenizer_model)
        write_with_progress("writing", conversion.bytes, conversion.write)
        qualities = {"before": before, "after": after}
        report: dict[str, Any] = {
            "data": [Path(path).name for path in options.data],
            "calibrated_tokens": tokens,
            **{name: _plain(m) for name, m in qualities.items() if m is not None},
        }
        (folder / CALIBRATION).write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {save}")
    print(how_to_continue(save))


def _calibrate(options: CalibrateFlags, checkpoint: Path, out: Any) -> Any:
    """Calibrate a model.

    Returns:
        Routing quality on held-out text before (None without thresholds) and after, cutoffs by
        layer, number of tokens calibrated on, and notes to print.
    """
    from megatron_ext.data.token_stream import sequences_of
    from megatron_ext.hf.recalibrate import use_thresholds
    from megatron_ext.inference.calibration import calibrate, measure_routing
    from megatron_ext.inference.loading import load_model
    from megatron_ext.moe.router import routers_of
    from megatron_ext.moe.threshold_router import threshold_routers

    use_thresholds(read_common_state(checkpoint)["args"])  # to refuse the model early
    layout, others = options.load_model_options()

    def load(change: Any = None) -> Any:
        return load_model(checkpoint, layout, with_thresholds=change, **others)

    trained = load()
    notes: list[str] = []
    length = options.seq_length or min(trained.max_length, 2048)
    if not 1 < length <= trained.max_length:
        raise UserError(
            f"--seq-length {length} is not in the range 2 to {trained.max_length} of the model. "
            "Choose a value in it."
        )
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
    return before, after, cutoffs, text.numel(), notes


def _held_out(sequences: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the sequences to calibrate on and those to measure on."""
    if len(sequences) < 2:
        raise UserError(
            "--data has one sequence only, but calibration needs two. Use more text, a larger "
            "--tokens, or a smaller --seq-length."
        )
    every = min(_HOLD_OUT, len(sequences))
    held_out = [number % every == every - 1 for number in range(len(sequences))]
    return sequences[[not is_held_out for is_held_out in held_out]], sequences[held_out]


def _table(before: "RoutingQuality | None", after: "RoutingQuality") -> str:
    """Return the mean fan-out, the least and greatest load by layer, and the loss as text."""
    rows: list[tuple[str, ...]] = [("layer", "fan-out", "least load", "greatest", "no expert")]
    for layer in after.load:
        cells = [(_figures(m, layer) if m else ("-",) * 4) for m in (before, after)]
        rows.append((str(layer), *(f"{b} > {a}" for b, a in zip(*cells, strict=True))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    losses = " > ".join(f"{m.loss:.4f}" if m else "-" for m in (before, after))
    return "\n".join([*lines, f"loss {losses} nats per token (before > after, held-out text)"])


def _figures(quality: "RoutingQuality", layer: int) -> tuple[str, ...]:
    """Return the cells of one layer."""
    load = quality.load[layer]
    share = quality.no_expert[layer]
    return (
        f"{quality.fan_out(layer):.3f}",
        *(f"{float(value):.4f}" for value in (load.min(), load.max())),
        f"{share:.3f}",
    )


def _plain(quality: "RoutingQuality") -> dict[str, Any]:
    """Return a routing quality as JSON values."""
    return {
        "loss": quality.loss,
        "tokens": quality.tokens,
        "layers": {
            layer: {
                "fan_out": quality.fan_out(layer),
                "no_expert_share": quality.no_expert[layer],
                "load": load.tolist(),
            }
            for layer, load in quality.load.items()
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.calibrate_thresholds", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR", help="Run directory, or folder of checkpoints.")
    add("--save", required=True, metavar="DIR",
        help="Folder of checkpoints to write; must not exist.")
    add("--data", required=True, nargs="+", metavar="PATH",
        help="Prefix of an indexed dataset, or text files (.jsonl, .parquet, .txt).")
    add("--tokens", type=int, default=65536, metavar="N",
        help="Number of tokens to read at most. Default: %(default)s.")
    add("--seq-length", type=int, metavar="N",
        help="Tokens per sequence. Default: the length of the model, at most 2048.")
    add("--batch-size", type=int, default=8, metavar="N",
        help="Sequences per forward pass. Default: %(default)s.")
    add_loading_flags(parser)
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool_or_ranks(main)
