"""What a training needs, from the model's config.json alone."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.training import destroy_global_state

from alignment.commands.training_flags import layout_of
from alignment.engines.megatron_launch import MegatronLayout
from megatron_ext.arguments import parse_args
from megatron_ext.config import ETConfig
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import Architecture, to_flags
from megatron_ext.hf.configs import load_config
from megatron_ext.hf.families import read_config
from megatron_ext.planning.dry_run import dry_run as pretraining_dry_run
from megatron_ext.planning.dry_run import held_parameters
from megatron_ext.planning.dry_run.dry_run_report import STEP_ALONE


@dataclass(frozen=True)
class ResidentModel:
    """A model that ranks hold beside the one that is trained, in the same layout.

    Attributes:
        name: what it is, for people.
        model: its folder; models of one folder are one copy.
        rows, length: of the answers that it writes at a time; 0 if it writes none.
    """

    name: str
    model: str
    rows: int = 0
    length: int = 0


def dry_run(options: argparse.Namespace, beside: Sequence[ResidentModel] | None = None) -> None:
    """Print parameters, memory of a rank, FLOPs a token and collectives of a step; of a model that
    is to write answers also what their keys and values take.

    The step is a short one, of as many micro-batches as there are pipeline stages: longer ones
    take no more memory.

    Args:
        beside: of a policy: the other models that its ranks hold. What all takes together is told.

    Raises:
        UserError: a model is of no known family, or --engine is not megatron.
    """
    if options.engine != "megatron":
        raise UserError("--dry-run is for --engine megatron")
    if os.environ.get("RANK", "0") != "0":
        return
    model = _architecture(options.model, "--model")
    others = {held.model: _architecture(held.model, held.name) for held in beside or ()}
    layout = layout_of(options)
    args, config = _parsed(model, options, layout)

    def cache(of: Architecture, rows: int, length: int) -> int:
        return cache_bytes(of, layout, rows, length, args.params_dtype)

    def together(facts: Mapping[str, Any]) -> dict[str, Any]:
        if beside is None:
            return {"answers": answers} if answers else {}
        stages = [stage["memory"] for stage in facts["stages"]]
        passing = [sum(memory[name] for name in STEP_ALONE) for memory in stages]
        lasting = [sum(memory.values()) for memory in stages]
        lasting = [whole - part for whole, part in zip(lasting, passing)]
        kept = {"policy: weights, gradients, optimizer": lasting}
        if options.algorithm == "ppo":
            if _architecture(options.critic or options.model, "--critic") != model:
                raise UserError("--dry-run counts a --critic of the policy's own shape alone")
            kept["critic: weights, gradients, optimizer"] = lasting
        for folder, other in others.items():
            destroy_global_state()
            names = ", ".join(held.name for held in beside if held.model == folder)
            counts = held_parameters(*_parsed(other, options, layout))
            kept[f"{names}: weights"] = [n * args.params_dtype.itemsize for n in counts]
        caches = {"policy": cache(model, options.rows, options.seq_length)}
        caches |= {h.name: cache(others[h.model], h.rows, h.length) for h in beside if h.rows}
        rows = {**kept, "what a step needs besides": passing}
        rows |= {f"or keys and values, {n}": [size] * len(stages) for n, size in caches.items()}
        most = [max(part, *caches.values()) for part in passing]
        rows["together at most"] = [sum(column) for column in zip(*kept.values(), most)]
        return {"together": rows}

    answers = 0
    if getattr(options, "thinking", "none") != "none":
        answers = cache(model, options.rows, options.seq_length)
        print(
            f"while it answers, keys and values of --rows {options.rows} take up to "
            f"{answers / 2**20:,.0f} MiB of a rank, in place of the activations\n"
        )
    pretraining_dry_run(args, config, together)


def _architecture(folder: str, of: str) -> Architecture:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{of} {folder} has no config.json, which --dry-run reads")
    return read_config(load_config(Path(folder)))


def _parsed(
    model: Architecture, options: argparse.Namespace, layout: MegatronLayout
) -> tuple[argparse.Namespace, ETConfig]:
    """Of `pretrain_et.py`, for a model in the layout of these options."""
    copies = max(1, options.dry_run // (layout.tensor * layout.pipeline * layout.context))
    values = {
        "seq-length": options.seq_length,
        "global-batch-size": layout.micro_batch * copies * layout.pipeline,
        "lr": options.lr,
        "train-iters": 1,
        "vocab-size": model.vocab,
        "transformer-impl": "local",
        "dry-run": options.dry_run,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    precision = [] if options.dtype == "fp32" else ["--bf16"]
    extra = shlex.split(options.megatron_flags)
    return parse_args([*to_flags(model), *precision, *layout.flags, *words, "--mock-data", *extra])


def cache_bytes(
    model: Architecture, layout: MegatronLayout, rows: int, length: int, dtype: torch.dtype
) -> int:
    """Bytes of the keys and values of rows of so many tokens, on a rank of the first stage.

    The cache doubles its length when it is full.
    """
    heads = -(-model.kv_heads // layout.tensor)
    layers = -(-model.layers // layout.pipeline)
    longest = 1 << (length - 1).bit_length()
    return 2 * layers * rows * heads * model.head_dim * longest * dtype.itemsize
