"""Weights of a rank on Transformer Engine or torch, loaded, exported and saved without a GPU.

    torchrun ... -m tests.te.weights REPORT LOAD SAVE FLAGS...

It builds the model with the flags of a run, loads a checkpoint from LOAD unless that is "-", writes
the sum of every tensor that the live export yields to REPORT, and saves a checkpoint in SAVE.
"""

# ruff: noqa: E402  the device is chosen before Megatron is imported

import json
import sys
import zlib
from pathlib import Path

import transformer_engine.pytorch  # noqa: F401  first, because the CPU device would hide it

from megatron_ext.devices import activate

activate()
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.checkpointing import _build_sharded_state_dict_metadata
from megatron.training.initialize import initialize_megatron

from megatron_ext.arguments import parse_args
from megatron_ext.hf.architecture import from_args
from megatron_ext.hf.families import family_of
from megatron_ext.hf.live import LiveTensors
from megatron_ext.model.language_model import language_model_config
from megatron_ext.moe.thresholds import Thresholds


def main(report: Path, load: str, save: Path, flags: list[str]) -> None:
    """Load, export and save the weights of this rank."""
    args, config = parse_args(flags, writes=False)
    initialize_megatron()
    model_config = language_model_config(args, config)
    (model,) = model_config.get_builder_cls()(model_config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    metadata = _build_sharded_state_dict_metadata(args)
    for number, module in enumerate(model.modules()):
        if isinstance(module, Thresholds):  # without a step they have no value
            module.average.fill_(number if load == "-" else 0)
            module.updates.fill_(3)
    if load != "-":
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        state = {"model": model.sharded_state_dict(metadata=metadata)}
        strict = StrictHandling(args.dist_ckpt_strictness)
        loaded = dist_checkpointing.load(state, load, strict=strict)
        model.load_state_dict(loaded["model"])
    architecture = from_args(args)
    sums = {
        name: zlib.crc32(tensor.float().numpy().tobytes())
        for name, tensor in LiveTensors([model], architecture, family_of(architecture))
    }
    if dist.get_rank() == 0:
        report.write_text(json.dumps(sums))
        save.mkdir()
    dist.barrier()
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    dist_checkpointing.save(state, str(save), content_metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
