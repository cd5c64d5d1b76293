"""Engine on DeepSpeed, for any causal language model of transformers, with ZeRO 1 to 3.

Every rank has a separate share of the data. Without CUDA the engine runs over gloo, in plain torch.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from alignment.data.model_tokenizer import read_tokenizer
from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.decoding import decode
from alignment.engines.export import export
from alignment.engines.micro_batches import micro_batches
from alignment.engines.protocol import (
    GeneratedResponse,
    Loss,
    LossSums,
    Optimization,
    StepResult,
    TokenScores,
    align_scores,
    reduce_sums,
)
from alignment.ranks import raise_on_all_ranks
from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.hf.end_tokens import end_tokens, record_end_tokens
from megatron_ext.hf.families import OWN
from megatron_ext.inference.sampling import Sampling, log_probs_of
from megatron_ext.model_location import locate_hf_folder
from megatron_ext.training.saving import write_atomically

ON_CPU = is_cpu_device() or not torch.cuda.is_available()
if ON_CPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
try:
    import deepspeed
except ImportError as error:
    raise UserError("DeepSpeed is not installed: pip install 'megatron-et[deepspeed]'") from error
from deepspeed.utils.logging import logger  # noqa: E402


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of ZeRO, which divides the state of training among ranks.

    Attributes:
        stage: 1 for the optimizer's state, 2 for gradients too, 3 for parameters too.
        offload_optimizer: Whether the optimizer's state is in host memory and updated there.
        offload_parameters: Whether parameters are in host memory too. Requires stage 3.
        micro_batch: Rows that run through the model at a time.
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    micro_batch: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: A setting is out of its range.
        """
        if self.stage not in (1, 2, 3):
            raise UserError(f"There is no ZeRO stage {self.stage}. Choose 1, 2 or 3.")
        if self.offload_parameters and self.stage < 3:
            raise UserError("--offload-parameters requires --zero-stage 3.")


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
            UserError: The model cannot be read.
        """
        self.optimization, self.zero = optimization, zero or ZeroSettings()
        self.dtype = dtype or (torch.float32 if ON_CPU else torch.bfloat16)
        _start_ranks()
        self.data_rank, self.data_size = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._path = locate_hf_folder(path, "--model", "--engine deepspeed")
        model = _load(self._path, self.dtype)
        self.eod = _end_tokens(self._path)
        optimizer = None
        if optimization is not None:
            groups = _parameter_groups(model, optimization)
            optimizer = torch.optim.AdamW(
                groups, betas=optimization.betas, eps=optimization.eps, lr=0.0
            )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._config(), dist_init_required=False
        )
        self._device = self._engine.device

    def log_probs(
        self,
        batch: TokenBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        trained_only: bool = False,
    ) -> TokenScores:
        """Return the scores of the batch's tokens, without gradients."""
        self._engine.eval()
        with torch.no_grad():
            results = [
                self._score(part, temperature, entropy, trained_only) for part in self._split(batch)
            ]
        real = (slice(batch.rows), slice(batch.length))
        log_probs = torch.cat([scores.log_probs for scores in results])[real]
        entropies = [scores.entropy for scores in results if scores.entropy is not None]
        return TokenScores(log_probs, torch.cat(entropies)[real] if entropies else None)

    def next_log_probs(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some tokens after each sample, without gradients."""
        self._engine.eval()
        with torch.no_grad():
            parts = [self._next(part, tokens) for part in self._split(batch)]
        return torch.cat(parts)[: batch.rows, : batch.length]

    def values(self, batch: TokenBatch, token: int) -> Tensor:
        """Return a critic's values of the states before the tokens, as exact as the logits are."""
        self._engine.eval()
        with torch.no_grad():
            results = [self._value(part, token) for part in self._split(batch)]
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
        """Make one optimizer step on the batches of all ranks together."""
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
                scores = self._score(part, temperature, entropy, trained_only=True)
            else:
                scores = self._value(part, values)
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
        """Continue prompts with the present weights.

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
        """Return the number of all parameters twice: which of them a token uses is not known."""
        parameters = self._engine.module.parameters()
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        return total, total

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's whole tensors under their Hugging Face names."""
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

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a Hugging Face folder, atomically."""
        export(Path(folder), self._path, self.parameters())

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
        raise_on_all_ranks(lambda: _verify_checkpoint(Path(folder), rank, size))
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
            raise ValueError("the engine was made without an optimization")
        return self.optimization

    def _config(self) -> dict[str, Any]:
        zero, trained = self.zero, self.optimization is not None
        # Without an optimizer, only parameters can be divided.
        settings: dict[str, Any] = {"stage": zero.stage if trained or zero.stage == 3 else 0}
        if zero.offload_optimizer and trained:
            settings["offload_optimizer"] = {"device": "cpu"}
        if zero.offload_parameters:
            settings["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": zero.micro_batch,
            # `train_step` sets the boundaries. With 1, offloading loses all but the last part.
            "gradient_accumulation_steps": 2,
            "zero_optimization": settings,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": self.optimization.clip if self.optimization else 0.0,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
        }

    def _split(self, batch: TokenBatch) -> list[TokenBatch]:
        # With ZeRO, every micro-batch is a collective.
        return micro_batches(batch, self.zero.micro_batch, None, self._device)

    def _score(
        self, batch: TokenBatch, temperature: float, entropy: bool, trained_only: bool
    ) -> TokenScores:
        scored = batch.loss_mask if trained_only else batch.predicted
        following = torch.nn.functional.pad(batch.tokens, (0, 1))[:, 1:]
        places = _columns(torch.nn.functional.pad(scored, (0, 1))[:, 1:])
        logits, targets = self._logits(batch, places) / temperature, following[:, places]
        kinds = [log_probs_of(logits.flatten(0, 1), targets.flatten()).view_as(targets)]
        if entropy:
            table = logits.log_softmax(dim=-1)
            kinds.append(-(table.exp() * table).sum(dim=-1))
        every = logits.new_zeros(len(kinds), *batch.tokens.shape)
        return align_scores(every.index_copy(2, places, torch.stack(kinds)), scored)

    def _next(self, batch: TokenBatch, tokens: Sequence[int]) -> Tensor:
        places = _columns(batch.last)
        logits = self._logits(batch, places)
        scores = logits[..., list(tokens)] - logits.logsumexp(-1, keepdim=True)
        every = scores.new_zeros(*batch.tokens.shape, len(tokens))
        return every.index_copy(1, places, scores) * batch.last.unsqueeze(-1)

    def _value(self, batch: TokenBatch, token: int) -> TokenScores:
        # Read the values from the output layer, before a soft cap of the logits for example.
        outputs: list[Tensor] = []
        head = self._engine.module.get_output_embeddings()
        hook = head.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
        self._logits(batch)
        hook.remove()
        values = outputs[0][..., token].float().unsqueeze(0)
        return align_scores(values, batch.predicted, values=True)

    def _logits(self, batch: TokenBatch, places: Tensor | None = None) -> Tensor:
        """Return logits after the tokens at some places of every row, or at all places.

        Returns:
            fp32 `[rows, places, vocabulary]`.
        """
        mask = None
        positions = torch.arange(batch.length, device=self._device).expand(batch.rows, -1)
        if batch.is_packed:
            mask, positions = self._mask(batch), batch.positions
        output = self._engine(
            input_ids=batch.tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=0 if places is None else places,
        )
        return output.logits.float()

    def _mask(self, batch: TokenBatch) -> Any:
        """Return the attention mask of packed rows: a token attends to its sample, up to itself."""
        from transformers.masking_utils import create_masks_for_generate

        config = self._engine.module.config.get_text_config()
        if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
            # One mask per kind of layer. transformers distinguishes samples by their positions.
            sizes = torch.empty(*batch.tokens.shape, 0, dtype=self.dtype, device=self._device)
            return create_masks_for_generate(config, sizes, None, None, batch.positions)
        places = torch.arange(batch.length, device=self._device)
        visible = batch.samples.unsqueeze(2) == batch.samples.unsqueeze(1)
        visible = visible & (places.unsqueeze(1) >= places)  # [rows, queries, keys]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self._device)
        return mask.masked_fill(~visible, torch.finfo(self.dtype).min).unsqueeze(1)

    def _gathered(self, tensor: Tensor, changed: bool = False) -> Any:
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if changed else None)


def _columns(mask: Tensor) -> Tensor:
    """Return the columns in which a mask is set in any row; the first column if it is nowhere."""
    places = mask.any(dim=0).nonzero().flatten()
    return places if len(places) else places.new_zeros(1)


def _start_ranks() -> None:
    """Initialize torch.distributed, unless the caller has, and DeepSpeed's view of it."""
    logger.setLevel("WARNING")
    backend = "gloo" if ON_CPU else "nccl"
    if "WORLD_SIZE" not in os.environ:  # started without torchrun, which DeepSpeed does not expect
        os.environ.setdefault("LOCAL_RANK", "0")
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if ON_CPU:
        # Otherwise DeepSpeed compiles its shared-memory collectives at their first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _verify_checkpoint(folder: Path, rank: int, size: int) -> None:
    """Check a checkpoint before it is loaded, where a failing rank would leave others waiting.

    Args:
        folder: Folder of the checkpoints.
        rank: This rank, which reads a share of the files.
        size: Number of ranks.

    Raises:
        UserError: There is no checkpoint, it has another number of ranks, or it is damaged.
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise UserError(f"{folder} has no checkpoint of DeepSpeed. Save one first.")
    files = sorted((folder / latest.read_text().strip()).glob("*.pt"))
    saved = sum(file.name.endswith("_optim_states.pt") for file in files)
    if saved != size:
        raise UserError(
            f"The checkpoint in {folder} cannot be loaded: DeepSpeed resumes with as many ranks as "
            f"saved it. Start {saved} ranks, not {size}."
        )
    for file in files[rank::size]:
        if not _is_whole(file):
            raise UserError(f"The checkpoint in {folder} is incomplete or damaged: {file.name}.")


def _is_whole(file: Path) -> bool:
    """Return whether a file of torch.save, which is a zip archive, is complete and intact."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive may raise any exception
        return False


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_ext.hf.configs import load_config
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, MoE

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a Hugging Face folder, as it has no config.json. Choose another one."
        )
    own = f'"{OWN.name}"' in (folder / "config.json").read_text()
    config = load_config(folder) if own else AutoConfig.from_pretrained(folder)
    # A train step must compute the same as `log_probs`: with dropout, the ratios of PPO would
    # not be 1 before the first update. Training in eval mode is no alternative, because experts
    # without a token then take no part and ranks would lack each other's gradients.
    _turn_dropout_off(config)
    loader = ExpertThresholdForCausalLM if own else AutoModelForCausalLM
    model = loader.from_pretrained(folder, config=config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, _DropoutNd):  # also rates that the configuration does not have
            module.p = 0.0
    if own:
        # The tokens decide which experts run, so ZeRO 3 must fetch all experts of a layer together.
        deepspeed.utils.set_z3_leaf_modules(model, [MoE], raise_if_not_found=False)
    return model


def _turn_dropout_off(config: Any) -> None:
    """Set all dropout rates to 0, before modules that are no torch.nn.Dropout copy them."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _turn_dropout_off(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and "drop" in name:
            setattr(config, name, 0.0)


def _end_tokens(folder: Path) -> frozenset[int]:
    """Return the end tokens of a model, whose folder may lack a tokenizer."""
    with_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder) if with_tokenizer else SimpleNamespace()
    record_end_tokens(tokenizer, folder)
    return end_tokens(tokenizer)


def _parameter_groups(model: Any, optimization: Optimization) -> list[dict[str, Any]]:
    """Return parameters with and without weight decay, for the optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": params, "weight_decay": decay}
        for params, decay in (
            ([p for p in trained if p.dim() > 1], optimization.weight_decay),
            ([p for p in trained if p.dim() <= 1], 0.0),
        )
        if params
    ]


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the distinct parameters and the persistent buffers."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
