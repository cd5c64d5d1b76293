"""Turn a checkpoint of this project into a Hugging Face folder, or the other way round.

    python -m tools.convert_checkpoint --from megatron --to hf --load RUN_DIR --save DIR

Models trained here become Llama, Qwen2, Qwen3, Mixtral or Qwen3-MoE models where they are such, and
Expert Threshold models with their own code otherwise. From Hugging Face the same families become a
checkpoint without an optimizer, which tools.generate and pretrain_et.py load. A GGUF file of a
Llama model becomes a Hugging Face folder first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import write_with_progress
from megatron_ext.quiet import quiet_megatron

SOURCES, TARGETS = ("megatron", "hf", "gguf"), ("megatron", "hf")


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.source == options.target:
        raise UserError(f"--from and --to are both {options.source}: there is nothing to convert")
    if options.source == "gguf" and (options.target != "hf" or options.verify):
        raise UserError(
            "--from gguf goes --to hf alone and has nothing to --verify: convert the folder that "
            "it gives on to megatron with --verify"
        )
    if options.dtype != "fp32" and options.source != "gguf":
        raise UserError("--dtype is for --from gguf: between the others weights keep theirs")
    load, save = Path(options.load), Path(options.save)
    check_new(save)
    if options.source == "megatron":
        load = find_checkpoint(load)
    elif options.source == "gguf":
        if not load.is_file():
            raise UserError(f"--load {load} is no file: give a GGUF file")
    elif not any((load / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"--load {load} is no Hugging Face model: it has no config.json")
    with new_folder(save) as beside:
        difference = _convert(options, load, save, beside)
    print(f"wrote {save}")
    if difference is not None:
        print(f"largest difference of logits: {difference:.3g} of the largest logit")


def _convert(options: argparse.Namespace, load: Path, save: Path, beside: Path) -> float | None:
    """Convert into the folder `beside`; with --verify return `largest_difference`, else None."""
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from megatron_ext.hf.convert import gguf_to_hf, to_hf, to_megatron
        from megatron_ext.hf.verify import largest_difference
        from megatron_ext.inference.loading import DTYPES

        if options.source == "gguf":
            conversion = gguf_to_hf(load, beside, DTYPES[options.dtype])
        elif options.target == "hf":
            conversion = to_hf(load, beside, options.tokenizer_model)
        else:
            conversion = to_megatron(load, beside, save)
    write_with_progress("converting", conversion.bytes, conversion.write)
    if not options.verify:
        return None
    megatron, hf = (load, beside) if options.target == "hf" else (beside, load)
    with quiet_megatron():
        return largest_difference(megatron, hf, options.tokenizer_model)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.convert_checkpoint", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--from", dest="source", choices=SOURCES, required=True, help="format of --load")
    add("--to", dest="target", choices=TARGETS, required=True, help="format of --save")
    add(
        "--load",
        required=True,
        metavar="PATH",
        help="run directory, Hugging Face folder, GGUF file",
    )
    add("--save", required=True, metavar="DIR", help="folder to make")
    add("--verify", action="store_true", help="compare the logits of both, in fp32, on a text")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the weights with --from gguf (%(default)s, which keeps them as they are)",
    )
    add("--tokenizer-model", metavar="FILE", help="if it is not where it was in training")
    return parser


if __name__ == "__main__":
    run_tool(main)
