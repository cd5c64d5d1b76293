"""Convert a dense model to an Expert Threshold model that computes nearly the same at the start.

    python -m tools.upcycle --load DENSE --save DIR --num-experts 8 --granularity 4

DENSE is a Hugging Face folder of a Llama, Qwen2 or Qwen3 model, a GGUF file of a Llama model, or a
dense checkpoint of this project. Each expert is a copy of a slice of the dense feed-forward block.
megatron_ext/hf/upcycling.py describes exactly what the new model computes. The checkpoint has no
optimizer state, and its thresholds have no value yet: set them with tools.calibrate_thresholds, or
train with the recipe.yaml next to it, whose first steps route by expert choice.
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
    """Run the command."""
    options = _parser().parse_args(argv)
    load, save = Path(options.load), Path(options.save)
    check_new(save)
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from megatron_ext.hf.convert import as_checkpoint
        from megatron_ext.hf.sources import open_dense
        from megatron_ext.hf.starting_recipe import how_to_continue
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
    with new_folder(save) as unfinished:
        with quiet_megatron():
            conversion = as_checkpoint(source, unfinished, save)
        write_with_progress("upcycling", conversion.bytes, conversion.write)
    print(f"wrote {save}")
    print(how_to_continue(save), flush=True)


def _pattern(text: str, layers: int) -> tuple[bool, ...]:
    """Return which layers get experts, for a value of --moe-layer-freq as in pretrain_et.py."""
    from megatron.training.arguments import moe_freq_type

    try:
        pattern = moe_freq_type(text)
    except (ValueError, SyntaxError, AssertionError, TypeError) as error:
        raise UserError(
            f"--moe-layer-freq {text} is not a pattern of layers: {error}. Give an integer or a "
            "list such as [0]+[1]*29."
        ) from error
    if isinstance(pattern, int):
        if pattern < 1:
            raise UserError(f"--moe-layer-freq {text} is below 1. Set it to 1 or more.")
        return tuple(layer % pattern == 0 for layer in range(layers))
    return tuple(bool(moe) for moe in pattern)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.upcycle", description=__doc__.split("\n")[0])
    add = parser.add_argument
    # fmt: off
    add("--load", required=True, metavar="DIR",
        help="Run directory, Hugging Face folder or GGUF file of the dense model.")
    add("--save", required=True, metavar="DIR", help="Folder of checkpoints to create.")
    add("--num-experts", type=int, required=True, metavar="N",
        help="Number of routed experts in a layer.")
    add("--granularity", type=int, default=1, metavar="G",
        help="Number of slices that the dense block is cut into; an expert is as wide as a slice. "
             "Default: %(default)s.")
    add("--shared-slices", type=int, default=0, metavar="K",
        help="Number of slices in a shared expert. If all slices are shared, the routed experts "
             "start at 0 and the model equals the dense one exactly. Default: %(default)s.")
    add("--mean-experts", type=float, metavar="M",
        help="Mean fan-out: routed experts per token on average. Default: the number of slices "
             "that are not shared, which is one copy of each.")
    add("--moe-layer-freq", default="1", metavar="PATTERN",
        help="Layers that get experts: every n-th layer, or a list such as [0]+[1]*29. "
             "Default: %(default)s, all layers.")
    add("--gate", choices=("sigmoid", "softmax"), default="sigmoid",
        help="Function from router logits to the weights of the experts. Default: %(default)s.")
    add("--router-std", type=float, default=0.1, metavar="X",
        help="Standard deviation of the initial router logits; the smaller it is, the closer the "
             "model is to the dense one. Default: %(default)s.")
    add("--noise", type=float, default=0.0, metavar="X",
        help="Standard deviation of noise on the experts' weights, relative to that of the "
             "weights. Default: %(default)s.")
    add("--ema-decay", type=float, default=0.999, metavar="B",
        help="Decay of the thresholds' moving average. Train with the same --et-ema-decay. "
             "Default: %(default)s.")
    add("--seed", type=int, default=0, metavar="N",
        help="Seed of the router and the noise. Default: %(default)s.")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
