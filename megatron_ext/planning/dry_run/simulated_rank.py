"""Simulation of a training step of one rank, without data and without the other ranks.

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
from megatron_ext.model.language_model import language_model_config
from megatron_ext.moe.router import routers_of
from megatron_ext.moe.threshold_router import ThresholdRouter, threshold_routers
from megatron_ext.planning.dry_run.fakes import EvenLoad, prepare_router
from megatron_ext.planning.dry_run.memory import (
    LiveTensors,
    RankMemory,
    SavedTensors,
    optimizer_tensors,
    storage_bytes,
)
from megatron_ext.planning.dry_run.parameters import Parameters, count_parameters
from megatron_ext.planning.dry_run.traffic import MUON, Amount, Collective, Traffic
from megatron_ext.training.data_loading import forward_step
from megatron_ext.training.step import RoutingStep

_ROUTING, _STEP_END = "routing", "routing at the step's end"


@dataclass
class SimulatedStep:
    """Memory, collectives and FLOPs of a rank in a step.

    Attributes:
        memory: Bytes that the rank stores.
        collectives: Calls and bytes of every kind of collective.
        flops: FLOPs of matrix products and attention, recomputation included.
        logits: Bytes of the logits of the vocabulary, which are parts of the activations and of the
            temporary tensors.
        optimizer_temporary: Bytes of the temporary tensors of torch's optimizers, when activations
            are freed. Fused optimizers on a GPU have none.
    """

    memory: RankMemory
    collectives: dict[Collective, Amount]
    flops: int
    logits: int = 0
    optimizer_temporary: int = 0


class Rank:
    """Model and optimizer of a rank, to be created inside :func:`fake_rank`.

    Args:
        args: Validated arguments of the run.
        config: Configuration of the model, which is copied.
    """

    def __init__(self, args: Namespace, config: ETConfig) -> None:
        self.args = args
        self.config = copy(config)
        self.step = RoutingStep()
        self.config.finalize_model_grads_func = self.step.finalize_model_grads
        self.model, self.optimizer, self.scheduler = build(args, self.config)
        for chunk in self.model:
            chunk.train()
        self.microbatches = args.global_batch_size // (
            args.micro_batch_size * args.data_parallel_size
        )
        self.weights = [weight for chunk in self.model for weight in chunk.parameters()]
        self.parameters: Parameters = count_parameters(self.model, args)
        self._prepare_schedule()

    def _prepare_schedule(self) -> None:
        """Do what Megatron's `train` does before its first step, and take one optimizer step."""
        self.config.grad_scale_func = self.optimizer.scale_loss
        load = EvenLoad(self.config)
        with load.installed(), Traffic(load.answers()):
            self.optimizer.step()  # the first has more collectives than later ones
        if self.args.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in self.model]
            self.config.no_sync_func = functions if len(functions) > 1 else functions[0]

    def take_step(self, by_threshold: bool) -> SimulatedStep:
        """Return the memory, collectives and FLOPs of a whole step.

        Only a few micro-batches run, enough to know what each further one adds.

        Args:
            by_threshold: Whether routing is by thresholds instead of by expert choice.
        """
        first, stride = self._shortest_step()
        total = self.microbatches
        if total <= first + stride:
            return self._run(total, by_threshold)
        short, longer = (self._run(n, by_threshold) for n in (first, first + stride))
        return _extrapolate(short, longer, first + stride, stride, total)

    def _shortest_step(self) -> tuple[int, int]:
        """Return the micro-batches that fill the pipeline, and the increment of a longer step."""
        stages = self.args.pipeline_model_parallel_size
        if self.args.virtual_pipeline_model_parallel_size is None:
            return stages, 1
        return 2 * stages + self.microbatches % stages, stages

    def _run(self, microbatches: int, by_threshold: bool) -> SimulatedStep:
        """Take a step of some micro-batches, and return its memory, collectives and FLOPs."""
        for router in threshold_routers(routers_of(self.model)):
            prepare_router(router, self.config.et_warmup_iters + 1 if by_threshold else 0)
        load = EvenLoad(self.config, self.microbatches)
        live = LiveTensors(self.args.padded_vocab_size // self.args.tensor_model_parallel_size)
        traffic = Traffic(load.answers(), live)
        saved = SavedTensors(self.weights)
        batches = [RerunDataIterator(_batches(self.args)) for _ in self.model]
        step, passes = self.optimizer.step, (0, 0)

        def optimizer_step() -> Any:
            nonlocal passes
            passes = live.begin_phase()
            return step()

        with (
            load.installed(),
            _separate_purposes(traffic),
            patches.patched(self.optimizer, "step", optimizer_step),
            traffic,
            saved,
        ):
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
        gathered = storage_bytes(get_global_memory_buffer().buffer.values())
        memory = RankMemory(
            parameters=storage_bytes(self.weights),
            gradients=storage_bytes(weight.main_grad for weight in self.weights),
            optimizer=storage_bytes(optimizer_tensors(self.optimizer), apart_from=self.weights),
            activations=saved.peak,
            temporary=max(0, passes[0] - saved.peak - gathered),
            router_logits=load.kept_bytes,
            gather_buffer=gathered,
        )
        logits, of_optimizer = passes[1], live.peak - gathered
        return SimulatedStep(memory, traffic.collectives, traffic.flops, logits, of_optimizer)


def build(args: Namespace, config: ETConfig) -> tuple[Any, Any, Any]:
    """Return the stages, the optimizer and the scheduler of a rank, on the meta device.

    Args:
        args: Validated arguments of the run.
        config: Configuration of the model.
    """
    with torch.device("meta"):
        built: tuple[Any, Any, Any] = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(
                args, language_model_config(args, config)
            ),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return built


def _extrapolate(
    short: SimulatedStep, longer: SimulatedStep, ran: int, stride: int, total: int
) -> SimulatedStep:
    """Extrapolate from two shorter steps to a whole step.

    Activations do not grow once the pipeline is full. The collectives of a search for cutoffs
    vary: those of the forward pass are scaled by the mean, and those of the end of the step
    already cover all micro-batches.

    Args:
        short: Step of `ran - stride` micro-batches.
        longer: Step of `ran` micro-batches.
        ran: Micro-batches of the longer step.
        stride: Difference of the two steps in micro-batches.
        total: Micro-batches of the whole step.
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
    return SimulatedStep(
        memory,
        collectives,
        extend(short.flops, longer.flops),
        longer.logits,
        longer.optimizer_temporary,
    )


def _batches(args: Namespace) -> Iterator[dict[str, Tensor]]:
    """Yield micro-batches of meta tensors, `[batch, sequence]`, indefinitely."""
    ids = torch.empty(args.micro_batch_size, args.seq_length, dtype=torch.int64, device="meta")
    while True:
        yield {"tokens": ids, "labels": ids, "loss_mask": ids.float(), "position_ids": ids}


@contextmanager
def _separate_purposes(traffic: Traffic) -> Iterator[None]:
    """Separate the purposes of collectives over the same groups, for the duration of a block."""
    select = _counted_as(traffic, ThresholdRouter.select, _ROUTING)
    resolve = _counted_as(traffic, RoutingStep.resolve, _STEP_END)
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
        target: _counted_as(traffic, patches.original(target), purpose)
        for target, purpose in purposes.items()
    }


def step_length(microbatches: int) -> dict[str, Callable[[], int]]:
    """Return a replacement for Megatron's number of micro-batches."""
    return {"megatron.training.training.get_num_microbatches": lambda: microbatches}


def backend() -> dict[str, list[str]]:
    """Return the devices of torch's fake process group, extended by the meta device."""
    target = "torch.distributed.Backend.backend_capability.fake"
    return {target: [*patches.original(target), "meta"]}


def _counted_as(traffic: Traffic, function: Callable[..., Any], purpose: str) -> Callable[..., Any]:
    """Return a function whose collectives are counted under a purpose."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with traffic.purpose(purpose):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def fake_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Let this process be one rank of `args.world_size`, for the duration of a block.

    The other ranks do not exist, and collectives with them return at once.

    Args:
        args: Validated arguments of the run.
        rank: Rank that this process simulates.

    Raises:
        UserError: The ranks cannot be laid out as the flags say.
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
