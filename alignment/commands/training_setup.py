"""Engines, critics and sources of rollouts, made from the configuration of a command."""

import shlex
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch

from alignment.commands.config_groups import (
    CriticConfig,
    EngineConfig,
    OptimizationConfig,
    ReinforcementTrainingConfig,
    TrainingConfig,
)
from alignment.engines.megatron_launch import MegatronLayout
from alignment.engines.protocol import AlignmentEngine, Optimization
from alignment.function_paths import load_function
from alignment.judges.results import require_usable
from alignment.rl.algorithms import Algorithm, algorithm_by_name
from alignment.rl.critic import Critic, CriticSettings
from alignment.rl.tasks import RolloutFilter
from megatron_ext.errors import UserError
from megatron_ext.model_location import announce_model
from megatron_ext.quiet import quiet_megatron, quiet_warnings


def start_engine(
    model: str,
    config: EngineConfig,
    optimization: OptimizationConfig | None = None,
    steps: int = 0,
    lr: float | None = None,
) -> AlignmentEngine:
    """Start the engine on this rank and load a model.

    Args:
        model: Folder of the model.
        config: Flags of the engine.
        optimization: Flags of the optimizer; none if the model is not trained.
        steps: Optimizer steps, over which the learning rate decays.
        lr: Peak learning rate. Default: that of `optimization`.

    Raises:
        UserError: The model or the layout cannot be used; see the engines.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[config.dtype]
    announce_model(model, "--model")
    schedule = None
    if optimization is not None:
        schedule = Optimization(
            lr=optimization.lr if lr is None else lr,
            steps=steps,
            warmup=min(round(optimization.lr_warmup_fraction * steps), steps - 1),
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            weight_decay=optimization.weight_decay,
            clip=optimization.clip_grad,
            schedule=_load_optional(optimization.lr_schedule, "--lr-schedule"),
        )
    if config.engine == "deepspeed":
        with quiet_warnings():  # DeepSpeed names its accelerator
            from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

        zero = ZeroSettings(
            config.zero_stage,
            optimization is not None and optimization.offload_optimizer,
            config.offload_parameters,
            config.micro_batch_size,
        )
        return DeepSpeedEngine(model, schedule, zero, dtype=dtype)
    with quiet_megatron():
        from alignment.engines.megatron import MegatronEngine

    layout = megatron_layout(
        config, optimization is not None and optimization.use_distributed_optimizer
    )
    flags = shlex.split(config.megatron_flags)
    return MegatronEngine(model, schedule, layout, dtype=dtype, flags=flags)


def megatron_layout(config: EngineConfig, shard_optimizer: bool = False) -> MegatronLayout:
    """Return the parallel layout of the ranks for Megatron."""
    return MegatronLayout(
        tensor=config.tensor_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        context=config.context_parallel_size,
        expert=config.expert_model_parallel_size,
        expert_tensor=config.expert_tensor_parallel_size,
        shard_optimizer=shard_optimizer,
        micro_batch=config.micro_batch_size,
    )


def check_room(
    config: TrainingConfig, max_new_tokens: int, prompts: Sequence[Sequence[int]], what: str
) -> None:
    """Check that enough prompts leave room for a response.

    Args:
        config: Flags of the command.
        max_new_tokens: Longest response in tokens.
        prompts: Token ids of the prompts.
        what: Name of the prompts, with the flag that they are from.

    Raises:
        TooFewResults: More than --max-left-out leave no room.
    """
    length = config.batch.seq_length
    reason = f"no room for {max_new_tokens} tokens in --seq-length {length}"
    long = [reason for prompt in prompts if len(prompt) > length - max_new_tokens]
    if len(long) < len(prompts):  # the trainer has its own error if no prompt is left
        require_usable(long, len(prompts), config.batch.max_left_out, what)


def count_updates(config: ReinforcementTrainingConfig, steps: int) -> int:
    """Return the optimizer steps of the model in all steps of the training.

    Raises:
        UserError: The critic's warm-up leaves none.
    """
    warmup = config.critic.critic_warmup
    if not 0 <= warmup < steps:
        raise UserError(f"--critic-warmup {warmup} must be at least 0 and below --steps {steps}.")
    return (steps - warmup) * config.reinforcement.mini_batches


def start_critic(
    config: ReinforcementTrainingConfig, steps: int, used_tokens: AbstractSet[int]
) -> Critic | None:
    """Return the critic; none if the algorithm has none.

    Args:
        config: Flags of the command.
        steps: Steps of the training.
        used_tokens: Tokens of the prompts and end tokens.

    Raises:
        UserError: The critic's model does not fit.
    """
    if algorithm_by_name(config.reinforcement.algorithm).advantages is not None:
        return None
    model = config.critic.critic or config.model.model
    lr = config.critic.critic_lr
    if lr is None:  # as in verl: values of a new head must be learned faster than the policy moves
        lr = 10 * config.optimization.lr
    updates = steps * config.reinforcement.mini_batches
    engine = start_engine(model, config.engine, config.optimization, updates, lr)
    return Critic(engine, used_tokens, _critic_settings(config.critic), f"--critic {model}")


def _critic_settings(config: CriticConfig) -> CriticSettings:
    return CriticSettings(
        config.gae_discount,
        config.gae_lambda,
        config.whitening,
        config.value_clip,
        config.critic_warmup,
    )


def check_algorithm(
    config: ReinforcementTrainingConfig, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> None:
    """Check the flags that depend on the algorithm.

    Args:
        config: Flags of the command.
        temperature: Temperature that responses are sampled at.
        top_k: Number of likeliest tokens that responses are sampled from; 0 for all.
        top_p: Probability of the likeliest tokens that responses are sampled from.

    Raises:
        UserError: A flag does not fit the algorithm.
    """
    name = config.reinforcement.algorithm
    algorithm = algorithm_by_name(name)
    if algorithm.advantages is not None:
        for flag in ("critic", "critic_lr", "critic_warmup", "value_clip"):
            if getattr(config.critic, flag):
                option = f"--{flag.replace('_', '-')}"
                raise UserError(f"{option} requires --algorithm ppo. Set it, or remove this flag.")
        if config.reinforcement.group_size < 2:
            raise UserError(
                f"--group-size {config.reinforcement.group_size} must be at least 2: --algorithm "
                f"{name} compares the responses to a prompt with each other."
            )
    _critic_settings(config.critic)
    if config.rollouts.rollout_url:
        from alignment.rl.served_log_probs import refuse_sampling

        refuse_sampling(temperature, top_k, top_p)
    if config.rollouts.rollouts_ahead and algorithm.dynamic:
        raise UserError(
            f"--algorithm {name} may sample several times per step, which asynchronous rollouts "
            "cannot know in advance. Remove --rollouts-ahead 1 or choose another algorithm."
        )


def select_algorithm(config: ReinforcementTrainingConfig, **settings: Any) -> Algorithm:
    """Return the algorithm with its loss.

    Args:
        config: Flags of the command.
        **settings: Further settings of the loss.

    Raises:
        UserError: There is no such algorithm, or no loss at the function path.
    """
    rollouts = config.rollouts
    bound = rollouts.rollout_bound
    if bound is None and rollouts.rollouts_ahead:
        bound = 2.0  # the responses are those of the policy one step before
    return algorithm_by_name(
        config.reinforcement.algorithm,
        config.reinforcement.loss,
        rollout_bound=bound,
        rollout_rule=rollouts.rollout_rule,
        **settings,
    )


def load_rollout_filter(config: ReinforcementTrainingConfig) -> RolloutFilter | None:
    """Return the filter of the responses of each group, if there is one.

    Raises:
        UserError: There is no function at the path.
    """
    return _load_optional(config.reinforcement.rollout_filter, "--rollout-filter")


def transform_records[Record](records: Sequence[Record], path: str | None) -> list[Record]:
    """Return the records of an input after the function of --data-transform.

    Args:
        records: Records as they were read.
        path: Function path; the function returns a record, or None to leave it out.

    Raises:
        UserError: There is no function at the path.
    """
    transform = _load_optional(path, "--data-transform")
    if transform is None:
        return list(records)
    return [new for record in records if (new := transform(record)) is not None]


def _load_optional(path: str | None, flag: str) -> Callable[..., Any] | None:
    return None if path is None else load_function(path, flag)


def rollout_sources(
    config: ReinforcementTrainingConfig,
    steps: int,
    engine: AlignmentEngine,
    end_tokens: frozenset[int],
    check: Callable[[], None],
) -> dict[str, Any]:
    """Return what samples responses in place of the engine, as arguments of `RLComponents`.

    Args:
        config: Flags of the command.
        steps: Steps of the training.
        engine: Engine of the policy.
        end_tokens: End tokens of the policy.
        check: Called on all ranks now and then while they wait for servers; may raise.
    """
    rollouts = config.rollouts
    if not rollouts.rollout_url:
        return {}
    from alignment.rl.async_rollouts import AsyncRollouts
    from alignment.rl.vllm_rollouts import VLLMRollouts

    folder, transfer = Path(config.run.run_dir) / "served", None
    if rollouts.weight_transfer != "folder":
        from alignment.rl.stream_transfer import StreamTransfer

        transfer = StreamTransfer(engine, rollouts.weight_transfer)
    served = VLLMRollouts(
        engine, rollouts.rollout_url, rollouts.rollout_model, folder, end_tokens, check=check,
        transfer=transfer, context=config.batch.seq_length,
    )  # fmt: skip
    ahead = AsyncRollouts(served, steps) if rollouts.rollouts_ahead else None
    return {"generate": served.generate, "async_rollouts": ahead}
