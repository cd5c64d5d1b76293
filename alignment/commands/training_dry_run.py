"""Requirements of a training, from the model's config.json alone."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training.training import destroy_global_state

from alignment.commands.config_groups import TrainingConfig
from alignment.commands.training_setup import megatron_layout
from alignment.engines.megatron_launch import MegatronLayout
from alignment.rl.resident_models import ResidentModel
from megatron_ext.arguments import parse_args
from megatron_ext.config import ETConfig
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, to_flags
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import read_config
from megatron_ext.planning.dry_run import dry_run as pretraining_dry_run
from megatron_ext.planning.dry_run import parameters_per_stage
from megatron_ext.planning.dry_run.dry_run_report import STEP_ALONE


def dry_run(
    config: TrainingConfig,
    world_size: int,
    generation_batch_size: int = 0,
    critic: str | None = None,
    resident: Sequence[ResidentModel] | None = None,
) -> None:
    """Print parameters, memory of a rank, FLOP per token and the collectives of a step.

    For a model that generates answers, the memory of their keys and values is printed too. The step
    has as many micro-batches as there are pipeline stages: longer ones take no more memory.

    Args:
        config: Flags of the command.
        world_size: Number of ranks.
        generation_batch_size: Answers that a rank generates at a time; 0 if it generates none.
        critic: Folder of the critic's model, if there is a critic.
        resident: The other models on the ranks of a policy, whose memory is added up with it.

    Raises:
        UserError: A model is of an unknown family, or --engine is not megatron.
    """
    if config.engine.engine != "megatron":
        raise UserError("--dry-run requires --engine megatron.")
    if os.environ.get("RANK", "0") != "0":
        return
    length = config.batch.seq_length
    model = _read_architecture(config.model.model, "--model")
    others = {each.model: _read_architecture(each.model, each.name) for each in resident or ()}
    layout = megatron_layout(config.engine, config.optimization.use_distributed_optimizer)
    args, et_config = _pretraining_args(model, config, layout, world_size)
    answers = 0

    def cache(of: Architecture, rows: int, length: int) -> int:
        return cache_bytes(of, layout, rows, length, args.params_dtype)

    def together(facts: Mapping[str, Any]) -> dict[str, Any]:
        if resident is None:
            return {"answers": answers} if answers else {}
        stages = [stage["memory"] for stage in facts["stages"]]
        temporary = [sum(memory[name] for name in STEP_ALONE) for memory in stages]
        totals = [sum(memory.values()) for memory in stages]
        state = [total - part for total, part in zip(totals, temporary)]
        lasting = {"policy: weights, gradients, optimizer": state}
        if critic:
            if _read_architecture(critic, "--critic") != model:
                raise UserError(
                    f"--dry-run cannot count --critic {critic}, which has another shape than "
                    "--model: remove --critic or give one of the same shape."
                )
            lasting["critic: weights, gradients, optimizer"] = state
        for folder, other in others.items():
            destroy_global_state()
            names = ", ".join(each.name for each in resident if each.model == folder)
            counts = parameters_per_stage(*_pretraining_args(other, config, layout, world_size))
            lasting[f"{names}: weights"] = [n * args.params_dtype.itemsize for n in counts]
        caches = {"policy": cache(model, generation_batch_size, length)}
        for each in resident:
            if size := each.generation_batch_size:
                caches[each.name] = cache(others[each.model], size, each.length)
        rows = {**lasting, "what a step needs besides": temporary}
        rows |= {f"or keys and values, {n}": [size] * len(stages) for n, size in caches.items()}
        most = [max(part, *caches.values()) for part in temporary]
        rows["together at most"] = [sum(column) for column in zip(*lasting.values(), most)]
        return {"together": rows}

    if generation_batch_size and resident is None:
        answers = cache(model, generation_batch_size, length)
        print(
            "While it answers, the keys and values of --generation-batch-size "
            f"{generation_batch_size} take up to {answers / 2**20:,.0f} MiB of a rank, in place of "
            "the activations.\n"
        )
    pretraining_dry_run(args, et_config, together)


def _read_architecture(folder: str, name: str) -> Architecture:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{name} {folder} has no config.json, which --dry-run reads.")
    return read_config(load_config(Path(folder)))


def _pretraining_args(
    model: Architecture, config: TrainingConfig, layout: MegatronLayout, world_size: int
) -> tuple[argparse.Namespace, ETConfig]:
    """Return the arguments of `pretrain_et.py` for a model in the layout of these flags."""
    copies = max(1, world_size // (layout.tensor * layout.pipeline * layout.context))
    values = {
        "seq-length": config.batch.seq_length,
        "global-batch-size": layout.micro_batch * copies * layout.pipeline,
        "lr": config.optimization.lr,
        "train-iters": 1,
        "vocab-size": model.vocab,
        "transformer-impl": "local",
        "dry-run": world_size,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    precision = [] if config.engine.dtype == "fp32" else ["--bf16"]
    extra = shlex.split(config.engine.megatron_flags)
    return parse_args([*to_flags(model), *precision, *layout.flags, *words, "--mock-data", *extra])


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
