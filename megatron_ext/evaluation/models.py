"""Models to evaluate: checkpoints of this project in any layout, and Hugging Face folders.

`activate` of `megatron_ext.devices` must have been called before this module is imported.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.devices import is_cpu_device
from megatron_ext.errors import UserError
from megatron_ext.evaluation.log_likelihoods import DataReplicas, LanguageModel, ScoringBatch
from megatron_ext.evaluation.text_losses import TextCodec
from megatron_ext.inference.forward import target_log_probs
from megatron_ext.inference.loading import ParallelLayout, TrainedModel, load_model


class MegatronModel(LanguageModel):
    """A checkpoint of this project. Every data-parallel rank is a copy."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained
        tokenizer, groups = trained.tokenizer, trained.groups
        if trained.args.tokenizer_type == "HuggingFaceTokenizer":
            self.codec = TextCodec(of_transformers=tokenizer._tokenizer.tokenizer)
        else:
            self.codec = TextCodec(of_megatron=tokenizer)
        self.max_length = trained.max_length
        self.replicas = DataReplicas(groups.dp.rank(), groups.dp.size(), groups.ep.size() > 1)
        self.description = {
            "model": str(trained.checkpoint.resolve()),
            "iteration": trained.iteration,
            "dtype": str(trained.args.params_dtype).removeprefix("torch."),
        }
        # Routers of other kinds take no mask; to them padding is a token among others.
        self._masks = getattr(trained.model.config, "uses_thresholds", False)

    def log_probs(self, batch: ScoringBatch) -> Tensor | None:
        padding = batch.padding if self._masks else None
        return target_log_probs(self.trained, batch.tokens, batch.places, batch.targets, padding)


class HuggingFaceModel(LanguageModel):
    """A folder that transformers loads. Every rank is a copy.

    Raises:
        UserError: transformers cannot load it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        wanted: Any = dtype or (torch.float32 if is_cpu_device() else "auto")
        try:
            self.codec = TextCodec(of_transformers=_tokenizer_class(folder).from_pretrained(folder))
            self._model = _model_class(folder).from_pretrained(folder, dtype=wanted).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"transformers cannot load {folder}: {error}") from error
        self.max_length = getattr(self._model.config, "max_position_embeddings", None) or 2048
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1 and not dist.is_initialized():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("gloo" if is_cpu_device() else "nccl")
        self._model.to(torch.cuda.current_device())
        self.replicas = DataReplicas(int(os.environ.get("RANK", "0")), ranks)
        self.description = {
            "model": str(folder.resolve()),
            "iteration": None,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def log_probs(self, batch: ScoringBatch) -> Tensor | None:
        logits = self._model(input_ids=batch.tokens, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.places].float()  # [n, vocabulary]
        wanted = logits.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        likeliest = logits.argmax(dim=-1) == batch.targets
        return torch.stack([wanted - logits.logsumexp(dim=-1), likeliest.float()])


def load(
    path: str | os.PathLike[str],
    layout: ParallelLayout | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_model: str | None = None,
) -> LanguageModel:
    """Load what a path holds; every rank must call it.

    Args:
        path: a run directory, a folder of checkpoints or one of them, or a Hugging Face folder.
        layout: of a checkpoint.
        dtype: of the weights. Default: as trained on a GPU, fp32 on a CPU.
        tokenizer_model: where a checkpoint's tokenizer is, if not where it was in training.

    Raises:
        UserError: it cannot be loaded, or not in that layout.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        trained = load_model(folder, layout, dtype=dtype, tokenizer_model=tokenizer_model)
        return MegatronModel(trained)
    if (layout or ParallelLayout()) != ParallelLayout():
        raise UserError(f"{folder} is a Hugging Face folder: every rank holds all of it")
    return HuggingFaceModel(folder, dtype)


def _is_own(folder: Path) -> bool:
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(folder)[0].get("model_type") == "expert_threshold"


def _model_class(folder: Path) -> Any:
    """Our own models without running the code in their folder."""
    if _is_own(folder):
        from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM

        return ExpertThresholdForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _tokenizer_class(folder: Path) -> Any:
    own = (folder / "tokenization_et.py").is_file()
    if _is_own(folder) and own:
        from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer

        return ExpertThresholdTokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer
