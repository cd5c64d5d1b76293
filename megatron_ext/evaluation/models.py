"""Models to evaluate: checkpoints of this project with any layout, and Hugging Face folders.

Call `activate` of `megatron_ext.devices` before importing this module.
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
from megatron_ext.evaluation.text_codec import TextCodec
from megatron_ext.hf.families import OWN
from megatron_ext.inference.forward import target_log_probs
from megatron_ext.inference.loading import ParallelLayout, TrainedModel, load_model
from megatron_ext.model_location import announced, locate_model


class MegatronModel(LanguageModel):
    """Checkpoint of this project. Every data-parallel rank is a replica."""

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
        # Other routers do not support a mask and treat padding like any token.
        self._masks = getattr(trained.model.config, "uses_thresholds", False)

    def log_probs(self, batch: ScoringBatch) -> Tensor | None:
        """Compute log-probabilities; see `LanguageModel`."""
        padding = batch.padding if self._masks else None
        return target_log_probs(self.trained, batch.tokens, batch.places, batch.targets, padding)


class HuggingFaceModel(LanguageModel):
    """Hugging Face folder that transformers loads. Every rank is a replica."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Load the model and its tokenizer.

        Args:
            folder: Hugging Face folder.
            dtype: Data type of the weights. Default: that of the folder on a GPU, fp32 on a CPU.

        Raises:
            UserError: transformers cannot load the folder.
        """
        load_dtype: Any = dtype or (torch.float32 if is_cpu_device() else "auto")
        try:
            self.codec = TextCodec(of_transformers=_tokenizer_class(folder).from_pretrained(folder))
            self._model = _model_class(folder).from_pretrained(folder, dtype=load_dtype).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"transformers cannot load {folder}: {error}. Give a complete Hugging Face folder."
            ) from error
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
        """Compute log-probabilities; see `LanguageModel`."""
        logits = self._model(input_ids=batch.tokens, use_cache=False).logits
        logits = logits.flatten(0, 1)[batch.places].float()  # [n, vocabulary]
        targets = logits.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        likeliest = logits.argmax(dim=-1) == batch.targets
        return torch.stack([targets - logits.logsumexp(dim=-1), likeliest.float()])


def load(
    path: str | os.PathLike[str],
    layout: ParallelLayout | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_model: str | None = None,
) -> LanguageModel:
    """Load a checkpoint or a Hugging Face folder. Every rank must call it.

    Args:
        path: Run directory, folder of checkpoints, folder of one iteration, or Hugging Face folder;
            see `megatron_ext.model_location.locate_model`.
        layout: Parallel sizes of a checkpoint.
        dtype: Data type of the weights. Default: that of training on a GPU, fp32 on a CPU.
        tokenizer_model: File or folder of a checkpoint's tokenizer. Default: the one that training
            used.

    Raises:
        UserError: The model cannot be loaded, or not with this layout.
    """
    location = locate_model(path)
    folder = announced(location)
    if location.kind == "megatron":
        trained = load_model(folder, layout, dtype=dtype, tokenizer_model=tokenizer_model)
        return MegatronModel(trained)
    if (layout or ParallelLayout()) != ParallelLayout():
        raise UserError(
            f"{folder} is a Hugging Face folder, which every rank loads completely. Remove the "
            "parallel sizes, or convert it to a checkpoint."
        )
    return HuggingFaceModel(folder, dtype)


def _is_own(folder: Path) -> bool:
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(folder)[0].get("model_type") == OWN.name


def _model_class(folder: Path) -> Any:
    """Return the class of a model; Expert Threshold models use the installed code."""
    if _is_own(folder):
        from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM

        return ExpertThresholdForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _tokenizer_class(folder: Path) -> Any:
    has_sentencepiece = (folder / "tokenization_et.py").is_file()
    if _is_own(folder) and has_sentencepiece:
        from megatron_ext.hf.remote.tokenization_et import ExpertThresholdTokenizer

        return ExpertThresholdTokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer
