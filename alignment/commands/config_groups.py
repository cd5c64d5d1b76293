"""Groups of flags that several commands share.

A training that is resumed must have the same value of every flag marked `must_match`; flags marked
`may_change` say where and how fast it runs, and what it reports.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ext.errors import UserError
from megatron_ext.trackers import TrackerSettings
from megatron_ext.typed_flags import flag, group, may_change, must_match

Thinking = Literal["none", "asked", "opened"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model."""

    recipe: str | None = may_change(None, metavar="FILE.yaml")
    """YAML file that maps names of flags to values. Flags of the command line replace its values.
    Can be repeated. Default: none."""
    model: str = must_match(metavar="DIR")
    """Folder of the model: a Hugging Face folder, a run directory or a checkpoint."""
    chat_template: str | None = must_match(None, metavar="FILE")
    """Jinja file of the chat template. Default: the tokenizer's own."""
    chat_template_kwargs: str = must_match("{}", metavar="JSON")
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false}."""

    def __post_init__(self) -> None:
        if not Path(self.model).is_dir():
            raise UserError(f"--model {self.model} is not a folder.")

    @property
    def model_folder(self) -> Path:
        """Folder of the model."""
        return Path(self.model)

    @property
    def chat_template_file(self) -> Path | None:
        """File of the chat template that replaces the tokenizer's."""
        return Path(self.chat_template) if self.chat_template else None

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template.

        Raises:
            UserError: They are not a JSON object.
        """
        try:
            values = json.loads(self.chat_template_kwargs)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise UserError(
                f"--chat-template-kwargs {self.chat_template_kwargs} is not a JSON object such as "
                '{"enable_thinking": false}.'
            )
        return values


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Engine."""

    engine: Literal["megatron", "deepspeed"] = must_match("megatron")
    """Library that runs the model on the ranks."""
    micro_batch_size: int = may_change(1, metavar="ROWS", at_least=1)
    """Number of rows of tokens that a rank processes at a time."""
    dtype: Literal["fp32", "bf16"] | None = may_change(None)
    """Data type of the weights. Default: fp32 on a CPU. On a GPU: that of the model, or bf16 if a
    model in fp16 is trained."""
    tensor_model_parallel_size: int = may_change(1, metavar="RANKS", at_least=1)
    """Number of ranks over which each layer is split (Megatron)."""
    pipeline_model_parallel_size: int = may_change(1, metavar="RANKS", at_least=1)
    """Number of pipeline stages, on one rank each, into which the layers are divided (Megatron)."""
    context_parallel_size: int = may_change(1, metavar="RANKS", at_least=1)
    """Number of ranks over which each sequence is split (Megatron)."""
    expert_model_parallel_size: int = may_change(1, metavar="RANKS", at_least=1)
    """Number of ranks over which experts are distributed (Megatron)."""
    expert_tensor_parallel_size: int | None = may_change(None, metavar="RANKS", at_least=1)
    """Number of ranks over which each expert is split (Megatron). Default: as for other layers."""
    megatron_flags: str = may_change("", metavar="'FLAGS'")
    """Further flags of pretrain_et.py, such as '--recompute-granularity full' (Megatron)."""
    zero_stage: Literal[1, 2, 3] = may_change(2)
    """ZeRO stage: how much of the training state is divided among the ranks (DeepSpeed)."""
    offload_parameters: bool = may_change(False)
    """Keep the parameters in host memory; requires --zero-stage 3 (DeepSpeed)."""

    def __post_init__(self) -> None:
        if self.engine == "megatron" and self.offload_parameters:
            raise UserError(
                "--offload-parameters requires --engine deepspeed. Set it, or remove this flag."
            )
        if self.engine == "deepspeed":
            for name, value in vars(self).items():
                if name.endswith("_parallel_size") and (value or 1) > 1:
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(
                        f"{option} {value} requires --engine megatron. Set it, or remove this flag."
                    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run."""

    run_dir: str = may_change(metavar="DIR")
    """Folder of the run: checkpoints/, best/ (a Hugging Face folder), metrics.jsonl, tensorboard/,
    train.log and run.json. If the folder already contains a run, the run is resumed."""
    seed: int = must_match(0, at_least=0, below=2**32)
    """Seed of the order of the data and of sampling."""
    save_interval: int = may_change(50, metavar="STEPS", at_least=1)
    """Number of steps between two checkpoints."""
    eval_interval: int = must_match(50, metavar="STEPS", at_least=1)
    """Number of steps between two evaluations."""
    log_interval: int | None = may_change(None, metavar="STEPS", at_least=1)
    """Number of steps between two lines on the console; every step is in metrics.jsonl. Default: 10
    for supervised training, 1 for training on rewards."""
    wandb_project: str | None = may_change(None, metavar="NAME")
    """Project of Weights & Biases to which the metrics are sent, next to TensorBoard. Default: do
    not use it. WANDB_MODE=offline in the environment keeps everything in the folder of the run."""
    wandb_exp_name: str | None = may_change(None, metavar="NAME")
    """Name of the run in Weights & Biases. Default: the name of the run's folder."""
    mlflow_experiment: str | None = may_change(None, metavar="NAME")
    """Experiment of MLflow to which the metrics are sent. Default: do not use MLflow."""
    mlflow_tracking_uri: str | None = may_change(None, metavar="URI")
    """Address of MLflow's server, or folder of its files. Default: the environment variable
    MLFLOW_TRACKING_URI, or mlflow/ in the folder of the run."""
    dry_run: int | None = may_change(
        None,
        metavar="RANKS",
        value_if_bare=lambda: int(os.environ.get("WORLD_SIZE", "1")),
        at_least=1,
    )
    """Print the parameters, the memory of a rank and the collectives of a step for a world of this
    many ranks, and end. Only the model's config.json is read, no data. Without a number: the
    present world. Default: train."""
    device: str | None = may_change(None, metavar="CARD")
    """Device whose memory --dry-run compares with what a rank needs: a card such as h100-80gb, or a
    number of GiB. The exit status is 4 if the layout does not fit it. Default: the GPU of this
    machine, or its memory divided by its ranks."""

    def __post_init__(self) -> None:
        if self.device is not None and self.dry_run is None:
            raise UserError("--device requires --dry-run. Add it, or leave --device out.")
        if self.dry_run is None:
            self.trackers.check()

    @property
    def trackers(self) -> TrackerSettings:
        """Experiment trackers of the run."""
        return TrackerSettings(
            run_dir=Path(self.run_dir),
            tensorboard_dir=Path(self.run_dir, "tensorboard"),
            wandb_project=self.wandb_project,
            wandb_name=self.wandb_exp_name,
            mlflow_experiment=self.mlflow_experiment,
            mlflow_uri=self.mlflow_tracking_uri,
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Batches."""

    batch_size: int = must_match(128, metavar="SAMPLES", at_least=1)
    """Number of samples in a step, over all ranks."""
    seq_length: int = must_match(4096, metavar="TOKENS", at_least=1)
    """Length in tokens of the rows into which samples are packed, and of the longest sample."""
    max_left_out: float = may_change(0.2, metavar="SHARE", at_least=0, at_most=1)
    """Share of the data that may be left out, for example because it is too long, from 0 to 1. The
    command ends with status 3 if more is left out."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization."""

    lr: float = must_match(1e-5, above=0)
    """Peak learning rate, from which the rate falls linearly to 0."""
    lr_warmup_fraction: float = must_match(0.03, metavar="SHARE", at_least=0, below=1)
    """Share of the optimizer steps in which the learning rate rises, from 0 to 1."""
    lr_schedule: str | None = must_match(None, metavar="PATH")
    """Function path, FILE.py:NAME or MODULE:NAME, of a function that returns the learning rate of
    each optimizer step. Default: linear warm-up and linear decay to 0."""
    weight_decay: float = must_match(0.0, at_least=0)
    """Weight decay of AdamW, which is multiplied by the learning rate in each step."""
    clip_grad: float = must_match(1.0, at_least=0)
    """Norm to which larger gradients are scaled down; 0 for no clipping."""
    adam_beta1: float = must_match(0.9, at_least=0, below=1)
    """Decay per step of Adam's moving average of gradients."""
    adam_beta2: float = must_match(0.999, at_least=0, below=1)
    """Decay per step of Adam's moving average of squared gradients."""
    use_distributed_optimizer: bool = may_change(False)
    """Divide the optimizer's state among data-parallel ranks (Megatron)."""
    offload_optimizer: bool = may_change(False)
    """Keep the optimizer's state in host memory (DeepSpeed)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags of every command that trains a model."""

    model: ModelConfig = group()
    engine: EngineConfig = group()
    run: RunConfig = group()
    batch: BatchConfig = group()
    optimization: OptimizationConfig = group()

    def __post_init__(self) -> None:
        if self.engine.engine == "megatron" and self.optimization.offload_optimizer:
            raise UserError(
                "--offload-optimizer requires --engine deepspeed. Set it, or remove this flag."
            )


@dataclass(frozen=True, kw_only=True)
class ReinforcementConfig:
    """Reinforcement learning."""

    algorithm: str = must_match("grpo", metavar="NAME")
    """Algorithm, which defines the advantages and the loss: grpo, dr-grpo, dapo, gspo, rloo or
    ppo."""
    group_size: int = must_match(8, metavar="N", at_least=1)
    """Number of responses to each prompt of a step, which are compared with each other."""
    mini_batches: int = must_match(4, metavar="N", at_least=1)
    """Number of optimizer steps on the --batch-size responses of a step."""
    loss: str | None = must_match(None, metavar="PATH")
    """Function path, FILE.py:NAME or MODULE:NAME, of a loss that replaces the algorithm's. Default:
    the algorithm's loss."""
    rollout_filter: str | None = must_match(None, metavar="PATH")
    """Function path of a filter that selects the responses of each group to train on. Default:
    all responses."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Critic of PPO."""

    critic: str | None = must_match(None, metavar="DIR")
    """Folder of the model that the critic starts from. Default: --model."""
    critic_lr: float | None = must_match(None, metavar="LR", above=0)
    """Peak learning rate of the critic, which follows the schedule of --lr. Default: 10 times
    --lr."""
    critic_warmup: int = must_match(0, metavar="STEPS", at_least=0)
    """Number of steps at the beginning in which only the critic is trained."""
    value_clip: float | None = must_match(None, metavar="RANGE", above=0)
    """Change of a predicted value in a step from which its loss is clipped. Default: no
    clipping."""
    gae_lambda: float = must_match(0.95, at_least=0, at_most=1)
    """Lambda of generalized advantage estimation, from 0 to 1."""
    gae_discount: float = must_match(1.0, at_least=0, at_most=1)
    """Discount of rewards per token, from 0 to 1."""
    whitening: bool = must_match(True)
    """Do not normalize the advantages of a step to mean 0 and variance 1."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollouts from servers."""

    rollout_url: tuple[str, ...] = may_change((), metavar="URL")
    """Addresses, http://HOST:PORT/v1, of vLLM servers, which load the policy's weights from
    RUN/served before each step and sample the responses. Default: the engine samples them."""
    rollout_model: str = may_change("policy", metavar="NAME")
    """Name under which the servers serve the policy."""
    weight_transfer: Literal["folder", "gloo", "nccl", "ipc"] = may_change("folder")
    """Way in which the servers get the weights: as files in RUN/served (folder), over the network
    (gloo, nccl), or through memory of the same machine (ipc). All but folder require the plug-in
    in the servers."""
    rollouts_ahead: Literal[0, 1] = must_match(0)
    """Number of steps, 0 or 1, by which servers sample responses in advance. With 1 (asynchronous
    rollouts) they sample the next step's responses while this step is judged and trained on, with
    the weights from before it."""
    rollout_bound: float | None = must_match(None, metavar="RATIO", above=0)
    """Upper bound of the importance weights, which are the ratios of training to sampling
    probability. Default: 2 for asynchronous rollouts, otherwise no bound."""
    rollout_rule: Literal["truncate", "mask"] = must_match("truncate")
    """Treatment of tokens whose weight exceeds the bound: truncate the weight, or mask the
    token."""

    def __post_init__(self) -> None:
        if self.rollouts_ahead and not self.rollout_url:
            raise UserError("--rollouts-ahead 1 requires servers. Add --rollout-url.")


@dataclass(frozen=True, kw_only=True)
class ReinforcementTrainingConfig(TrainingConfig):
    """Flags of every command that trains on rewards."""

    reinforcement: ReinforcementConfig = group()
    critic: CriticConfig = group()
    rollouts: RolloutConfig = group()

    @property
    def groups_per_step(self) -> int:
        """Number of prompts of a step.

        Raises:
            UserError: The responses of a step do not divide into groups.
        """
        size, group_size = self.batch.batch_size, self.reinforcement.group_size
        if size % group_size:
            raise UserError(
                f"--batch-size {size} is not a multiple of --group-size {group_size}. It counts "
                "responses. Choose a multiple."
            )
        return size // group_size


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Responses."""

    max_new_tokens: int = must_match(2048, metavar="TOKENS", at_least=1)
    """Maximum length of a response, in tokens."""
    temperature: float = must_match(0.7, at_least=0)
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: int = must_match(0, metavar="N", at_least=0)
    """Sample from this number of likeliest tokens only; 0 for all tokens."""
    top_p: float = must_match(1.0, metavar="P", above=0, at_most=1)
    """Sample only from the likeliest tokens that together have this probability; 1 for all
    tokens."""
    generation_batch_size: int = may_change(64, metavar="N", at_least=1)
    """Number of responses that a rank generates at a time."""


@dataclass(frozen=True, kw_only=True)
class JudgeFormatConfig:
    """Judge format."""

    template: str | None = must_match(None, metavar="NAME")
    """Template of the judge's prompt: pointwise or pairwise, optionally with the suffix -rubric or
    -reference, or a file. Default: pointwise for responses, pairwise for pairs."""
    thinking: Thinking = must_match("none")
    """Whether the judge thinks in <think> before its label. By choice: it does not think, its
    prompt asks it to think, or the model's chat template has opened <think>."""


@dataclass(frozen=True, kw_only=True)
class JudgeAnswerConfig:
    """Answers of the judge."""

    max_new_tokens: int = must_match(4096, metavar="TOKENS", at_least=1)
    """Maximum length of an answer, with its thinking, in tokens."""
    generation_batch_size: int = may_change(64, metavar="N", at_least=1)
    """Number of questions that a rank answers at a time."""
    judging_temperature: float = must_match(0.7, at_least=0)
    """Sampling temperature of the thinking; 0 always takes the likeliest token."""
    judging_top_k: int = must_match(20, metavar="N", at_least=0)
    """Sample the thinking from this number of likeliest tokens only; 0 for all tokens."""
    judging_top_p: float = must_match(0.95, metavar="P", above=0, at_most=1)
    """Sample the thinking only from the likeliest tokens that together have this probability; 1 for
    all tokens."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Input and output."""

    input: str = flag(metavar="FILE")
    """Records to read: a file (.jsonl, .json, .csv, .tsv or .parquet) or a folder of them, of this
    project or of a known schema."""
    output: str = flag(metavar="FILE")
    """File to write, .jsonl or .parquet."""
    overwrite: bool = flag(False)
    """Replace an --output that was written with other settings."""
