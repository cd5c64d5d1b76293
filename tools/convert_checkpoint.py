"""Convert a checkpoint of this project to a Hugging Face folder, or the other way round.

    python -m tools.convert_checkpoint --from megatron --to hf --load RUN_DIR --save DIR

A model trained here becomes a Llama, Qwen2, Qwen3, Mixtral or Qwen3-MoE model if it has that
architecture, and otherwise an Expert Threshold model with its own code. A Hugging Face folder of
one of these families, or a GGUF file of a Llama model, becomes a checkpoint without an optimizer,
and a recipe.yaml with which pretrain_et.py continues its training. A GGUF file also becomes a
Hugging Face folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.devices import activate
from megatron_ext.errors import ToolParser, UserError, run_tool
from megatron_ext.model_location import announced, exported_model, locate_checkpoint
from megatron_ext.new_folder import check_new, new_folder
from megatron_ext.progress import write_with_progress
from megatron_ext.quiet import quiet_megatron

SOURCES, TARGETS = ("megatron", "hf", "gguf"), ("megatron", "hf")


class ConvertFlags:
    """Values of the command line."""

    source: str
    target: str
    load: str
    save: str
    verify: bool
    dtype: str
    tokenizer_model: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _parser().parse_args(argv, ConvertFlags())
    if flags.source == flags.target:
        raise UserError(
            f"--from and --to are both {flags.source}. Choose two different formats to convert "
            "between."
        )
    if flags.source == "gguf" and flags.verify:
        raise UserError(
            "--verify compares a checkpoint with a Hugging Face folder, not with a GGUF file. "
            "Convert the file --to hf without --verify, and the folder --to megatron with it."
        )
    if flags.dtype != "fp32" and flags.source != "gguf":
        raise UserError(
            f"--dtype {flags.dtype} applies to --from gguf only. Remove it: other conversions keep "
            "the data type of the weights."
        )
    load, save = Path(flags.load), Path(flags.save)
    check_new(save)
    if flags.source == "megatron":
        load = announced(locate_checkpoint(load))
    elif flags.source == "gguf":
        if not load.is_file():
            raise UserError(f"--load {load} is not a file. Give the path of a GGUF file.")
    elif not (load / "adapter_config.json").is_file():
        load = _hf_folder(load)
    with new_folder(save) as unfinished:
        difference = _convert(flags, load, save, unfinished)
    print(f"wrote {save}")
    if difference is not None:
        print(f"largest difference of logits: {difference:.3g} of the largest logit")
    if flags.target == "megatron":
        from megatron_ext.hf.starting_recipe import how_to_continue

        print(how_to_continue(save), flush=True)


def _hf_folder(load: Path) -> Path:
    """Return the Hugging Face folder that --load leads to.

    Raises:
        UserError: There is none.
    """
    location = exported_model(load)
    if location is None:
        raise UserError(
            f"--load {load} has no config.json, so it is not a Hugging Face model. Give the folder "
            "that contains config.json."
        )
    return load if location.folder == load else announced(location)


def _convert(flags: ConvertFlags, load: Path, save: Path, unfinished: Path) -> float | None:
    """Convert into a folder that is moved to `save` afterwards.

    Returns:
        With --verify, the largest difference of logits, as a share of the largest one.
    """
    with quiet_megatron():
        activate()  # before anything of Megatron is imported
        from megatron_ext.hf.convert import gguf_to_hf, to_hf, to_megatron
        from megatron_ext.hf.verify import largest_difference
        from megatron_ext.inference.loading import DTYPES

        if flags.target == "megatron":
            conversion = to_megatron(load, unfinished, save, DTYPES[flags.dtype])
        elif flags.source == "gguf":
            conversion = gguf_to_hf(load, unfinished, DTYPES[flags.dtype])
        else:
            conversion = to_hf(load, unfinished, flags.tokenizer_model)
    write_with_progress("converting", conversion.bytes, conversion.write)
    if not flags.verify:
        return None
    megatron, hf = (load, unfinished) if flags.target == "hf" else (unfinished, load)
    with quiet_megatron():
        return largest_difference(megatron, hf, flags.tokenizer_model)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.convert_checkpoint", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    # fmt: off
    add("--from", dest="source", choices=SOURCES, required=True, help="Format of --load.")
    add("--to", dest="target", choices=TARGETS, required=True, help="Format of --save.")
    add("--load", required=True, metavar="PATH",
        help="Run directory, Hugging Face folder or GGUF file to convert.")
    add("--save", required=True, metavar="DIR",
        help="Folder to create. It must not exist or must be empty.")
    add("--verify", action="store_true",
        help="Load both models in fp32 and compare their logits on a short text.")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="Data type of the weights with --from gguf. fp32 represents quantized weights "
             "exactly. Default: %(default)s.")
    add("--tokenizer-model", metavar="FILE",
        help="Tokenizer of the checkpoint. Default: the file or folder that training used.")
    # fmt: on
    return parser


if __name__ == "__main__":
    run_tool(main)
