"""Dry run: parameters, memory, FLOPs and collectives of a run on any number of ranks."""

import contextlib
import io
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron.training.training import destroy_global_state

from megatron_ext.config import ETConfig
from megatron_ext.errors import LimitExceeded
from megatron_ext.flops import training_flops
from megatron_ext.planning.devices import Device
from megatron_ext.planning.dry_run.device_fit import (
    advice,
    demand,
    fits,
    measure_changes,
    table_of,
    verdict,
)
from megatron_ext.planning.dry_run.dry_run_report import print_report
from megatron_ext.planning.dry_run.fakes import expert_rate
from megatron_ext.planning.dry_run.parameters import Parameters
from megatron_ext.planning.dry_run.saving import saving_bytes
from megatron_ext.planning.dry_run.simulated_rank import Rank, SimulatedStep, fake_rank
from megatron_ext.training.input_checks import check_pools

Facts = dict[str, Any]


def dry_run(
    args: Namespace,
    config: ETConfig,
    device: Device,
    rebuild: Callable[[Sequence[str]], tuple[Namespace, ETConfig]],
    more_facts: Callable[[Namespace, Facts, Sequence[str]], Facts] = lambda args, facts, flags: {},
    spell: Callable[[Sequence[str]], str] = " ".join,
) -> None:
    """Print parameters, memory, FLOPs and collectives, and the same as JSON on the last line.

    The memory is compared with that of a device. If it does not fit a card, changes of the layout
    are measured in the same way, and the one that helps most is named.

    Args:
        args: Validated arguments of the run.
        config: Configuration of the model.
        device: Device of a rank.
        rebuild: Function that parses the flags of the run with further ones after them.
        more_facts: Function that derives further facts from the arguments, the measured facts and
        the
            further flags. Its key `together` is printed as a table.
        spell: Function that returns how the user writes further flags.

    Raises:
        UserError: The layout or the routing pools cannot work.
        LimitExceeded: A rank does not fit the device, and the user named it. The report is printed.
    """
    if config.uses_thresholds:
        check_pools(args, config)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    def measure_with(flags: Sequence[str]) -> Facts:
        with contextlib.redirect_stdout(io.StringIO()):
            built = args, config
            if flags:
                destroy_global_state()
                built = rebuild(flags)
            facts = measure(*built)
            return facts | more_facts(built[0], facts, flags)

    facts = measure_with([])
    needed = demand(facts, device)
    total = needed.total + device.reserve_next_to(needed.total)
    sentences, fit = [verdict(needed, device)], fits(needed, device)
    if not fit and not (device.named or device.is_card):
        sentences.append("--device compares with the card of the run, and finds what would help.")
    elif not fit:
        sentences.append(advice(measure_changes(args, device, measure_with, spell), total, device))
    facts["device"] = {
        "name": device.name,
        "bytes": device.size,
        "reserve": device.reserve_next_to(needed.total),
        "needed": total,
        "logits": needed.logits,
        "parts": needed.parts,
        "fits": fit,
    }
    lines = [f"{sentence[0].upper()}{sentence[1:].rstrip('.')}." for sentence in sentences]
    print_report(facts, table_of(needed, device, len(facts["stages"])), lines)
    if device.named and not fit:
        raise LimitExceeded(f"--device: the layout {'. '.join(sentences)}")


def measure(args: Namespace, config: ETConfig) -> dict[str, Any]:
    """Return everything that `--dry-run` prints, by its JSON keys."""
    stages, parameters, flops = [], [], 0
    ranks_of_a_stage = args.world_size // args.pipeline_model_parallel_size
    for stage, rank in enumerate(stage_ranks(args)):
        with fake_rank(args, rank):
            simulated_rank = Rank(args, config)
            parameters.append(simulated_rank.parameters)
            steps = {
                phase: simulated_rank.take_step(phase == "thresholds") for phase in _phases(config)
            }
        last = list(steps.values())[-1]
        flops += last.flops * ranks_of_a_stage
        stages.append(
            {
                "stage": stage,
                "rank": rank,
                "parameters": sum(weight.numel() for weight in simulated_rank.weights),
                "memory": asdict(last.memory),
                "logits": last.logits,
                "optimizer_temporary": last.optimizer_temporary,
                "collectives": {phase: _rows(step) for phase, step in steps.items()},
            }
        )
    all_parameters = Parameters.of_model(parameters)
    rate = expert_rate(config)
    tokens = args.global_batch_size * args.seq_length
    return {
        "world_size": args.world_size,
        "layout": _layout(args),
        "tokens_per_step": tokens,
        "micro_batches": simulated_rank.microbatches,
        "fused_optimizer": args.optimizer == "adam",
        "parameters": {
            **asdict(all_parameters),
            "total": all_parameters.total,
            "active": all_parameters.active(rate),
        },
        "flops_per_token": {
            "megatron": training_flops(args, 1) / args.seq_length,
            "executed": flops / tokens,
        },
        "stages": stages,
        "saving": saving_bytes(args, stages),
    }


def parameters_per_stage(args: Namespace, config: ETConfig) -> list[int]:
    """Return the number of parameters that a rank of each pipeline stage stores."""
    counts = []
    for rank in stage_ranks(args):
        with fake_rank(args, rank):
            counts.append(sum(weight.numel() for weight in Rank(args, config).weights))
    return counts


def stage_ranks(args: Namespace) -> list[int]:
    """Return the first rank of each pipeline stage."""
    stages = args.pipeline_model_parallel_size
    stride = args.world_size // stages
    if args.use_tp_pp_dp_mapping:
        stride = args.tensor_model_parallel_size * args.context_parallel_size
    return [stage * stride for stage in range(stages)]


def _phases(config: ETConfig) -> list[str]:
    """Return the ways in which a run routes tokens, in their order in time."""
    if not config.uses_thresholds:
        return [config.router_type.replace("-", " ") if config.num_moe_experts else "dense"]
    if not config.router.trains_by_threshold:
        return ["expert choice"]
    return ["expert choice", "thresholds"] if config.et_warmup_iters else ["thresholds"]


def _rows(step: SimulatedStep) -> list[dict[str, Any]]:
    """Return the collectives of a step as rows for the JSON object."""
    return [
        {**collective._asdict(), **amount._asdict()}
        for collective, amount in sorted(step.collectives.items())
    ]


def _layout(args: Namespace) -> dict[str, int]:
    """Return the parallel sizes by their JSON keys."""
    return {
        "tensor": args.tensor_model_parallel_size,
        "context": args.context_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "data": args.data_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
    }
