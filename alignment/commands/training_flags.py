"""Flags that every training command has, and the engine that they describe."""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from alignment.engines.protocol import AlignmentEngine, Optimization
from alignment.judges.results import require_usable
from alignment.rl.algorithms import ALGORITHMS
from alignment.rl.critic import Critic, CriticSettings
from alignment.training.run_settings import lasting_settings
from megatron_ext.errors import UserError
from megatron_ext.quiet import quiet_megatron


def add_training_flags(parser: argparse.ArgumentParser, lr: float, batch_size: int) -> None:
    """Add those of commands that train.

    Args:
        lr: default of `--lr`.
        batch_size: default of `--batch-size`.
    """
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", required=True, metavar="DIR",
        help="of this run, which goes on from what is there: checkpoints/, best/ (a Hugging Face "
        "folder), metrics.jsonl, tensorboard/, run.json")
    add("--seed", type=int, default=0)
    add("--save-interval", type=int, default=50, metavar="STEPS", help="(%(default)s)")
    add("--eval-interval", type=int, default=50, metavar="STEPS", help="(%(default)s)")
    add("--dry-run", metavar="RANKS", type=int, nargs="?",
        const=int(os.environ.get("WORLD_SIZE", "1")),
        help="train nothing: print parameters, memory of a rank and collectives of a step for a "
        "world of RANKS, and end; of --model only config.json is read, data are not looked at")
    add = parser.add_argument_group("optimization").add_argument
    add("--lr", type=float, default=lr, help="falls linearly to 0 (%(default)s)")
    add("--lr-warmup-fraction", type=float, default=0.03, metavar="SHARE", help="(%(default)s)")
    add("--batch-size", type=int, default=batch_size, metavar="SAMPLES",
        help="of a step, on all ranks (%(default)s)")
    add("--seq-length", type=int, default=4096, metavar="TOKENS",
        help="of a row, into which samples are packed (%(default)s)")
    add("--max-left-out", type=float, default=0.2, metavar="SHARE",
        help="Share of the data that may be left out, as too long say; more end the command with "
        "status 3. Default: %(default)s.")
    add("--weight-decay", type=float, default=0.0)
    add("--clip-grad", type=float, default=1.0)
    add("--adam-beta1", type=float, default=0.9)
    add("--adam-beta2", type=float, default=0.999)
    add("--use-distributed-optimizer", action="store_true")
    add("--offload-optimizer", action="store_true", help="DeepSpeed: to host memory")
    # fmt: on


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add those of commands that hold a model on their ranks."""
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--recipe", metavar="FILE.yaml",
        help="flags from a YAML mapping; flags that follow override it; may be repeated")
    add("--model", required=True, metavar="DIR",
        help="a Hugging Face folder, a run directory, or a checkpoint")
    add("--chat-template", metavar="FILE", help="Jinja, for a tokenizer that has none, or instead")
    add("--chat-template-kwargs", default="{}", metavar="JSON",
        help="variables of the chat template, such as {\"enable_thinking\": false}")
    add = parser.add_argument_group("engine").add_argument
    add("--engine", choices=["megatron", "deepspeed"], default="megatron", help="(%(default)s)")
    add("--micro-batch-size", type=int, default=1, metavar="ROWS", help="(%(default)s)")
    add("--dtype", choices=["fp32", "bf16"],
        help="of the weights (fp32 on a CPU, else the model's, bf16 for fp16 in training)")
    add("--tensor-model-parallel-size", type=int, default=1)
    add("--pipeline-model-parallel-size", type=int, default=1)
    add("--context-parallel-size", type=int, default=1)
    add("--expert-model-parallel-size", type=int, default=1)
    add("--expert-tensor-parallel-size", type=int)
    add("--megatron-flags", default="", metavar="'FLAGS'",
        help="more flags of pretrain_et.py, such as '--recompute-granularity full'")
    add("--zero-stage", type=int, default=2, choices=[1, 2, 3], help="of DeepSpeed (%(default)s)")
    add("--offload-parameters", action="store_true", help="DeepSpeed: to host memory; stage 3")
    # fmt: on


def add_reinforcement_flags(parser: argparse.ArgumentParser) -> None:
    """Add how rewards are learned from, and who draws the responses."""
    # fmt: off
    add = parser.add_argument_group("reinforcement").add_argument
    add("--algorithm", choices=ALGORITHMS, default="grpo")
    add("--group-size", type=int, default=8, metavar="N", help="responses a prompt (%(default)s)")
    add("--mini-batches", type=int, default=4, metavar="N",
        help="optimizer steps on the --batch-size responses of a step (%(default)s)")
    add("--critic", metavar="DIR", help="of ppo: what its critic starts from (--model)")
    add("--critic-lr", type=float, metavar="LR", help="falls as --lr does (10 times --lr)")
    add("--critic-warmup", type=int, default=0, metavar="STEPS",
        help="in which the critic alone is trained (%(default)s)")
    add("--value-clip", type=float, metavar="RANGE",
        help="bound the change of a value in a step (none)")
    add("--gae-lambda", type=float, default=0.95, help="(%(default)s)")
    add("--gae-discount", type=float, default=1.0, help="(%(default)s)")
    add("--no-whitening", dest="whitening", action="store_false",
        help="leave the advantages of ppo as they are")
    add("--rollout-url", nargs="+", default=[], metavar="URL",
        help="http://HOST:PORT/v1 of vLLM servers that were started on RUN/served (the engine "
        "itself draws)")
    add("--rollouts-ahead", type=int, choices=[0, 1], default=0,
        help="1: servers draw the next step's responses while this step is judged and trained on, "
        "with the weights from before it (%(default)s)")
    add("--rollout-bound", type=float, metavar="RATIO",
        help="bound the weights of training over sampling probability (none; 2 for responses drawn "
        "ahead)")
    add("--rollout-rule", choices=["truncate", "mask"], default="truncate",
        help="weights beyond the bound are cut to it, or their tokens left out (%(default)s)")
    add("--rollout-model", default="policy", metavar="NAME", help="they serve (%(default)s)")
    # fmt: on


def check_room(options: argparse.Namespace, prompts: Sequence[Sequence[int]], what: str) -> None:
    """Check that enough prompts leave room for a response.

    Args:
        prompts: token ids.
        what: the prompts, with the flag that they are from.

    Raises:
        TooFewResults: more than --max-left-out do not.
    """
    room = options.seq_length - options.max_new_tokens
    reason = f"no room for {options.max_new_tokens} tokens in --seq-length {options.seq_length}"
    long = [reason for prompt in prompts if len(prompt) > room]
    if len(long) < len(prompts):  # the trainer has a sentence for none
        require_usable(long, len(prompts), options.max_left_out, what)


def groups_of(options: argparse.Namespace) -> int:
    """Prompts of a step.

    Raises:
        UserError: its responses are not whole groups.
    """
    if options.group_size < 2 and ALGORITHMS[options.algorithm].advantages is not None:
        raise UserError(f"--group-size {options.group_size} must be at least 2, to compare")
    if options.batch_size % options.group_size:
        raise UserError(
            f"--batch-size {options.batch_size} must be a multiple of --group-size "
            f"{options.group_size}: it counts responses"
        )
    return options.batch_size // options.group_size


def updates_of(options: argparse.Namespace) -> int:
    """Optimizer steps of the model in all of `--steps`.

    Raises:
        UserError: the critic's warm-up leaves none.
    """
    if not 0 <= options.critic_warmup < options.steps:
        raise UserError(
            f"--critic-warmup {options.critic_warmup} must be at least 0 and below --steps "
            f"{options.steps}"
        )
    return (options.steps - options.critic_warmup) * options.mini_batches


def critic_of(options: argparse.Namespace, seen: AbstractSet[int]) -> Critic | None:
    """The critic, of an algorithm that has one.

    Args:
        seen: tokens of the prompts, and the end.

    Raises:
        UserError: its model does not fit.
    """
    if ALGORITHMS[options.algorithm].advantages is not None:
        return None
    model = options.critic or options.model
    # As verl does: values of a new head must come along faster than the policy moves.
    lr = 10 * options.lr if options.critic_lr is None else options.critic_lr
    own = argparse.Namespace(**{**vars(options), "model": model, "lr": lr})
    engine = engine_of(own, options.steps * options.mini_batches)
    return Critic(engine, seen, _valuation(options), f"--critic {model}")


def _valuation(options: argparse.Namespace) -> CriticSettings:
    return CriticSettings(
        options.gae_discount,
        options.gae_lambda,
        options.whitening,
        options.value_clip,
        options.critic_warmup,
    )


def _check_reinforcement(options: argparse.Namespace) -> None:
    algorithm = ALGORITHMS[options.algorithm]
    if algorithm.advantages is not None:
        for name in ("critic", "critic_lr", "critic_warmup", "value_clip"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is for --algorithm ppo")
    _valuation(options)
    if options.temperature <= 0:
        raise UserError(
            f"--temperature {options.temperature} must be above 0: equal responses teach nothing"
        )
    if options.rollout_url:
        from alignment.rl.served_log_probs import refuse_truncation

        refuse_truncation(getattr(options, "top_k", 0), getattr(options, "top_p", 1.0))
    if options.rollouts_ahead and not options.rollout_url:
        raise UserError("--rollouts-ahead is for servers: give --rollout-url")
    if options.rollouts_ahead and algorithm.dynamic:
        raise UserError(
            f"--algorithm {options.algorithm} may draw more than once a step, which "
            "--rollouts-ahead 1 cannot know before: leave one of them out"
        )


def rollout_weights(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the loss, for responses whose sampler was not quite the policy."""
    bound = options.rollout_bound
    if bound is None and options.rollouts_ahead:
        bound = 2.0
    return {"rollout_bound": bound, "rollout_rule": options.rollout_rule}


def rollouts_of(
    options: argparse.Namespace,
    engine: AlignmentEngine,
    ends: frozenset[int],
    check: Callable[[], None],
) -> dict[str, Any]:
    """What draws responses, now and ahead, for `RLComponents`; nothing for the engine.

    Args:
        ends: the end tokens of the policy.
        check: called on all ranks now and then while they wait for servers; may raise.
    """
    if not options.rollout_url:
        return {}
    from alignment.rl.async_rollouts import AsyncRollouts
    from alignment.rl.vllm_rollouts import VLLMRollouts

    folder = Path(options.run_dir) / "served"
    served = VLLMRollouts(
        engine, options.rollout_url, options.rollout_model, folder, ends, check=check
    )
    ahead = AsyncRollouts(served, options.steps) if options.rollouts_ahead else None
    return {"generate": served.generate, "async_rollouts": ahead}


def check(options: argparse.Namespace) -> None:
    """Look at the numbers before anything is loaded.

    Raises:
        UserError: naming the flag.
    """
    for name in ("save_interval", "eval_interval", "batch_size", "seq_length", "micro_batch_size"):
        if getattr(options, name, 1) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)} must be at least 1")
    if not 0 <= getattr(options, "lr_warmup_fraction", 0) < 1:
        raise UserError(f"--lr-warmup-fraction {options.lr_warmup_fraction} must be in [0, 1)")
    if getattr(options, "lr", 1) <= 0:
        raise UserError(f"--lr {options.lr} must be above 0")
    if not Path(options.model).is_dir():
        raise UserError(f"--model {options.model} is not a folder")
    if hasattr(options, "algorithm"):
        _check_reinforcement(options)
    zero = [n for n in ("offload_optimizer", "offload_parameters") if getattr(options, n, False)]
    if options.engine == "megatron" and zero:
        raise UserError(f"--{zero[0].replace('_', '-')} is for --engine deepspeed")
    if options.engine == "deepspeed":
        sizes = [name for name in vars(options) if name.endswith("_parallel_size")]
        if wrong := [name for name in sizes if (getattr(options, name) or 1) > 1]:
            raise UserError(f"--{wrong[0].replace('_', '-')} is for --engine megatron")


def lasting(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a run must have again when it is resumed; see `run_settings`."""
    return lasting_settings(options)


def template_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """Variables of the chat template.

    Raises:
        UserError: they are no JSON object.
    """
    try:
        values = json.loads(options.chat_template_kwargs)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"--chat-template-kwargs {options.chat_template_kwargs} is no JSON object such as "
            '{"enable_thinking": false}'
        )
    return values


def engine_of(options: argparse.Namespace, steps: int) -> AlignmentEngine:
    """Start the engine on this rank and load `--model`.

    Args:
        steps: optimizer steps, over which the learning rate falls; 0 to train none.

    Raises:
        UserError: see the engines.
    """
    import torch

    dtype: Any = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[options.dtype]
    optimization = None
    if steps:
        optimization = Optimization(
            lr=options.lr,
            steps=steps,
            warmup=min(round(options.lr_warmup_fraction * steps), steps - 1),
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.weight_decay,
            clip=options.clip_grad,
        )
    if options.engine == "deepspeed":
        from alignment.engines.deepspeed import DeepSpeedEngine, ZeroSettings

        zero = ZeroSettings(
            options.zero_stage,
            getattr(options, "offload_optimizer", False),
            options.offload_parameters,
            options.micro_batch_size,
        )
        return DeepSpeedEngine(options.model, optimization, zero, dtype=dtype)
    with quiet_megatron():
        from alignment.engines.megatron import MegatronEngine

    flags = shlex.split(options.megatron_flags)
    return MegatronEngine(options.model, optimization, layout_of(options), dtype=dtype, flags=flags)


def layout_of(options: argparse.Namespace) -> Any:
    """Of the ranks, for Megatron."""
    from alignment.engines.megatron_launch import MegatronLayout

    return MegatronLayout(
        tensor=options.tensor_model_parallel_size,
        pipeline=options.pipeline_model_parallel_size,
        context=options.context_parallel_size,
        expert=options.expert_model_parallel_size,
        expert_tensor=options.expert_tensor_parallel_size,
        shard_optimizer=getattr(options, "use_distributed_optimizer", False),
        micro_batch=options.micro_batch_size,
    )
