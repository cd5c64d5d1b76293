"""The command line of `pretrain_et.py`: Megatron's flags, ours, and recipes."""

import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.training import get_tokenizer
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import (
    add_megatron_arguments,
    core_transformer_config_from_args,
    parse_and_validate_args,
)

from megatron_ext.config import ETConfig
from megatron_ext.conflicts import check_conflicts
from megatron_ext.devices import cpu_default_args, is_cpu_device
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.optimizer import add_muon_arguments, paper_flags
from megatron_ext.patches import patched
from megatron_ext.planning.layout import check_layout
from megatron_ext.ranges import batch_schedule, check_ranges, check_trackers
from megatron_ext.recipes import expand_recipes

_DEFAULTS = [
    # Megatron's mask is a square matrix a sample; attention here is causal by itself.
    "--no-create-attention-mask-in-dataloader",
    "--exit-signal-handler",
    # Megatron divides by it, and has no default.
    "--eval-interval=1000",
    # Any layout can go on from a checkpoint of any other, see megatron_ext.training.resharding.
    "--dist-ckpt-optim-fully-reshardable",
]


def parse_args(argv: Sequence[str], writes: bool = True) -> tuple[Namespace, ETConfig]:
    """Parse and validate a command line and set Megatron's global state.

    Args:
        argv: flags, without the program's name. `--recipe FILE` expands in place; what stands
            after it overrides it.
        writes: whether TensorBoard and other trackers may be opened, which write files.

    Raises:
        UserError: one sentence on what is wrong with the command line, on every rank.
    """
    parser = ToolParser(prog="pretrain_et.py", add_help=False, allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    expanded = expand_recipes(argv, parser)
    argv = [*_DEFAULTS, *(cpu_default_args() if is_cpu_device() else []), *expanded]
    if {"-h", "--help"} & set(argv):
        _print_help(parser)
        sys.exit(0)
    args = parser.parse_args(argv)
    given = _given(expanded, parser)
    environment: dict[str, str] = {}
    if args.dry_run is not None:
        environment = {"WORLD_SIZE": str(args.dry_run), "RANK": "0", "LOCAL_RANK": "0"}
        argv += _dry_run_flags(args)
        args = parser.parse_args(argv)
    argv = [*paper_flags(args), *argv]
    args = parser.parse_args(argv)
    _check_before_megatron(args, given)
    if args.async_save:
        argv += _async_save_flags(args, given)
    if not writes:
        argv = [*argv, "--tensorboard-dir", "", "--wandb-project", ""]
    if args.dry_run is None:
        argv = [*_run_dir_flags(args.run_dir), *argv]
        _check_folders(parser.parse_args(argv))
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(sys, "argv", [sys.argv[0], *argv]))
        for name, value in environment.items():
            stack.enter_context(patched(os.environ, name, value))
        if environment:
            stack.enter_context(_silence())
        args = explained(lambda: parse_and_validate_args(extra_args_provider=add_arguments))
    if args.step_batch_size_schedule is not None:  # checks and plans are for the largest batch
        args.global_batch_size = batch_schedule(args)[-1][1]
    args.vocab_size = get_tokenizer().vocab_size  # without padding
    if args.stall_timeout is None:
        args.stall_timeout = 0.9 * 60 * args.distributed_timeout_minutes
    config: ETConfig = explained(lambda: core_transformer_config_from_args(args, ETConfig))
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_dtype"):
        setattr(args, name, getattr(config, name))  # the trainer's logs go by the arguments
    return args, config


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add this project's flags, those of ETConfig and a few of the run itself."""
    megatron = [field.name for field in fields(TransformerConfig)]
    ArgumentGroupFactory(ETConfig, exclude=megatron).build_group(parser, "expert threshold")
    add_muon_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--recipe",
        metavar="FILE.yaml",
        help="Flags from a YAML mapping; 'base: OTHER.yaml' in it is read first. Flags that "
        "follow on the command line override it. May be repeated.",
    )
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        help="Folder of the run: checkpoints/ (saved, and resumed from when there are any), "
        "tensorboard/, metrics.jsonl and run.json. --save, --load, --tensorboard-dir and "
        "--save-interval (1000) override the parts.",
    )
    group.add_argument(
        "--allow-older-checkpoint",
        action="store_true",
        help="When the newest checkpoint is damaged, resume from the newest one that is whole.",
    )
    group.add_argument(
        "--stall-timeout",
        type=float,
        metavar="SECONDS",
        help="End the run, naming the rank that holds it up, when a rank is not there at the start "
        "or none gets on in a step for so long. Default: nine tenths of "
        "--distributed-timeout-minutes.",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="Save the distributed optimizer's shards as they are: no rank gathers them in host "
        "memory, and only the same tensor, pipeline and expert parallel sizes can resume.",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        help="Peak TFLOP/s of one device, to report MFU. Default: known for some GPUs, measured "
        "by a matrix multiplication on a CPU.",
    )
    group.add_argument(
        "--dry-run",
        metavar="RANKS",
        type=int,
        nargs="?",
        const=int(os.environ.get("WORLD_SIZE", "1")),
        help="Train nothing: print parameters, memory of a rank, FLOPs a token and collectives of "
        "a step for a world of RANKS (default: WORLD_SIZE, or 1), and end. One process is enough, "
        "without torchrun, data, tokenizer (give --vocab-size) or GPU.",
    )
    return parser


def _print_help(parser: ArgumentParser) -> None:
    """Print every flag; some of Megatron's texts hold a percent sign that argparse trips on."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    parser.print_help()


def _run_dir_flags(run_dir: str | None) -> list[str]:
    """Where a run keeps its parts, unless flags that follow say otherwise."""
    if run_dir is None:
        return []
    checkpoints = str(Path(run_dir, "checkpoints"))
    tensorboard = str(Path(run_dir, "tensorboard"))
    flags = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", tensorboard]
    return [*flags, "--save-interval", "1000"]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Megatron prints every setting, and warns of what a dry run turns off."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dry_run_flags(args: Namespace) -> list[str]:
    """Flags that keep a run without peers from reading and writing files."""
    if args.dry_run < 1:
        raise UserError(f"--dry-run {args.dry_run} must be at least one rank")
    if not is_cpu_device():
        raise UserError("give --dry-run on the command line, not in a recipe")
    flags = [*cpu_default_args(), "--fake-process-group"]  # whatever the recipe says
    flags += ["--tensorboard-dir", "", "--wandb-project", ""]
    file = args.tokenizer_model
    if args.tokenizer_type is None or (file is not None and not Path(file).exists()):
        if args.vocab_size is None:
            raise UserError("--dry-run needs --vocab-size, or a tokenizer that is there")
        flags += ["--tokenizer-type", "NullTokenizer"]
    return flags


def _given(argv: Sequence[str], parser: ArgumentParser) -> set[str]:
    """Names of the arguments that a command line sets, its recipes expanded."""
    options = (word.partition("=")[0] for word in argv)
    actions = parser._option_string_actions
    return {actions[option].dest for option in options if option in actions}


def _check_before_megatron(args: Namespace, given: set[str]) -> None:
    """What Megatron would answer with a stack trace or a wrong guess."""
    if args.stall_timeout is not None and args.stall_timeout <= 0:
        raise UserError(f"--stall-timeout {args.stall_timeout:g} must be above 0 seconds")
    ranks = args.dry_run or int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(args, ranks)
    check_ranges(args, ranks)
    if args.dry_run is None:
        check_trackers(args)
    for warning in check_conflicts(args, given):
        if os.environ.get("RANK", "0") == "0":
            name = Path(sys.argv[0]).name
            print(f"{name}: warning: {warning}", file=sys.stderr, flush=True)
    files = ("SentencePieceTokenizer", "TikTokenizer")  # others may name a model of a hub
    if args.tokenizer_type in files and not Path(args.tokenizer_model or "").is_file():
        raise UserError(f"--tokenizer-model {args.tokenizer_model} does not exist")
    if args.reset_attention_mask:
        raise UserError("--reset-attention-mask is not supported: attention is causal throughout")


def _async_save_flags(args: Namespace, given: set[str]) -> list[str]:
    """Without the first Megatron saves synchronously, without the second it may not start."""
    flags = ["--use-persistent-ckpt-worker"]
    if args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        if "async_strategy" in given:
            raise UserError(
                "--async-strategy nvrx needs the package nvidia-resiliency-ext: install it, or "
                "use mcore"
            )
        flags += ["--async-strategy", "mcore"]
    return flags


def _check_folders(args: Namespace) -> None:
    """Whether the run's folders can be made and written; nothing is made yet."""
    for flag in ("run_dir", "save", "tensorboard_dir"):
        folder = getattr(args, flag)
        if folder is None:
            continue
        path = Path(folder).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            option = "--" + flag.replace("_", "-")
            why = "is not a folder" if not existing.is_dir() else "is not writable"
            raise UserError(f"{option} {folder} cannot be written: {existing} {why}")


def explained(call: Callable[[], Any]) -> Any:
    """Call Megatron's validation and turn its refusal into one sentence."""
    try:
        return call()
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError, OSError) as error:
        # An assertion may have no message; then its own source line says what must hold.
        line = (traceback.extract_tb(error.__traceback__)[-1].line or "").removeprefix("assert ")
        message = " ".join(str(error).split()) or f"Megatron requires that {line}"
        message = re.sub(r"\bargs\.(\w+)", lambda m: "--" + m[1].replace("_", "-"), message)
        raise UserError(message) from error
