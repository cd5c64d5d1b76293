"""Make an Expert Threshold model of a dense one, computing nearly the same at the start.

    python -m tools.upcycle --load DENSE --save DIR --num-experts 8 --granularity 4

DENSE is a Hugging Face folder of a Llama, Qwen2 or Qwen3 model, or a dense checkpoint of this
project. Each expert is a copy of a slice of the dense block. megatron_ext/hf/upcycling.py says what
exactly the new model computes. It has no optimizer and its thresholds have no value:
tools.calibrate_thresholds gives them one, and training with --et-warmup-iters finds them too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import write_with_progress
from megatron_ext.quiet import quiet_megatron


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    load, save = Path(options.load), Path(options.save)
    check_new(save)
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from megatron_ext.hf.convert import as_checkpoint
        from megatron_ext.hf.sources import open_dense
        from megatron_ext.hf.upcycling import Upcycling, upcycled

        dense = open_dense(load)
        plan = Upcycling(
            experts=options.num_experts,
            moe_layers=_pattern(options.moe_layer_freq, dense.model.layers),
            granularity=options.granularity,
            shared_slices=options.shared_slices,
            mean_experts=options.mean_experts,
            gate=options.gate,
            router_std=options.router_std,
            noise=options.noise,
            seed=options.seed,
            ema_decay=options.ema_decay,
        )
        source = upcycled(dense, plan)
    with new_folder(save) as beside:
        with quiet_megatron():
            conversion = as_checkpoint(source, beside, save)
        write_with_progress("upcycling", conversion.bytes, conversion.write)
    print(f"wrote {save}")


def _pattern(text: str, layers: int) -> tuple[bool, ...]:
    """Which layers get experts, as --moe-layer-freq says it to pretrain_et.py."""
    from megatron.training.arguments import moe_freq_type

    try:
        pattern = moe_freq_type(text)
    except (ValueError, SyntaxError, AssertionError, TypeError) as error:
        raise UserError(f"--moe-layer-freq {text}: {error}") from error
    if isinstance(pattern, int):
        if pattern < 1:
            raise UserError(f"--moe-layer-freq {text} must be at least 1")
        return tuple(layer % pattern == 0 for layer in range(layers))
    return tuple(bool(moe) for moe in pattern)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.upcycle", description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR", help="run directory or Hugging Face folder")
    add("--save", required=True, metavar="DIR", help="folder of checkpoints to make")
    add("--num-experts", type=int, required=True, metavar="N", help="routed experts of a layer")
    add("--granularity", type=int, default=1, metavar="G",
        help="slices of the dense block, each as wide as an expert (%(default)s)")
    add("--shared-slices", type=int, default=0, metavar="K",
        help="slices that a shared expert holds; with all of them the routed experts start at 0 "
             "and the model is the dense one exactly (%(default)s)")
    add("--mean-experts", type=float, metavar="M",
        help="routed experts of a token on average (the routed slices: one copy of each)")
    add("--moe-layer-freq", default="1", metavar="PATTERN",
        help="which layers get experts: every n-th, or a list such as [0]+[1]*29 (all)")
    add("--gate", choices=("sigmoid", "softmax"), default="sigmoid",
        help="what makes a weight of a logit (%(default)s)")
    add("--router-std", type=float, default=0.1, metavar="S",
        help="spread of the first logits; with less the model is nearer to the dense one "
             "(%(default)s)")
    add("--noise", type=float, default=0.0, metavar="S",
        help="spread of noise on the experts' weights, in that of the weights (%(default)s)")
    add("--ema-decay", type=float, default=0.999, metavar="B",
        help="of the thresholds; training takes the same --et-ema-decay (%(default)s)")
    add("--seed", type=int, default=0, help="of router and noise (%(default)s)")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
