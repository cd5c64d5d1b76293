"""Sampler with the weights that are being trained, without a copy of them.

Generation requires another model with the same tensors, because single tokens cannot be divided
along their sequence, and rows need no context parallelism.
"""

import copy
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import core_transformer_config_from_args

from alignment.engines.batch import TokenSample
from alignment.engines.protocol import GeneratedResponse
from alignment.engines.routing_gap import DecodedRouting, decode
from megatron_ext.config import ETConfig
from megatron_ext.inference.generation import generate
from megatron_ext.inference.loading import ParallelLayout, TrainedModel, for_inference
from megatron_ext.inference.plain_linear import simplify_linear_layers
from megatron_ext.inference.sampling import Sampling
from megatron_ext.model.language_model import language_model_config


class Sampler:
    """Sampler that generates with the weights of a model that is being trained."""

    def __init__(self, trained: torch.nn.Module, args: Namespace, tokenizer: Any) -> None:
        """Create a model for generation that uses the trained tensors.

        Args:
            trained: Stage of this rank, without wrappers.
            args: Megatron's arguments of the training.
            tokenizer: Megatron's tokenizer.
        """
        layout = ParallelLayout(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.expert_model_parallel_size,
            args.expert_tensor_parallel_size,
        )
        args = copy.copy(args)
        for_inference(args, layout, args.params_dtype)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self._context_group = groups.cp
        if groups.cp.size() > 1:
            groups.cp, _ = dist.new_subgroups(group_size=1)
        config: ETConfig = core_transformer_config_from_args(args, ETConfig)
        model_config = language_model_config(args, config)
        builder = model_config.get_builder_cls()(model_config)
        [module] = builder.build_distributed_models(
            groups, wrap_with_ddp=False, data_parallel_random_init=False
        )
        model = TrainedModel(module, tokenizer, args, Path(), 0)
        _share(trained, model.model)
        module.eval()
        simplify_linear_layers(module)
        self._model = model

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None
    ) -> list[GeneratedResponse]:
        """Continue prompts. Ranks that share rows in training divide the prompts among them."""
        seeds = range(len(prompts)) if seeds is None else seeds
        rank, size = self._context_group.rank(), self._context_group.size()
        share = slice(rank, None, size)
        completions = generate(self._model, list(prompts)[share], sampling, list(seeds)[share])
        responses = [
            GeneratedResponse(c.tokens, c.log_probs, c.finish != "length") for c in completions
        ]
        if size == 1:
            return responses
        parts: list[list[GeneratedResponse]] = [[] for _ in range(size)]
        dist.all_gather_object(parts, responses, group=self._context_group)
        return [parts[i % size][i // size] for i in range(len(prompts))]

    def decode(self, samples: Sequence[TokenSample], temperature: float) -> DecodedRouting:
        """Return the routing and log-probabilities that existing responses have in generation.

        Ranks that share rows in training each run all of them.
        """
        return decode(self._model, samples, temperature)


def _share(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Make a module use the tensors of another one with the same structure."""
    modules = dict(source.named_modules())
    for name, module in list(target.named_modules()):
        source_module = modules[name]
        assert module._parameters.keys() == source_module._parameters.keys(), name
        module._parameters, module._buffers = source_module._parameters, source_module._buffers
        for child, thresholds in source_module.named_children():
            if child == "thresholds":  # the module has more state than its tensors
                setattr(module, child, thresholds)
