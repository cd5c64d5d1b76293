"""One rank of a world of any size, built without data and without its peers."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.parallel_state import destroy_model_parallel, get_global_memory_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.rerun_state_machine import RerunDataIterator, destroy_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from torch import Tensor

from megatron_ext.arguments import explained
from megatron_ext.config import ETConfig
from megatron_ext.devices.placement import without_data
from megatron_ext.model.gpt import gpt_model_config
from megatron_ext.training.data import forward_step
from megatron_ext.training.dry_run.memory import SavedTensors, optimizer_tensors, storage_bytes
from megatron_ext.training.dry_run.stand_ins import EvenLoad, prepare_router
from megatron_ext.training.dry_run.traffic import Amount, Collective, Traffic
from megatron_ext.training.step import RoutingStep, routers_of

def trace(args, config, rank, microbatches, updates=10**9):
    with fake_rank(args, rank):
        config = copy(config)
        step = RoutingStep(config)
        config.finalize_model_grads_func = step.finalize_model_grads
        container = pretrain_cfg_container_from_args(args, gpt_model_config(args, config))
        with torch.device('meta'):
          model, optimizer, scheduler = training.setup_model_and_optimizer(ModelType.encoder_or_decoder, cfg_container=container, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
        for router in routers_of(model):
            prepare_router(router, updates)
        for m in model: m.train()
        even = EvenLoad(config.mean_experts/config.num_moe_experts)
        config.grad_scale_func = optimizer.scale_loss
        iterator = [RerunDataIterator(batches(args)) for _ in model]
        if len(iterator) == 1: iterator = iterator[0]
        traffic = Traffic(even.answers())
        saved = SavedTensors([p for m in model for p in m.parameters()])
        with even.installed(), mock.patch.object(training, "get_num_microbatches", lambda: microbatches), mock.patch("megatron_ext.training.step.routing_figures", lambda *a: {}):
            with traffic, saved:
                training.train_step(forward_step, iterator, model, optimizer, scheduler, config, get_forward_backward_func(), iteration=0)
        params=[p for m in model for p in m.parameters()]
        print(storage_bytes(params), storage_bytes([p.main_grad for p in params]), storage_bytes(optimizer_tensors(optimizer), params))
        return traffic, saved.peak, even.kept_bytes

def batches(args):
    shape=(args.micro_batch_size, args.seq_length)
    z = torch.empty(shape, dtype=torch.int64, device="meta")
    while True:
        yield dict(tokens=z, labels=z, loss_mask=z.float(), position_ids=z)


@contextmanager
def fake_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Be `rank` of `args.world_size` inside; the peers exist in name alone."""
    args.rank = rank
    backends = dist.Backend.backend_capability
    from torch.testing._internal.distributed import fake_pg
    with mock.patch.dict(backends, fake=[*backends["fake"], "meta"]), without_data():
        initialize_megatron()
        try:
            yield
        finally:
            destroy_rerun_state_machine()
            destroy_model_parallel()
            dist.destroy_process_group()
