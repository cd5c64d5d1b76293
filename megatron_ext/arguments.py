"""Command line of `pretrain_et.py`: flags of Megatron and of this project, and recipes."""

import contextlib
import io
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.training import get_tokenizer
from megatron.training.arguments import (
    MultiStorageClientFeature,
    add_megatron_arguments,
    core_transformer_config_from_args,
    validate_args,
)
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from megatron_ext.config import ETConfig
from megatron_ext.conflicts import check_conflicts
from megatron_ext.console import console
from megatron_ext.data.run_tokenizer import tokenizer_flags
from megatron_ext.devices import device_default_args, is_cpu_device
from megatron_ext.errors import ToolParser, UserError
from megatron_ext.layer_pattern import expand_layer_pattern
from megatron_ext.optimizer import paper_flags
from megatron_ext.planning.layout import check_layout
from megatron_ext.ranges import batch_schedule, check_ranges
from megatron_ext.recipes import expand_recipes
from megatron_ext.run_flags import add_arguments
from megatron_ext.tracker_flags import tracker_settings
from megatron_ext.unsupported_flags import check_unsupported

_DEFAULTS = [
    # Megatron's mask is a square matrix for each sample; attention is causal without it.
    "--no-create-attention-mask-in-dataloader",
    "--exit-signal-handler",
    # Megatron divides by the interval and has no default for it.
    "--eval-interval=1000",
    # A checkpoint can then be resumed in any layout, see megatron_ext.training.resharding.
    "--dist-ckpt-optim-fully-reshardable",
]

_NO_TRACKERS = ["--tensorboard-dir", "", "--wandb-project", "", "--mlflow-experiment", ""]


def parse_args(
    argv: Sequence[str],
    writes: bool = True,
    world_size: int | None = None,
    defaults: Sequence[str] = (),
) -> tuple[Namespace, ETConfig]:
    """Parse and validate a command line, and initialize Megatron's global state with it.

    Megatron keeps its arguments, its tokenizer and its trackers in global variables, and builds the
    model's configuration from the validated arguments, so these steps cannot be left to a caller.

    Args:
        argv: Flags, without the program's name. `--recipe FILE` expands in place; flags that
            follow it override those of the recipe.
        writes: Whether TensorBoard and other trackers, which write files, may be opened.
        world_size: Number of ranks. Default: that of the environment.
        defaults: Flags that the program sets and those of `argv` override.

    Raises:
        UserError: The command line has a mistake; raised on every rank.
    """
    args, explicit = parse_flags(argv, writes, defaults)
    args.rank = int(os.environ.get("RANK", "0"))
    if args.dry_run is not None:
        args.rank = args.local_rank = 0
    args.world_size = args.dry_run or world_size or int(os.environ.get("WORLD_SIZE", "1"))
    _check_before_megatron(args, explicit)
    with contextlib.nullcontext() if args.dry_run is None else _silence():
        explained(lambda: _initialize_globals(args))
    if args.step_batch_size_schedule is not None:  # checks and plans use the largest batch
        args.global_batch_size = batch_schedule(args)[-1][1]
    args.vocab_size = get_tokenizer().vocab_size  # without padding
    _check_end_token(args)
    if "padded_vocab_size" in explicit:
        _use_rows(args)
    if args.stall_timeout is None:
        args.stall_timeout = 0.9 * 60 * args.distributed_timeout_minutes
    config: ETConfig = explained(lambda: core_transformer_config_from_args(args, ETConfig))
    # Megatron builds these after the process groups, and refuses some flags only there.
    explained(lambda: get_megatron_optimizer_config(args))
    explained(lambda: get_megatron_ddp_config(args))
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_dtype"):
        setattr(args, name, getattr(config, name))  # the trainer logs the values of the arguments
    return args, config


def _check_end_token(args: Namespace) -> None:
    """Refuse a tokenizer without a token that ends documents.

    Raises:
        UserError: There is none, which Megatron notices while it builds its datasets.
    """
    try:
        end = get_tokenizer().eod
    except (AttributeError, KeyError, TypeError, ValueError):  # of the different tokenizers
        end = None
    if end is None or end < 0:
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model} has no end token, which ends documents. "
            'Name one in its tokenizer_config.json as "eos_token": "TOKEN", or train a tokenizer '
            "with tools.train_tokenizer."
        )


def _use_rows(args: Namespace) -> None:
    """Set the rows of the embedding to `--padded-vocab-size`, for a model trained elsewhere.

    Raises:
        UserError: The tokenizer has more entries.
    """
    rows, tensor = args.padded_vocab_size, args.tensor_model_parallel_size
    if rows < args.vocab_size:
        raise UserError(
            f"--padded-vocab-size {rows} is below the {args.vocab_size} entries of the tokenizer. "
            "Give the tokenizer of the model, or raise it."
        )
    args.hf_vocab_size = rows
    args.padded_vocab_size = -(-rows // tensor) * tensor


def parse_flags(
    argv: Sequence[str], writes: bool = True, defaults: Sequence[str] = ()
) -> tuple[Namespace, set[str]]:
    """Parse a command line without side effects.

    The defaults of some flags depend on other flags. Therefore the command line is parsed first
    without them, and again with the defaults in front of it.

    Args:
        argv: Flags, without the program's name.
        writes: Whether trackers may be opened.
        defaults: Flags that the program sets and those of `argv` override.

    Returns:
        The arguments, and the names of those that the command line, a recipe or the program sets.
    """
    parser = ToolParser(prog="pretrain_et.py", add_help=False, allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    flags = expand_recipes(argv, parser, defaults=defaults)
    if {"-h", "--help"} & set(flags):
        _print_help(parser)
        sys.exit(0)
    explicit = _explicit(flags, parser)
    base = [*_DEFAULTS, *device_default_args()]
    args = parser.parse_args([*base, *flags])
    forced = [] if args.dry_run is None else _dry_run_flags(args)
    if args.async_save:
        forced += _async_save_flags(args, explicit)
    if not writes:
        forced += _NO_TRACKERS
    run_dir = [] if args.dry_run is not None else _run_dir_flags(args.run_dir)
    before = [*run_dir, *paper_flags(args), *base]
    if args.dry_run is None:
        forced += tokenizer_flags(parser.parse_args([*before, *flags]), explicit)
    args = parser.parse_args([*before, *flags, *forced])
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.dry_run is not None:  # a dry run loads no weights
        args.load = args.pretrained_checkpoint = None
    return args, explicit


def _initialize_globals(args: Namespace) -> None:
    """Validate the arguments and set Megatron's global variables.

    These are the steps of Megatron's `parse_and_validate_args` after parsing. It cannot be called
    because it reads the command line of the process, which has recipes and lacks these defaults.
    """
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    if args.enable_msc and not args.disable_msc_deprecated:
        MultiStorageClientFeature.enable()
        if not MultiStorageClientFeature.is_enabled():
            raise UserError(
                "--enable-msc needs the package multi-storage-client. Install it, or leave the "
                "flag out."
            )
    else:
        args.enable_msc = False
        MultiStorageClientFeature.disable()
    if args.use_checkpoint_args:
        if args.load is None and args.pretrained_checkpoint is None:
            raise UserError(
                "--use-checkpoint-args needs --load or --pretrained-checkpoint. Add one."
            )
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
    validate_args(args, {})
    # Megatron would open separate trackers; see megatron_ext.training.metrics.
    trackers = {name: getattr(args, name) for name in ("tensorboard_dir", "wandb_project")}
    args.tensorboard_dir, args.wandb_project = None, ""
    set_global_variables(args)
    for name, value in trackers.items():
        setattr(args, name, value)


def _print_help(parser: ArgumentParser) -> None:
    """Print every flag, although some of Megatron's texts contain percent signs."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    parser.print_help()


def _run_dir_flags(run_dir: str | None) -> list[str]:
    """Return flags for the folders in a run directory, which later flags override."""
    if run_dir is None:
        return []
    checkpoints = str(Path(run_dir, "checkpoints"))
    tensorboard = str(Path(run_dir, "tensorboard"))
    flags = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", tensorboard]
    return [*flags, "--save-interval", "1000"]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress Megatron's list of settings and its warnings about disabled features."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dry_run_flags(args: Namespace) -> list[str]:
    """Return flags with which a run needs no other ranks and neither reads nor writes files."""
    if args.dry_run < 1:
        raise UserError(f"--dry-run {args.dry_run} must be at least one rank.")
    if not is_cpu_device():
        raise UserError("dry_run in a recipe has no effect. Use --dry-run on the command line.")
    flags = [*device_default_args(), "--fake-process-group"]  # these override the recipe
    flags += _NO_TRACKERS
    flags += tokenizer_flags(args, set())
    file, type_is_set = args.tokenizer_model, args.tokenizer_type or "--tokenizer-type" in flags
    if not type_is_set or (file is not None and not Path(file).exists()):
        if args.vocab_size is None:
            raise UserError("--dry-run needs --vocab-size, or an existing --tokenizer-model.")
        flags += ["--tokenizer-type", "NullTokenizer"]
    return flags


def _explicit(argv: Sequence[str], parser: ArgumentParser) -> set[str]:
    """Return the names of the arguments that a command line sets, its recipes expanded."""
    options = (word.partition("=")[0] for word in argv)
    actions = parser._option_string_actions
    return {actions[option].dest for option in options if option in actions}


def _check_before_megatron(args: Namespace, explicit: set[str]) -> None:
    """Refuse mistakes that Megatron reports as a stack trace, or not at all."""
    if args.stall_timeout is not None and args.stall_timeout <= 0:
        raise UserError(f"--stall-timeout {args.stall_timeout:g} must be above 0 seconds.")
    if args.device is not None and args.dry_run is None:
        raise UserError("--device requires --dry-run. Add it, or leave --device out.")
    expand_layer_pattern(args, explicit)
    check_layout(args, args.world_size)
    check_ranges(args, args.world_size)
    if args.dry_run is None:
        tracker_settings(args).check()
    if args.yaml_cfg is not None:
        raise UserError("--yaml-cfg is not supported. Use --recipe.")
    check_unsupported(args)
    for warning in check_conflicts(args, explicit):
        if os.environ.get("RANK", "0") == "0":
            name = Path(sys.argv[0]).name
            console.warn(f"{name}: warning: {warning}")
    model, kind = args.tokenizer_model, args.tokenizer_type  # other types may be on a hub
    is_file = Path(model or "").is_file()
    if (kind in ("SentencePieceTokenizer", "TikTokenizer") and not is_file) or (model and not kind):
        raise UserError(f"--tokenizer-model {model} does not exist. Check the path.")
    if args.reset_attention_mask:
        raise UserError(
            "--reset-attention-mask is not supported, because attention is always causal. Leave it "
            "out."
        )
    if args.dry_run is None:
        _check_folders(args)


def _async_save_flags(args: Namespace, explicit: set[str]) -> list[str]:
    """Return the flags that Megatron needs to save asynchronously."""
    flags = ["--use-persistent-ckpt-worker"]
    if args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        if "async_strategy" in explicit:
            raise UserError(
                "--async-strategy nvrx needs the package nvidia-resiliency-ext. Install it, or "
                "use mcore."
            )
        flags += ["--async-strategy", "mcore"]
    return flags


def _check_folders(args: Namespace) -> None:
    """Refuse folders of the run that cannot be created or written, without creating them."""
    for flag in ("run_dir", "save", "tensorboard_dir"):
        folder = getattr(args, flag)
        if folder is None:
            continue
        path = Path(folder).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            option = "--" + flag.replace("_", "-")
            why = "is not a folder" if not existing.is_dir() else "is not writable"
            raise UserError(f"{option} {folder} cannot be written: {existing} {why}. Give another.")


def explained(call: Callable[[], Any]) -> Any:
    """Call a validation of Megatron and convert its errors.

    Args:
        call: Function that calls Megatron.

    Raises:
        UserError: Megatron refuses the arguments.
    """
    try:
        return call()
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError, OSError) as error:
        # The source line of an assertion without a message contains its condition.
        line = (traceback.extract_tb(error.__traceback__)[-1].line or "").removeprefix("assert ")
        message = " ".join(str(error).split()) or f"Megatron requires that {line}"
        message = re.sub(r"\bargs\.(\w+)", lambda m: "--" + m[1].replace("_", "-"), message)
        raise UserError(message) from error
