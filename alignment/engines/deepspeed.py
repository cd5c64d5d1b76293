"""Engine on DeepSpeed, for any causal language model of transformers, with ZeRO 1 to 3.

Every rank has a separate share of the data. Without CUDA the engine runs on gloo and plain torch.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.decoding import decode
from alignment.engines.deepspeed_checkpoint import verify_checkpoint
from alignment.engines.deepspeed_launch import (
    ON_CPU,
    ZeroSettings,
    check_samples_per_row,
    load_model,
    read_end_tokens,
    start_ranks,
    wrap,
)
from alignment.engines.deepspeed_scores import CausalScorer
from alignment.engines.export import export
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
from alignment.ranks import raise_on_all_ranks
from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling
from megatron_ext.model_location import locate_hf_folder
from megatron_ext.training.saving import write_atomically

__all__ = ["DeepSpeedEngine", "ZeroSettings"]


class DeepSpeedEngine:
    """Engine on DeepSpeed; see `alignment.engines.protocol.AlignmentEngine`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        optimization: Optimization | None = None,
        zero: ZeroSettings | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the weights of a model.

        Args:
            path: A Hugging Face folder, or a run directory that has one.
            optimization: Settings of training. None for a model that is not trained.
            zero: Settings of ZeRO.
            dtype: fp32 or bf16. Default: fp32 on a CPU, else bf16.

        Raises:
            UserError: The model cannot be read, or cannot be trained with several samples per row.
        """
        self.optimization, self.zero = optimization, zero or ZeroSettings()
        self.dtype = dtype or (torch.float32 if ON_CPU else torch.bfloat16)
        start_ranks()
        self.data_rank, self.data_size = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._path = locate_hf_folder(path, "--model", "--engine deepspeed")
        model = load_model(self._path, self.dtype)
        if optimization is not None:
            check_samples_per_row(model.config)
        self.eod = read_end_tokens(self._path)
        self._engine, self._optimizer = wrap(model, optimization, self.zero, self.dtype)
        self._device = self._engine.device
        self._scorer = CausalScorer(self._engine, self.dtype)

    def log_probs(
        self,
        batch: TokenBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        trained_only: bool = False,
    ) -> TokenScores:
        """Return the scores of the batch's tokens; see `AlignmentEngine.log_probs`."""
        self._engine.eval()
        with torch.no_grad():
            results = [
                self._scorer.token_scores(part, temperature, entropy, trained_only)
                for part in self._split(batch)
            ]
        real = (slice(batch.rows), slice(batch.length))
        log_probs = torch.cat([scores.log_probs for scores in results])[real]
        entropies = [scores.entropy for scores in results if scores.entropy is not None]
        return TokenScores(log_probs, torch.cat(entropies)[real] if entropies else None)

    def next_log_probs(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        """Return log-probabilities after samples; see `AlignmentEngine.next_log_probs`."""
        self._engine.eval()
        with torch.no_grad():
            parts = [self._scorer.next_log_probs(part, tokens) for part in self._split(batch)]
        return torch.cat(parts)[: batch.rows, : batch.length]

    def values(self, batch: TokenBatch, token: int, *, trained_only: bool = False) -> Tensor:
        """Return a critic's values in the precision of logits; see `AlignmentEngine.values`."""
        self._engine.eval()
        with torch.no_grad():
            results = [
                self._scorer.values(part, token, trained_only) for part in self._split(batch)
            ]
        values = [scores.values for scores in results if scores.values is not None]
        return torch.cat(values)[: batch.rows, : batch.length]

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
        optimization = self._trained()
        self._engine.train()
        # Gradients are those of sums. They are divided by the weight of all ranks, through
        # DeepSpeed's loss scale, which also undoes its mean over ranks.
        self._optimizer.override_loss_scale(1.0)
        results: list[LossSums] = []
        parts = self._split(batch)
        for number, part in enumerate(parts, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(parts))
            if values is None:
                scores = self._scorer.token_scores(part, temperature, entropy, trained_only=True)
            else:
                scores = self._scorer.values(part, values, trained_only=True)
            sums = loss(scores, part)
            self._engine.backward(sums.total, scale_wrt_gas=False)
            results.append(replace(sums, total=sums.total.detach()))
        weight = torch.stack([sums.weight.to(torch.int64) for sums in results]).sum()
        dist.all_reduce(weight)
        self._optimizer.override_loss_scale(max(int(weight), 1) / self.data_size)
        lr = optimization.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self.step += 1
        means = reduce_sums(results, None)
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(means.pop("loss"), norm, lr, means)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[GeneratedResponse]:
        """Continue prompts; see `AlignmentEngine.generate`.

        Raises:
            UserError: The sampling has stop strings, which require a tokenizer, or settings that
                this engine does not support.
        """
        if sampling.stop:
            raise UserError("The DeepSpeed engine has no stop strings. End responses by tokens.")
        if sampling.depends_on_tokens or sampling.stop_token_ids:
            raise UserError(
                "The DeepSpeed engine has no penalties, no bias and no further end tokens."
            )
        self._engine.eval()
        seeds = range(len(prompts)) if seeds is None else seeds
        return decode(self._engine.module, self.eod, prompts, sampling, seeds, self._device)

    def routing_gap(
        self, samples: Sequence[TokenSample], length: int, temperature: float = 1.0
    ) -> dict[str, float]:
        """Return no metrics, because models of transformers do not report their routing."""
        return {}

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of all parameters twice, because the number per token is unknown."""
        parameters = self._engine.module.parameters()
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        return total, total

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's whole tensors; see `AlignmentEngine.parameters`."""
        from transformers.core_model_loading import revert_weight_conversion

        model = self._engine.module
        for name, tensor in _tensors(model):
            with self._gathered(tensor):
                for hf_name, part in revert_weight_conversion(model, {name: tensor.data}).items():
                    yield hf_name, part.clone()

    @torch.no_grad()
    def load_parameters(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole tensors into the model; all of them are in memory at the same time.

        Raises:
            UserError: A tensor is missing or has another shape.
        """
        from transformers.core_model_loading import revert_weight_conversion

        model, new_tensors = self._engine.module, dict(tensors)
        for name, tensor in _tensors(model):
            with self._gathered(tensor, changed=True):
                # transformers fuses some tensors. Converting the indices of the elements shows
                # which elements each part has.
                indices = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
                for hf_name, part in revert_weight_conversion(model, {name: indices}).items():
                    if hf_name not in new_tensors:
                        raise UserError(
                            f"The tensor {hf_name} is missing, which the model requires."
                        )
                    if new_tensors[hf_name].shape != part.shape:
                        raise UserError(
                            f"{hf_name} is of another model. Its shape must be {tuple(part.shape)}."
                        )
                    new = new_tensors[hf_name].to(tensor.device, tensor.dtype).flatten()
                    tensor.view(-1)[part.flatten()] = new
        if self.optimization is not None:
            self._optimizer.refresh_fp32_params()

    def export(self, folder: str | os.PathLike[str], *, untie_head: bool = False) -> None:
        """Write the model as a Hugging Face folder; see `AlignmentEngine.export`."""
        export(Path(folder), self._path, self.parameters(), untie_head)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint in DeepSpeed's format, which the same number of ranks can load."""
        self._trained()
        tag = f"step_{self.step}"
        self._engine.save_checkpoint(
            os.fspath(folder), tag=tag, client_state={"step": self.step}, save_latest=False
        )
        # DeepSpeed would write this file before the other ranks have written their parts.
        dist.barrier()
        latest = Path(folder, "latest")
        raise_on_all_ranks(lambda: write_atomically(latest, tag) if dist.get_rank() == 0 else None)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Resume from the checkpoint that `save` wrote.

        Raises:
            UserError: There is no checkpoint, it is damaged, or it has another number of ranks.
        """
        self._trained()
        rank, size = dist.get_rank(), dist.get_world_size()
        raise_on_all_ranks(lambda: verify_checkpoint(Path(folder), rank, size))
        try:
            place, state = self._engine.load_checkpoint(os.fspath(folder))
        except Exception as error:  # on every rank
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise UserError(
                f"The checkpoint in {folder} cannot be loaded ({reason}). It must be of the same "
                "model, and saved with ZeRO stage 3 if it is loaded with stage 3."
            ) from error
        if place is None:
            raise UserError(f"The checkpoint in {folder} is incomplete or damaged.")
        self.step = state["step"]

    def _trained(self) -> Optimization:
        if self.optimization is None:
            raise ValueError("the engine was created without an optimization")
        return self.optimization

    def _split(self, batch: TokenBatch) -> list[TokenBatch]:
        # With ZeRO, every micro-batch is a collective.
        return micro_batches(batch, self.zero.micro_batch, None, self._device)

    def _gathered(self, tensor: Tensor, changed: bool = False) -> Any:
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        import deepspeed  # deepspeed_launch has reported a missing installation

        return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if changed else None)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the distinct parameters and the persistent buffers."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
