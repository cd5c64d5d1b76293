"""Requirements of a training, from the shapes of its models alone."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.training.training import destroy_global_state

from alignment.commands.config_groups import TrainingConfig
from alignment.commands.training_setup import megatron_layout
from alignment.engines.export import SHARD_BYTES
from alignment.engines.megatron_launch import MegatronLayout, check_samples_per_row
from alignment.rl.resident_models import ResidentModel
from megatron_ext.arguments import parse_args, parse_flags
from megatron_ext.config import ETConfig
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, to_flags
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import read_config
from megatron_ext.hf.sources import open_megatron
from megatron_ext.model_location import locate_model
from megatron_ext.planning.devices import Device, device_of
from megatron_ext.planning.dry_run import dry_run as pretraining_dry_run
from megatron_ext.planning.dry_run import parameters_per_stage
from megatron_ext.planning.dry_run.dry_run_report import EITHER, STEP_ALONE, SUMS


def dry_run(
    config: TrainingConfig,
    world_size: int,
    generation_batch_size: int = 0,
    critic: str | None = None,
    resident: Sequence[ResidentModel] | None = None,
) -> None:
    """Print parameters, memory of a rank, FLOP per token and the collectives of a step.

    For a model that generates answers, the memory of their keys and values is printed too, and so
    is that of the weights that a rank copies when it exports the model. The step has as many
    micro-batches as there are pipeline stages: longer ones take no more memory.

    Args:
        config: Flags of the command.
        world_size: Number of ranks.
        generation_batch_size: Answers that a rank generates at a time; 0 if it generates none.
        critic: Folder of the critic's model, if there is a critic.
        resident: The other models on the ranks of a policy, whose memory is added up with it.

    Raises:
        UserError: A model is of an unknown family or cannot be trained on the layout, or --engine
            is not megatron.
        LimitExceeded: A rank does not fit --device. The report is printed.
    """
    if config.engine.engine != "megatron":
        raise UserError("--dry-run requires --engine megatron.")
    device = device_of(config.run.device, world_size)
    if os.environ.get("RANK", "0") != "0":
        return
    length = config.batch.seq_length
    model = _read_architecture(config.model.model, "--model")
    others = {each.model: _read_architecture(each.model, each.name) for each in resident or ()}
    if critic and _read_architecture(critic, "--critic") != model:
        raise UserError(
            f"--dry-run cannot count --critic {critic}, which has another shape than --model. "
            "Remove --critic or give one of the same shape."
        )

    def parse(of: Architecture, flags: Sequence[str]) -> tuple[argparse.Namespace, ETConfig]:
        args, et_config = _pretraining_args(of, config, world_size, flags)
        if of is model:
            check_samples_per_row(of, args.tensor_model_parallel_size, args.context_parallel_size)
        return args, et_config

    def together(
        args: argparse.Namespace, facts: Mapping[str, Any], flags: Sequence[str]
    ) -> dict[str, Any]:
        layout = MegatronLayout(
            tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size
        )

        def cache(of: Architecture, rows: int, length: int) -> int:
            return cache_bytes(of, layout, rows, length, args.params_dtype)

        stages = [stage["memory"] for stage in facts["stages"]]
        exported = _exported_bytes(args, facts, device)
        if resident is None:
            rows = {f"{EITHER}weights at export": [exported] * len(stages)}
            answers = cache(model, generation_batch_size, length) if generation_batch_size else 0
            return {"moments": rows} | ({"answers": answers} if answers else {})
        temporary = [sum(memory[name] for name in STEP_ALONE) for memory in stages]
        totals = [sum(memory.values()) for memory in stages]
        state = [total - part for total, part in zip(totals, temporary)]
        policy, step, most = SUMS
        lasting = {policy: state}
        if critic:
            lasting["critic: weights, gradients, optimizer"] = state
        for folder, other in others.items():
            destroy_global_state()
            names = ", ".join(each.name for each in resident if each.model == folder)
            counts = parameters_per_stage(*parse(other, flags))
            lasting[f"{names}: weights"] = [n * args.params_dtype.itemsize for n in counts]
        moments = {
            "keys and values, policy": cache(model, generation_batch_size, length),
            **{
                f"keys and values, {each.name}": cache(
                    others[each.model], each.generation_batch_size, each.length
                )
                for each in resident
                if each.generation_batch_size
            },
            "weights at export": exported,
        }
        rows = {**lasting, step: temporary}
        rows |= {f"{EITHER}{name}": [size] * len(stages) for name, size in moments.items()}
        largest = [max(part, *moments.values()) for part in temporary]
        rows[most] = [sum(column) for column in zip(*lasting.values(), largest)]
        return {"together": rows}

    args, et_config = parse(model, ())
    if generation_batch_size and resident is None:
        layout = megatron_layout(config.engine)
        answers = cache_bytes(model, layout, generation_batch_size, length, args.params_dtype)
        print(
            "While it answers, the keys and values of --generation-batch-size "
            f"{generation_batch_size} take up to {answers / 2**20:,.0f} MiB of a rank, in place of "
            "the activations.\n"
        )
    pretraining_dry_run(
        args, et_config, device, lambda flags: parse(model, flags), together, _spelled
    )


def _spelled(flags: Sequence[str]) -> str:
    """Return how flags of `pretrain_et.py` are written for an `et-align` command."""
    text = " ".join(flags).replace(" --sequence-parallel", "").replace("--bf16", "--dtype bf16")
    return f"--megatron-flags '{text}'" if text.startswith("--recompute") else text


def _exported_bytes(args: argparse.Namespace, facts: Mapping[str, Any], device: Device) -> int:
    """Return the bytes that a rank copies when the model is exported.

    Every rank gathers one whole tensor at a time, of which embeddings are the largest. In the
    memory of the host it has the tensors of a file that it writes and of the next.
    """
    size = args.params_dtype.itemsize
    tensor = args.padded_vocab_size * args.hidden_size * size
    if device.is_card:
        return int(tensor)
    return int(tensor + min(facts["parameters"]["total"] * size, 2 * SHARD_BYTES))


def _read_architecture(path: str, name: str) -> Architecture:
    location = locate_model(path, name)
    if location.kind == "megatron":
        return open_megatron(location.folder).model
    return read_config(load_config(location.folder))  # the weights may be missing


def _pretraining_args(
    model: Architecture, config: TrainingConfig, world_size: int, flags: Sequence[str] = ()
) -> tuple[argparse.Namespace, ETConfig]:
    """Return the arguments of `pretrain_et.py` for a model in the layout of these flags.

    Args:
        model: Shape of the model.
        config: Flags of the command.
        world_size: Number of ranks.
        flags: Further flags of `pretrain_et.py`, which override the others.
    """
    layout = megatron_layout(config.engine, config.optimization.use_distributed_optimizer)
    values = {
        "seq_length": config.batch.seq_length,
        "lr": config.optimization.lr,
        "train_iters": 1,
        "vocab_size": model.vocab,
        "transformer_impl": "local",
        "dry_run": world_size,
    }
    precision = [] if config.engine.dtype == "fp32" else ["--bf16"]
    extra = [*shlex.split(config.engine.megatron_flags), *flags]
    defaults = [*to_flags(model, values), *precision, *layout.flags, "--mock-data"]
    sizes, _ = parse_flags(extra, writes=False, defaults=defaults)
    ranks = sizes.tensor_model_parallel_size * sizes.context_parallel_size
    stages = sizes.pipeline_model_parallel_size
    copies = max(1, world_size // (ranks * stages))
    batch = sizes.micro_batch_size * copies * stages
    return parse_args([*extra, "--global-batch-size", str(batch)], defaults=defaults)


def cache_bytes(
    model: Architecture, layout: MegatronLayout, rows: int, length: int, dtype: torch.dtype
) -> int:
    """Return the bytes of the keys and values of rows on a rank of the first stage.

    The cache doubles its length when it is full.

    Args:
        model: Shape of the model.
        layout: Layout of the ranks.
        rows: Number of rows.
        length: Tokens in each row.
        dtype: Type of the keys and values.
    """
    heads = -(-model.kv_heads // layout.tensor)
    layers = -(-model.layers // layout.pipeline)
    longest = 1 << (length - 1).bit_length()
    return 2 * layers * rows * heads * model.head_dim * longest * dtype.itemsize
