"""Flags of `pretrain_et.py` that this project adds to those of Megatron."""

import os
from argparse import ArgumentParser
from dataclasses import fields

from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_ext.config import ETConfig
from megatron_ext.optimizer import add_muon_arguments
from megatron_ext.tracker_flags import add_tracker_arguments


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of this project, which are those of ETConfig, of Muon and of the run."""
    megatron = [field.name for field in fields(TransformerConfig)]
    ArgumentGroupFactory(ETConfig, exclude=megatron).build_group(parser, "expert threshold")
    add_muon_arguments(parser)
    add_tracker_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--recipe",
        metavar="FILE.yaml",
        help="YAML file that maps flags to values. Its key `base` names a recipe to read first. "
        "A name without a path, such as quickstart, is looked up in examples/recipes. Flags on "
        "the command line override the recipe. Can be repeated. Default: none.",
    )
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        help="Folder of the run, with checkpoints/ (the run resumes from the newest one), "
        "tensorboard/, metrics.jsonl and run.json. --save, --load, --tensorboard-dir and "
        "--save-interval, 1000 steps with this flag, override the parts. Default: none.",
    )
    group.add_argument(
        "--allow-older-checkpoint",
        action="store_true",
        help="Resume from the newest intact checkpoint if the newest one is damaged. "
        "Default: refuse a damaged checkpoint.",
    )
    group.add_argument(
        "--stall-timeout",
        type=float,
        metavar="SECONDS",
        help="End the run, and name the rank that blocks it, if a rank does not start or no rank "
        "makes progress in a step for this many seconds. Default: 0.9 times "
        "--distributed-timeout-minutes.",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="Save the shards of the distributed optimizer unchanged. No rank gathers them in host "
        "memory, but only a run with the same tensor, pipeline and expert parallel sizes can "
        "resume. Default: save shards that any layout can load.",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="Peak speed of one device in TFLOP/s, for the reported MFU. Default: the data sheet "
        "of a known GPU, or a matrix multiplication measured on a CPU.",
    )
    group.add_argument(
        "--dry-run",
        metavar="RANKS",
        type=int,
        nargs="?",
        const=int(os.environ.get("WORLD_SIZE", "1")),
        help="Print the parameters, the memory of a rank, the FLOP per token and the collectives "
        "of a step for a world of this many ranks, without training. One process is enough; "
        "torchrun, data, tokenizer (with --vocab-size) and GPU are not needed. Without a number: "
        "WORLD_SIZE, or 1. Default: train.",
    )
    group.add_argument(
        "--device",
        metavar="CARD",
        help="Device whose memory --dry-run compares with what a rank needs: a card such as "
        "h100-80gb, or a number of GiB. The exit status is 4 if the layout does not fit it. "
        "Default: the GPU of this machine, or its memory divided by its ranks.",
    )
    return parser
