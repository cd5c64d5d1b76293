"""Engine on Megatron, with tensor, pipeline, context, expert and data parallelism.

`activate` of `megatron_ext.devices` must have been called. Engines of a process share Megatron's
process groups and therefore have the same layout. Megatron's global arguments and tokenizer are
those of the engine that was called last.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer, global_vars
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from torch import Tensor

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.export import export
from alignment.engines.log_probs import TokenScorer
from alignment.engines.megatron_launch import MegatronLayout, build, start
from alignment.engines.micro_batches import micro_batches
from alignment.engines.protocol import (
    GeneratedResponse,
    Loss,
    LossSums,
    Optimization,
    StepResult,
    TokenScores,
    reduce_sums,
)
from alignment.engines.routing_gap import RoutingComparison, mark_samples
from alignment.engines.routing_loads import RoutingLoads
from alignment.engines.sampler import Sampler
from alignment.ranks import raise_on_all_ranks
from megatron_ext.checkpoint import damage, find_checkpoint
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import record_end_tokens
from megatron_ext.hf.live import LiveTensors
from megatron_ext.hf.sources import open_model
from megatron_ext.inference.sampling import Sampling
from megatron_ext.model.packing import rotate_by_position_ids
from megatron_ext.moe.record_routing import record_routing
from megatron_ext.moe.router import routers_of
from megatron_ext.quiet import quiet_megatron
from megatron_ext.training.saving import explain_failure, repair_tracker


class MegatronEngine:
    """Engine on Megatron; see `alignment.engines.protocol.AlignmentEngine`.

    Thresholds are frozen: training routes by them, as generation does, and does not change them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimization: Optimization | None = None,
        layout: MegatronLayout | None = None,
        *,
        dtype: torch.dtype | None = None,
        flags: Sequence[str] = (),
        same_model: bool = True,
    ) -> None:
        """Start Megatron on this rank and load the weights of a model.

        Args:
            path: A Hugging Face folder, a run directory of either engine, or a folder of
                checkpoints; see `megatron_ext.model_location.locate_model`.
            optimization: Settings of training. None for a model that is not trained.
            layout: Division of the model among the ranks that were started.
            dtype: Dtype of the weights. Default: fp32 on a CPU, else the model's; bf16 to train a
                model in fp16.
            flags: Further flags of `pretrain_et.py`, which override all others.
            same_model: Whether to refuse flags that would change the function of the weights. A
                comparison of routers on the same weights sets it to False.

        Raises:
            UserError: The model cannot be read, or the layout does not fit it or the ranks.
        """
        self.layout = layout or MegatronLayout()
        self._optimization = optimization
        source = open_model(Path(path), "--model")
        if optimization is not None and source.dtype == torch.float16 and not is_cpu_device():
            dtype = dtype or torch.bfloat16  # gradients in fp16 may overflow
        # Megatron reads the tokenizer from files while it starts.
        with tempfile.TemporaryDirectory() as place, quiet_megatron():
            tokenizer = source.carry_tokenizer(Path(place))
            flags = [*tokenizer, *self.layout.flags, *flags]
            self.args, self.config = start(
                source, self.layout, optimization, dtype, flags, same_model
            )
            self._tokenizer = get_tokenizer()
            record_end_tokens(self._tokenizer, self.args.tokenizer_model or place)
        self._source, self._carry_tokenizer = source, source.carry_tokenizer
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.data_rank, self.data_size = self.groups.dp.rank(), self.groups.dp.size()
        self.step = 0
        with quiet_megatron():
            self._model, self._optimizer, self._schedule = build(self.args, self.config)
        [self._stage] = unwrap_model(self._model)
        for router in routers_of(self._model):
            router.freeze()
        rotate_by_position_ids(self._stage)
        self._tensors = LiveTensors([self._stage], source.model, source.family)
        self.load_parameters((name, source.tensors.read(name)) for name in self._tensors.needed)
        self._sampler: Sampler | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.args.params_dtype

    def log_probs(
        self,
        batch: TokenBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        trained_only: bool = False,
    ) -> TokenScores:
        """Return the scores of the batch's tokens; see `AlignmentEngine.log_probs`."""
        scorer = partial(
            TokenScorer, temperature=temperature, entropy=entropy, trained_only=trained_only
        )
        values = self._evaluate(batch, scorer, 1 + entropy)
        return TokenScores(values[0], values[1] if entropy else None)

    def next_log_probs(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        """Return log-probabilities after samples; see `AlignmentEngine.next_log_probs`."""
        return self._evaluate(batch, partial(TokenScorer, choices=tokens), len(tokens)).permute(
            1, 2, 0
        )

    def values(self, batch: TokenBatch, token: int, *, trained_only: bool = False) -> Tensor:
        """Return a critic's values, computed in fp32; see `AlignmentEngine.values`."""
        scorer = partial(TokenScorer, values=token, trained_only=trained_only)
        return self._evaluate(batch, scorer, 1)[0]

    def _evaluate(
        self, batch: TokenBatch, scorer: Callable[..., TokenScorer], kinds: int, train: bool = False
    ) -> Tensor:
        """Return scores of a batch on every rank that shares it, fp32 `[kinds, rows, length]`."""
        self._activate_globals()
        parts = self._split(batch)
        with torch.no_grad():
            results = self._run(parts, scorer, None, train)
        shape = (len(parts), kinds, self.layout.micro_batch, parts[0].length)
        device = parts[0].tokens.device
        values = torch.stack(results) if results else torch.empty(shape, device=device)
        pipeline = self.groups.pp
        dist.broadcast(values, group=pipeline, group_src=pipeline.size() - 1)
        return values.transpose(0, 1).flatten(1, 2)[:, : batch.rows, : batch.length]

    def train_step(
        self,
        batch: TokenBatch,
        loss: Loss,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        values: int | None = None,
    ) -> StepResult:
        """Make one optimizer step; see `AlignmentEngine.train_step`."""
        self._activate_globals()
        if self._optimizer is None:
            raise ValueError("the engine was created without an optimization")
        parts = self._split(batch)
        for chunk in self._model:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        scorer = partial(
            TokenScorer,
            temperature=temperature,
            entropy=entropy,
            trained_only=True,
            values=values,
        )
        loads = RoutingLoads(parts, self.groups)
        with loads.recorded(routers_of(self._model)):
            results = self._run(parts, scorer, loss, train=True)
        lr = self._schedule.get_lr(self._optimizer.param_groups[0])
        if self._optimization is not None and self._optimization.schedule is not None:
            lr = self._optimization.rate(self.step)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        stepped, norm, _ = self._optimizer.step()
        if stepped:
            self._schedule.step(increment=1)
            self.step += 1
        means = self._means(results)
        if values is None and self.config.num_moe_experts:
            means |= loads.metrics()
        return StepResult(means.pop("loss"), float(norm) if stepped else None, lr, means)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[GeneratedResponse]:
        """Continue prompts; each response depends on its prompt and seed only."""
        return self._sampling().generate(prompts, sampling, seeds)

    def _sampling(self) -> Sampler:
        self._activate_globals()
        if self._sampler is None:
            with quiet_megatron():
                self._sampler = Sampler(self._stage, self.args, self._tokenizer)
        return self._sampler

    def routing_gap(
        self, samples: Sequence[TokenSample], length: int, temperature: float = 1.0
    ) -> dict[str, float]:
        """Compare the routing of generation with that of the training model, in training mode."""
        if not self.config.num_moe_experts:
            return {}
        decoded = self._sampling().decode(samples, temperature)
        batch = TokenBatch.packed(mark_samples(samples, decoded), length)
        comparison = RoutingComparison(decoded, self._split(batch), self.groups)
        with record_routing(routers_of(self._model), comparison.record):
            results = self._evaluate(
                batch, partial(TokenScorer, temperature=temperature), 1, train=True
            )
        return comparison.metrics(batch, results[0])

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of all parameters, and of those that a token uses on average."""
        from megatron_ext.planning.dry_run.parameters import Parameters, count_parameters

        args = Namespace(**{**vars(self.args), "vocab_size": self.args.hf_vocab_size})
        stages: list[Any] = [None] * self.groups.pp.size()
        local = count_parameters(self._model, args)
        dist.all_gather_object(stages, local, group=self.groups.pp)
        all_stages, experts = Parameters.of_model(stages), self.config.num_moe_experts
        rate = self.config.mean_experts / experts if experts else Fraction(0)
        return all_stages.total, all_stages.active(rate)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's whole tensors; see `AlignmentEngine.parameters`."""
        return iter(self._tensors)

    def load_parameters(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors into the model; a rank requires only those of which it has a part."""
        self._tensors.load(tensors)
        if self._optimizer is not None:
            with torch.no_grad():
                self._optimizer.reload_model_params()

    def export(self, folder: str | os.PathLike[str], *, untie_head: bool = False) -> None:
        """Write the model as a Hugging Face folder; see `AlignmentEngine.export`."""
        export(Path(folder), self._source, self.parameters(), untie_head)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint of this step, which `pretrain_et.py` and the tools can also load."""
        self._activate_globals()
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
        """Resume from the newest checkpoint in a folder.

        Raises:
            UserError: There is no checkpoint, or it is incomplete or damaged.
        """
        self._activate_globals()
        rank, size = dist.get_rank(), dist.get_world_size()

        def verify_checkpoint() -> None:
            checkpoint = find_checkpoint(folder)
            if problem := damage(checkpoint, rank, size):  # each rank reads a share of the files
                raise UserError(f"{checkpoint} is incomplete or damaged: {problem}")

        # Megatron empties its tracker before it writes it, and a kill may come in between.
        raise_on_all_ranks(lambda: repair_tracker(Path(folder)) if rank == 0 else None)
        raise_on_all_ranks(verify_checkpoint)
        self.args.load = str(folder)
        # Loading adds to these counts.
        self.args.consumed_train_samples = self.args.skipped_train_samples = 0
        self._schedule.num_steps = 0
        with quiet_megatron():
            self.step, _ = load_checkpoint(self._model, self._optimizer, self._schedule)

    def _activate_globals(self) -> None:
        """Point Megatron's global arguments and tokenizer to this engine."""
        global_vars._GLOBAL_ARGS, global_vars._GLOBAL_TOKENIZER = self.args, self._tokenizer

    def _split(self, batch: TokenBatch) -> list[TokenBatch]:
        if self.args.transformer_impl != "local" and batch.is_packed:
            raise UserError("Several samples per row require --transformer-impl local.")
        return micro_batches(
            batch,
            self.layout.micro_batch,
            self.groups.dp,
            torch.cuda.current_device(),
            self.layout.length_multiple,
        )

    def _run(
        self,
        parts: list[TokenBatch],
        scorer_of: Callable[..., TokenScorer],
        loss: Loss | None,
        train: bool,
    ) -> list[Any]:
        """Run micro-batches through the pipeline, forward and, with a loss, backward.

        Args:
            parts: Micro-batches.
            scorer_of: Function that makes the scorer of a micro-batch.
            loss: Loss of a micro-batch, or None.
            train: Whether modules are in training mode.

        Returns:
            On the last stage the result of `_scored` or of the loss for each micro-batch; nothing
            on the other stages.
        """
        for chunk in self._model:
            chunk.train(train)

        def forward(batches: Iterator[TokenBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(batches)
            scorer = scorer_of(batch, self.groups)
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
            data_iterator=iter(parts),
            model=self._model,
            num_microbatches=len(parts),
            seq_length=parts[0].length,
            micro_batch_size=self.layout.micro_batch,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )

    def _weigh(self, scorer: TokenScorer, loss: Loss) -> Any:
        def weighed(output: Tensor) -> tuple[Tensor, Tensor, LossSums]:
            sums = loss(scorer.scores(output), scorer.batch)
            # Ranks that share rows have the same weight, which counts once.
            counts = sums.weight.to(torch.int) * (self.groups.cp.rank() == 0)
            # The pipeline schedule frees the first value.
            return sums.total, counts, replace(sums, total=sums.total.detach())

        return weighed

    def _means(self, results: list[LossSums]) -> dict[str, float]:
        """Return loss and metrics of all micro-batches and data-parallel ranks, divided once."""
        means = [reduce_sums(results, self.groups.dp) if results else {}]
        pipeline = self.groups.pp
        if pipeline.size() > 1:
            dist.broadcast_object_list(means, group=pipeline, group_src=pipeline.size() - 1)
        return means[0]


def _scored(scorer: TokenScorer, output: Tensor, non_loss_data: bool = True) -> Tensor:
    """Return the scores of a micro-batch, fp32 `[kinds, rows, length]`."""
    if scorer.choices:
        return scorer.whole(output)
    scores = scorer.scores(output)
    if scores.values is not None:
        return scores.values.unsqueeze(0)
    kinds = [scores.log_probs] if scores.entropy is None else [scores.log_probs, scores.entropy]
    return torch.stack(kinds)
