"""One training step of one rank, in a world of any size, without data and without its peers.

Megatron's own trainer builds the rank's stages and optimizer on the meta device, under torch's
fake process group, and takes a step with its own schedule.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.parallel_state import destroy_model_parallel, get_global_memory_buffer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator, destroy_rerun_state_machine
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from torch import Tensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

from megatron_ext import patches
from megatron_ext.arguments import explained
from megatron_ext.config import ETConfig
from megatron_ext.devices.placement import without_data
from megatron_ext.model.gpt import gpt_model_config
from megatron_ext.moe.router import routers_of
from megatron_ext.moe.threshold_router import ThresholdRouter, threshold_routers
from megatron_ext.planning.dry_run.fakes import EvenLoad, prepare_router
from megatron_ext.planning.dry_run.memory import SavedTensors, optimizer_tensors, storage_bytes
from megatron_ext.planning.dry_run.parameters import Parameters, count_parameters
from megatron_ext.planning.dry_run.traffic import MUON, Amount, Collective, Traffic
from megatron_ext.training.data_loading import forward_step
from megatron_ext.training.step import RoutingStep

_ROUTING, _STEP_END = "routing", "routing at the step's end"


@dataclass
class RankMemory:
    """Bytes a rank holds in a step.

    Attributes:
        parameters: weights, with the padding of Megatron's buffers.
        gradients: the buffers that they are accumulated and reduced in.
        optimizer: main parameters, where they are not the weights themselves, and their state.
        activations: the most that waits for the backward pass at once.
        router_logits: kept for the cutoffs at the end of the step.
        gather_buffer: what sequence parallelism gathers activations into.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    router_logits: int = 0
    gather_buffer: int = 0


@dataclass
class SimulatedStep:
    """What a rank does in a step.

    Attributes:
        flops: of matrix products and attention, recomputation included.
    """

    memory: RankMemory
    collectives: dict[Collective, Amount]
    flops: int


class Rank:
    """A rank's model and optimizer; make it inside :func:`fake_rank`.

    Args:
        args: of the run.
        config: of the model; left as it is.
    """

    def __init__(self, args: Namespace, config: ETConfig) -> None:
        self.args = args
        self.config = copy(config)
        self.step = RoutingStep()
        self.config.finalize_model_grads_func = self.step.finalize_model_grads
        with torch.device("meta"):
            self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder,
                cfg_container=pretrain_cfg_container_from_args(
                    args, gpt_model_config(args, self.config)
                ),
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        for chunk in self.model:
            chunk.train()
        self.microbatches = args.global_batch_size // (
            args.micro_batch_size * args.data_parallel_size
        )
        self.weights = [weight for chunk in self.model for weight in chunk.parameters()]
        self.parameters: Parameters = count_parameters(self.model, args)
        self._prepare_schedule()

    def _prepare_schedule(self) -> None:
        """What Megatron's `train` sets up, and what its first step leaves."""
        self.config.grad_scale_func = self.optimizer.scale_loss
        load = EvenLoad(self.config)
        with load.installed(), Traffic(load.answers()):
            self.optimizer.step()  # the first asks the other ranks more than later ones do
        if self.args.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in self.model]
            self.config.no_sync_func = functions if len(functions) > 1 else functions[0]

    def take_step(self, by_threshold: bool) -> SimulatedStep:
        """Count a whole step, routed by thresholds or by expert choice.

        Only as many micro-batches run as show what each of them adds.
        """
        first, stride = self._shortest_step()
        total = self.microbatches
        if total <= first + stride:
            return self._run(total, by_threshold)
        short, longer = (self._run(n, by_threshold) for n in (first, first + stride))
        return _extended(short, longer, first + stride, stride, total)

    def _shortest_step(self) -> tuple[int, int]:
        """Micro-batches that fill the pipeline, and by how many a step can grow."""
        stages = self.args.pipeline_model_parallel_size
        if self.args.virtual_pipeline_model_parallel_size is None:
            return stages, 1
        return 2 * stages + self.microbatches % stages, stages

    def _run(self, microbatches: int, by_threshold: bool) -> SimulatedStep:
        for router in threshold_routers(routers_of(self.model)):
            prepare_router(router, self.config.et_warmup_iters + 1 if by_threshold else 0)
        load = EvenLoad(self.config, self.microbatches)
        traffic = Traffic(load.answers())
        saved = SavedTensors(self.weights)
        batches = [RerunDataIterator(_batches(self.args)) for _ in self.model]
        with load.installed(), _purposes(traffic), traffic, saved:
            with patches.applied("micro-batches", microbatches):
                training.train_step(
                    forward_step,
                    batches if len(batches) > 1 else batches[0],
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    self.config,
                    get_forward_backward_func(),
                    iteration=0,
                )
        self.step.discard()
        memory = RankMemory(
            parameters=storage_bytes(self.weights),
            gradients=storage_bytes(weight.main_grad for weight in self.weights),
            optimizer=storage_bytes(optimizer_tensors(self.optimizer), apart_from=self.weights),
            activations=saved.peak,
            router_logits=load.kept_bytes,
            gather_buffer=storage_bytes(get_global_memory_buffer().buffer.values()),
        )
        return SimulatedStep(memory, traffic.collectives, traffic.flops)


def _extended(
    short: SimulatedStep, longer: SimulatedStep, ran: int, stride: int, total: int
) -> SimulatedStep:
    """A step of `total` micro-batches from two shorter ones: `longer` ran `ran` of them, `stride`
    more than `short`.

    Activations do not grow once the pipeline is full. What a search for cutoffs takes varies: in
    the forward pass the mean counts, and the step's end has searched for all micro-batches.
    """

    def extend(before: int, after: int) -> int:
        return after + (after - before) * (total - ran) // stride

    memory = copy(longer.memory)
    memory.router_logits = extend(short.memory.router_logits, memory.router_logits)
    collectives = dict(longer.collectives)
    for key, amount in longer.collectives.items():
        if key.purpose == _ROUTING:
            collectives[key] = Amount(*(part * total // ran for part in amount))
        elif key.purpose != _STEP_END:
            base = short.collectives.get(key, Amount(0, 0))
            collectives[key] = Amount(*map(extend, base, amount))
    return SimulatedStep(memory, collectives, extend(short.flops, longer.flops))


def _batches(args: Namespace) -> Iterator[dict[str, Tensor]]:
    ids = torch.empty(args.micro_batch_size, args.seq_length, dtype=torch.int64, device="meta")
    while True:
        yield {"tokens": ids, "labels": ids, "loss_mask": ids.float(), "position_ids": ids}


@contextmanager
def _purposes(traffic: Traffic) -> Iterator[None]:
    """Distinguish the purposes of collectives over the same groups, for the duration of a block."""
    select = _serving(traffic, ThresholdRouter.select, _ROUTING)
    resolve = _serving(traffic, RoutingStep.resolve, _STEP_END)
    with (
        patches.applied("dry-run traffic", traffic),
        patches.patched(ThresholdRouter, "select", select),
        patches.patched(RoutingStep, "resolve", resolve),
    ):
        yield


def traffic_replacements(traffic: Traffic) -> dict[str, Callable[..., Any]]:
    """Return functions of Megatron whose collectives are counted under a purpose."""
    buckets = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
    purposes = {
        f"{buckets}.start_grad_sync": "gradient reduction",
        f"{buckets}.start_param_sync": "parameter gather",
        "megatron.core.optimizer.emerging_optimizers.TensorParallelMuon.step": MUON,
    }
    return {
        target: _serving(traffic, patches.original(target), purpose)
        for target, purpose in purposes.items()
    }


def step_length(microbatches: int) -> dict[str, Callable[[], int]]:
    """Return a replacement for Megatron's number of micro-batches."""
    return {"megatron.training.training.get_num_microbatches": lambda: microbatches}


def backend() -> dict[str, list[str]]:
    """Return the devices of torch's fake process group, with the meta device."""
    target = "torch.distributed.Backend.backend_capability.fake"
    return {target: [*patches.original(target), "meta"]}


def _serving(traffic: Traffic, function: Callable[..., Any], purpose: str) -> Callable[..., Any]:
    """Return a function whose collectives are counted under a purpose."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with traffic.purpose(purpose):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def fake_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Be `rank` of `args.world_size` inside; the other ranks exist in name alone.

    Raises:
        UserError: the ranks cannot be laid out as the flags say.
    """
    args.rank = rank
    patches.apply("optimizer")
    with patches.applied("fake rank"), without_data():
        explained(initialize_megatron)
        try:
            yield
        finally:
            destroy_rerun_state_machine()
            destroy_model_parallel()
            dist.destroy_process_group()
