"""Build every rank of the layouts on Transformer Engine and on torch, without a GPU or data.

    python -m tests.te.shapes FILE

It writes one JSON object per layout and implementation to FILE. Every rank is simulated in this
process: the model and the optimizer are on the meta device, and collectives return at once.
"""

# ruff: noqa: E402  the device is chosen before Megatron is imported

import contextlib
import io
import json
import logging
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformer_engine.pytorch  # noqa: F401  first, because the CPU device would hide it

from megatron_ext.devices import activate

activate()
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import _build_sharded_state_dict_metadata
from megatron.training.training import destroy_global_state

from megatron_ext.arguments import parse_args
from megatron_ext.config import ETConfig
from megatron_ext.hf.architecture import from_args
from megatron_ext.hf.families import family_of
from megatron_ext.hf.live import _METADATA
from megatron_ext.planning.dry_run.parameters import count_parameters
from megatron_ext.planning.dry_run.simulated_rank import build, fake_rank
from tests.training.layouts import LAYOUTS, MODEL, Layout

TE = ("--transformer-impl", "transformer_engine")
FP8 = ("--fp8-format", "hybrid")
PADDED = ("--moe-router-padding-for-quantization",)  # which the all-gather dispatcher lacks
GROUPED = (*TE, "--moe-grouped-gemm")
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "sequential": TE,
    "grouped": GROUPED,
    "torch, bf16": ("--bf16",),
    "sequential, bf16": (*TE, "--bf16"),
    "grouped, bf16": (*GROUPED, "--bf16"),
    "grouped, fp8": (*GROUPED, "--bf16", *FP8),
}
NOT_CONVERTED = {"mamba"}  # kinds of models that have no Hugging Face family
MUON = Layout("Muon", 1, 1, ("--optimizer", "muon"))


def plain_name(name: str) -> str:
    """Return the name that an expert's weight has in any implementation.

    >>> plain_name("mlp.experts.local_experts.3.linear_fc1.weight")
    'mlp.experts.linear_fc1.weight3'
    """
    return re.sub(r"local_experts\.(\d+)\.(linear_fc[12])\.weight$", r"\2.weight\1", name)


def describe_rank(args: Namespace, config: ETConfig, rank: int) -> dict[str, Any]:
    """Return the parameters, the sharded tensors and the parameter groups of a rank."""
    with contextlib.redirect_stdout(io.StringIO()), fake_rank(args, rank):
        model, optimizer, _ = build(args, config)
        chunks = unwrap_model(model)
        named = {
            f"{number}.{plain_name(name)}": parameter
            for number, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        }
        saved, objects = sharded(chunks, _build_sharded_state_dict_metadata(args))
        live, _ = sharded(chunks, _METADATA)
        return {
            "parameters": {
                name: [list(parameter.shape), str(parameter.dtype)]
                for name, parameter in named.items()
            },
            "marks": {name: marks(parameter) for name, parameter in named.items()},
            "modules": sorted(
                {type(module).__name__ for chunk in chunks for module in chunk.modules()}
            ),
            "counts": asdict(count_parameters(model, args)),
            "saved": saved,
            "live": live,
            "objects": objects,
            "groups": groups(optimizer, named) if args.optimizer == "muon" else {},
        }


def marks(parameter: torch.nn.Parameter) -> list[Any]:
    """Return what Megatron's optimizers and gradient buffers read from a parameter."""
    tensor_parallel = getattr(parameter, "tensor_model_parallel", False)
    return [
        getattr(parameter, "allreduce", True),
        tensor_parallel,
        getattr(parameter, "partition_dim", -1) if tensor_parallel else -1,
        bool(getattr(parameter, "sequence_parallel", False)),
        bool(getattr(parameter, "is_qkv", False)),
        bool(getattr(parameter, "is_embedding_or_output_parameter", False)),
    ]


def sharded(chunks: list[torch.nn.Module], metadata: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the sharded tensors of a rank by name and position, and the names of other objects."""
    tensors, objects = {}, []
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedObject):
                objects.append(part.key)
            elif isinstance(part, ShardedTensor):
                place = f"{part.key} {list(part.global_offset)}"
                kind = [list(part.global_shape), list(part.local_shape), str(part.dtype)]
                tensors[place] = [*kind, is_main_replica(part.replica_id)]

    return tensors, objects


def groups(optimizer: Any, named: dict[str, torch.nn.Parameter]) -> dict[str, list[Any]]:
    """Return the optimizer and the learning rate of every parameter."""
    names = {id(parameter): name for name, parameter in named.items()}
    for name, parameter in named.items():  # in bf16 the optimizer steps copies in fp32
        names[id(getattr(parameter, "main_param", parameter))] = name
    result = {}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kind = type(part.optimizer).__name__
                result[names[id(parameter)]] = [kind, group["max_lr"], group["wd_mult"]]
    return result


def describe(layout: Layout, implementation: str) -> Iterator[dict[str, Any]]:
    """Yield what every rank of a layout builds, and the tensors that conversion reads."""
    flags = [*MODEL, *layout.all_flags, *IMPLEMENTATIONS[implementation], "--fake-process-group"]
    if "--fp8-format" in flags and "allgather" not in flags:
        flags += PADDED
    with contextlib.redirect_stdout(io.StringIO()):
        args, config = parse_args(flags, writes=False, world_size=layout.ranks)
    keys: set[str] = set()
    if layout.kind not in NOT_CONVERTED:
        architecture = from_args(args)
        keys = {link.key for link in family_of(architecture).links(architecture)}
    for rank in range(layout.ranks):
        yield {**describe_rank(args, config, rank), "converted": sorted(keys)}
    destroy_global_state()


def main(file: Path) -> None:
    """Write the descriptions of every layout and implementation to a file."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with file.open("w") as lines:
        for number, layout in enumerate([*LAYOUTS, MUON]):
            for implementation in IMPLEMENTATIONS:
                ranks = list(describe(layout, implementation))
                row = {"layout": number, "implementation": implementation, "ranks": ranks}
                print(json.dumps(row), file=lines, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
