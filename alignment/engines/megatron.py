"""The engine on Megatron: tensor, pipeline, context, expert and data parallelism.

`activate` of `megatron_ext.devices` must have been called. One engine a process: Megatron's
arguments and process groups are global.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.global_vars import get_args
from megatron.training.initialize import initialize_megatron
from torch import Tensor

from alignment.engines.batch import Batch
from alignment.engines.protocol import (
    Generated,
    Loss,
    Optimization,
    Scores,
    StepResult,
    Sums,
    means_of,
)
from alignment.engines.sampler import Sampler
from alignment.engines.scoring import Scorer
from megatron_ext.arguments import explained, parse_args
from megatron_ext.checkpoint import damage, find_checkpoint
from megatron_ext.config import ETConfig
from megatron_ext.errors import UserError
from megatron_ext.hf.architecture import to_flags
from megatron_ext.hf.live import LiveTensors
from megatron_ext.hf.sources import Source, open_hf, open_megatron
from megatron_ext.inference.sampling import Sampling
from megatron_ext.model.gpt import gpt_model_config
from megatron_ext.model.packing import rotate_by_position_ids
from megatron_ext.moe.router import ThresholdRouter
from megatron_ext.quiet import quiet_megatron
from megatron_ext.training import resharding
from megatron_ext.training.checkpoints import explain_failure, install_integrity
from megatron_ext.training.checks import sha256
from megatron_ext.training.step import routers_of


@dataclass(frozen=True)
class MegatronLayout:
    """How a model is spread over ranks; what is left of them holds copies, with data of their own.

    Attributes:
        expert_tensor: tensor parallelism inside an expert; None for that of the other layers.
        shard_optimizer: copies share the optimizer's state out among them.
        micro_batch: rows that go through the model at a time.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    shard_optimizer: bool = False
    micro_batch: int = 1

    @property
    def flags(self) -> list[str]:
        """Of `pretrain_et.py`."""
        sizes = {
            "tensor-model-parallel-size": self.tensor,
            "pipeline-model-parallel-size": self.pipeline,
            "context-parallel-size": self.context,
            "expert-model-parallel-size": self.expert,
            "expert-tensor-parallel-size": self.expert_tensor or self.tensor,
            "micro-batch-size": self.micro_batch,
        }
        flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        flags += ["--sequence-parallel"] if self.tensor > 1 else []
        flags += ["--use-distributed-optimizer"] if self.shard_optimizer else []
        return flags

    @property
    def length_multiple(self) -> int:
        """What the length of rows must be a multiple of."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)


class MegatronEngine:
    """See `alignment.engines.protocol.Engine`.

    Thresholds are frozen: training routes by them as generation does, and never moves them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimization: Optimization | None = None,
        layout: MegatronLayout | None = None,
        *,
        flags: Sequence[str] = (),
    ) -> None:
        """Start Megatron on this rank and load the weights of a model.

        Args:
            path: a Hugging Face folder, a run directory, or a folder of checkpoints.
            optimization: how it is trained.
            layout: of the ranks that were started.
            flags: more of `pretrain_et.py`; they override all others.

        Raises:
            UserError: the model cannot be read, or the layout does not fit it or the ranks.
        """
        self.layout = layout or MegatronLayout()
        self.optimization = optimization or Optimization()
        folder = Path(path)
        hf = (folder / "config.json").is_file()
        source = open_hf(folder) if hf else open_megatron(find_checkpoint(folder))
        # Megatron reads the tokenizer from files while it starts.
        with tempfile.TemporaryDirectory() as place, quiet_megatron():
            tokenizer = source.carry_tokenizer(Path(place))
            flags = [*tokenizer, *self.layout.flags, *flags]
            self.args, self.config = _start(source, self.layout, self.optimization, flags)
        self._carry_tokenizer = source.carry_tokenizer
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.data_rank, self.data_size = self.groups.dp.rank(), self.groups.dp.size()
        self.step = 0
        with quiet_megatron():
            self._model, self._optimizer, self._schedule = _build(self.args, self.config)
        [self._stage] = unwrap_model(self._model)
        for router in routers_of(self._model):
            if isinstance(router, ThresholdRouter):
                router.frozen = True
        rotate_by_position_ids(self._stage)
        self._tensors = LiveTensors([self._stage], source.model, source.family)
        self.load_parameters((name, source.tensors.read(name)) for name in self._tensors.needed)
        self._sampler: Sampler | None = None

    def log_probs(self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """See the protocol."""
        micro_batches = self._split(batch)
        with torch.no_grad():
            found = self._run(micro_batches, temperature, entropy, None)
        kept = [
            torch.cat(parts)[: batch.rows, : batch.length]
            for parts in zip(*self._from_last_stage(found))
        ]
        return Scores(kept[0], kept[1] if entropy else None)

    def train_step(
        self, batch: Batch, loss: Loss, *, temperature: float = 1.0, entropy: bool = False
    ) -> StepResult:
        """See the protocol."""
        micro_batches = self._split(batch)
        for chunk in self._model:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        found = self._run(micro_batches, temperature, entropy, loss)
        lr = self._schedule.get_lr(self._optimizer.param_groups[0])
        stepped, norm, _ = self._optimizer.step()
        if stepped:
            self._schedule.step(increment=self.args.global_batch_size)
        self.step += 1
        means = self._means(found)
        return StepResult(means.pop("loss"), float(norm), lr, means)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[Generated]:
        """See the protocol; a row's sample depends on its prompt and seed alone."""
        if self._sampler is None:
            self._sampler = Sampler(self._stage, self.args, get_tokenizer())
        return self._sampler.generate(prompts, sampling, seeds)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See the protocol."""
        return iter(self._tensors)

    def load_parameters(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See the protocol; a rank needs only what it holds a part of."""
        self._tensors.load(tensors)
        with torch.no_grad():
            self._optimizer.reload_model_params()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint of this step, which `pretrain_et.py` and the tools read too."""
        place = Path(folder)
        if dist.get_rank() == 0:
            place.mkdir(parents=True, exist_ok=True)
            if not any((place / name).exists() for name in ("tokenizer", "tokenizer.model")):
                self._carry_tokenizer(place)
        dist.barrier()
        args = self.args
        args.save, args.iteration = str(place), self.step
        if args.tokenizer_model is not None:
            args.tokenizer_model = str(place.absolute() / Path(args.tokenizer_model).name)
        with quiet_megatron():
            explain_failure(save_checkpoint, args)(
                self.step, self._model, self._optimizer, self._schedule, 0
            )

    def load(self, folder: str | os.PathLike[str]) -> None:
        """See the protocol."""
        checkpoint = find_checkpoint(folder)
        if problem := damage(checkpoint, dist.get_rank(), dist.get_world_size()):
            raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")
        self.args.load = str(folder)
        # These count on from where they are.
        self.args.consumed_train_samples = self.args.skipped_train_samples = 0
        self._schedule.num_steps = 0
        with quiet_megatron():
            self.step, _ = load_checkpoint(self._model, self._optimizer, self._schedule)

    def _split(self, batch: Batch) -> list[Batch]:
        """Micro-batches of one shape, as many as any data-parallel rank has."""
        rows, multiple = self.layout.micro_batch, self.layout.length_multiple
        if self.args.transformer_impl != "local" and batch.is_packed:
            raise UserError("several samples a row need --transformer-impl local")
        shape = torch.tensor([-(-batch.rows // rows), -(-batch.length // multiple)])
        shape = shape.to(torch.cuda.current_device())
        dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=self.groups.dp)
        count, length = max(1, int(shape[0])), max(1, int(shape[1])) * multiple
        whole = batch.padded(count * rows, length).to(torch.cuda.current_device())
        return [whole.slice(slice(i * rows, (i + 1) * rows)) for i in range(count)]

    def _run(
        self, micro_batches: list[Batch], temperature: float, entropy: bool, loss: Loss | None
    ) -> list[Any]:
        """Micro-batches through the pipeline, forward and, with a loss, backward.

        Returns:
            on the last stage, what `_scored` or `_weighed` gives for each; nothing on the others.
        """
        for chunk in self._model:
            chunk.train(loss is not None)

        def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(batches)
            scorer = Scorer(batch, self.groups, temperature, entropy)
            output = model(
                batch.tokens[:, scorer.places],
                batch.positions[:, scorer.places],
                batch.samples if batch.is_packed else None,
                output_processor=scorer,
            )
            reduce = partial(_scored, scorer) if loss is None else self._weigh(scorer, loss)
            return output, reduce

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=self._model,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].length,
            micro_batch_size=self.layout.micro_batch,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )

    def _weigh(self, scorer: Scorer, loss: Loss) -> Any:
        def weighed(output: Tensor) -> tuple[Tensor, Tensor, Sums]:
            sums = loss(scorer.scores(output), scorer.batch)
            # Ranks that share rows all find the same: it counts once.
            counts = sums.weight.to(torch.int) * (self.groups.cp.rank() == 0)
            return sums.total, counts, sums

        return weighed

    def _from_last_stage(self, found: list[Any]) -> list[Any]:
        pipeline = self.groups.pp
        if pipeline.size() == 1:
            return found
        message = [found]
        dist.broadcast_object_list(message, group=pipeline, group_src=pipeline.size() - 1)
        return message[0]

    def _means(self, found: list[Sums]) -> dict[str, float]:
        """Loss and metrics of all micro-batches and data-parallel ranks, divided once."""
        means: dict[str, float] = {}
        if found:
            means = means_of(found, self.groups.dp)
        return self._from_last_stage([means])[0]


def _scored(scorer: Scorer, output: Tensor, non_loss_data: bool = True) -> tuple[Tensor, ...]:
    scores = scorer.scores(output)
    return (scores.log_probs,) if scores.entropy is None else (scores.log_probs, scores.entropy)


def _start(
    source: Source,
    layout: MegatronLayout,
    optimization: Optimization,
    flags: Sequence[str],
) -> tuple[Namespace, ETConfig]:
    """Parse the flags of this model and start Megatron with them."""
    try:
        get_args()
    except AssertionError:
        pass
    else:
        raise UserError("this process has a Megatron engine already: start another process")
    model = source.model
    precision = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(source.dtype, [])
    copies = int(os.environ.get("WORLD_SIZE", "1")) // (
        layout.tensor * layout.pipeline * layout.context
    )
    values: dict[str, Any] = {
        "global-batch-size": layout.micro_batch * max(copies, 1),  # of the schedule's bookkeeping
        "train-iters": optimization.steps,
        "lr": optimization.lr,
        "min-lr": 0.0,
        "lr-decay-style": "linear",
        "lr-warmup-iters": optimization.warmup,
        "weight-decay": optimization.weight_decay,
        "adam-beta1": optimization.betas[0],
        "adam-beta2": optimization.betas[1],
        "adam-eps": optimization.eps,
        "clip-grad": optimization.clip,
        # Attention of Transformer Engine takes no samples that share a row.
        "transformer-impl": "local",
    }
    if model.router is not None:
        values |= {
            "moe-token-dispatcher-type": "alltoall",
            "moe-router-load-balancing-type": "none",
            "moe-aux-loss-coeff": 0.0,
        }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    # A step is not repeated here: what is not finite ends it.
    words += ["--rerun-mode", "disabled"]
    words += ["--mock-data", "--calculate-per-token-loss", "--no-rope-fusion"]
    words += ["--et-warmup-iters", "0"] if model.thresholds else []
    args, config = parse_args([*to_flags(model), *precision, *words, *flags])
    multiple = args.make_vocab_size_divisible_by * layout.tensor
    args.hf_vocab_size = model.vocab
    args.padded_vocab_size = max(args.padded_vocab_size, -(-model.vocab // multiple) * multiple)
    args.tokenizer_sha256 = sha256(args.tokenizer_model)
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    explained(initialize_megatron)
    resharding.install()
    install_integrity()
    return args, config


def _build(args: Namespace, config: ETConfig) -> tuple[list[Any], Any, Any]:
    """The model in its data-parallel wrapper, the optimizer and its schedule."""
    model, optimizer, schedule = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, gpt_model_config(args, config)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer, schedule
