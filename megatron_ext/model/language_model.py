"""The language model: Megatron's, with our layers, embedding norm, softcap and initial weights."""

from argparse import Namespace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import activations
from megatron.training.argument_utils import hybrid_config_from_args
from torch import Tensor

from megatron_ext.config import ETConfig
from megatron_ext.devices import is_cpu_device
from megatron_ext.model.activation import squared_relu
from megatron_ext.model.hybrid import LanguageModel, LanguageModelConfig
from megatron_ext.model.initialization import initialize_parameters
from megatron_ext.model.layer_stack import hybrid_layer_pattern
from megatron_ext.model.specs import layer_stack_spec


def language_model_config(args: Namespace, config: ETConfig) -> LanguageModelConfig:
    """Return the configuration from which Megatron's trainer builds the model."""
    settings = hybrid_config_from_args(args, config, LanguageModelConfig)
    settings.hybrid_stack_spec = layer_stack_spec(config)
    settings.hybrid_layer_pattern = hybrid_layer_pattern(config)
    settings.rope_scaling = args.use_rope_scaling
    settings.rope_scaling_factor = args.rope_scaling_factor
    config.perform_initialization = False  # the hook below sets every parameter
    if config.activation_func is activations.squared_relu and is_cpu_device():
        config.activation_func = squared_relu  # on CUDA Megatron's own is compiled into one kernel
    # A model from Hugging Face may have more rows than its tokenizer has entries.
    rows = getattr(args, "hf_vocab_size", None) or args.vocab_size
    settings.pre_wrap_hooks = [partial(_finish_stages, seed=args.seed, vocab_size=rows)]
    return settings


def _finish_stages(stages: list[LanguageModel], seed: int, vocab_size: int) -> list[LanguageModel]:
    for model in stages:
        initialize_parameters(model, seed, vocab_size)
        config = model.config
        if config.et_embedding_norm and (model.pre_process or model.mtp_process):
            model.embedding.register_forward_hook(
                partial(_normalize_embedding, eps=config.layernorm_epsilon)
            )
        if model.post_process:
            rank = model.pg_collection.tp.rank()
            model.output_layer.register_forward_hook(
                partial(_finish_logits, cap=config.et_logit_softcap, rank=rank, size=vocab_size)
            )
    return stages


def _normalize_embedding(_: torch.nn.Module, inputs: Any, output: Tensor, eps: float) -> Tensor:
    return F.rms_norm(output, output.shape[-1:], eps=eps)


def _finish_logits(
    layer: Any,
    inputs: Any,
    output: tuple[Tensor, Tensor | None],
    cap: float,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor | None]:
    """Cap the logits `[sequence, batch, vocabulary of this rank or all]` and exclude padding.

    How many rows pad the vocabulary depends on the tensor-parallel size; the loss must not.
    """
    logits, bias = output
    if cap:
        logits = cap * torch.tanh(logits / cap)
    width = logits.shape[-1]
    start = rank * width if width < layer.output_size else 0  # inference gathers all of them
    real = max(0, size - start)
    if real < width:
        logits[..., real:] = -torch.inf
    return logits, bias
