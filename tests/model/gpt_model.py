"""Megatron's deprecated `GPTModel` of the same layers, with which earlier releases trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tests.training.layouts as layouts


@contextmanager
def gpt_model() -> Iterator[None]:
    """Build `GPTModel` in place of this project's model, with the same names and settings."""
    from megatron_ext.model.hybrid import LanguageModelConfig

    builder, LanguageModelConfig.builder = LanguageModelConfig.builder, f"{__name__}.gpt_builder"
    try:
        yield
    finally:
        LanguageModelConfig.builder = builder


def gpt_builder(settings: Any) -> Any:
    """Return a builder of pipeline stages."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        get_transformer_layer_offset,
    )
    from megatron.training.models.hybrid import HybridModelBuilder
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from megatron_ext.config import moe_layer_pattern
    from megatron_ext.model.norm import RMSNorm

    config, stack = settings.transformer, settings.hybrid_stack_spec.submodules

    def layer(moe: bool) -> ModuleSpec:
        half = (stack.moe_layer if moe else stack.mlp_layer).submodules
        whole = replace(
            stack.attention_layer.submodules,
            pre_mlp_layernorm=half.pre_mlp_layernorm,
            mlp=half.mlp,
            mlp_bda=half.mlp_bda,
        )
        return ModuleSpec(module=TransformerLayer, submodules=whole)

    class Builder(HybridModelBuilder):
        def build_model(
            self, pg_collection: Any, pre_process: Any, post_process: Any, vp_stage: Any = None
        ) -> GPTModel:
            first = get_transformer_layer_offset(config, vp_stage=vp_stage)
            layers = [layer(moe) for moe in moe_layer_pattern(config)]
            layers = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
            rows = settings.make_vocab_size_divisible_by, config.tensor_model_parallel_size
            return GPTModel(
                config=config,
                transformer_layer_spec=TransformerBlockSubmodules(layers, RMSNorm),
                vocab_size=calculate_padded_vocab_size(settings.vocab_size, *rows),
                max_sequence_length=settings.seq_length,
                pre_process=pre_process,
                post_process=post_process,
                share_embeddings_and_output_weights=settings.share_embeddings_and_output_weights,
                position_embedding_type=settings.position_embedding_type,
                rotary_percent=settings.rotary_percent,
                rotary_base=settings.rotary_base,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )

    return Builder(settings)


def _pretrain(flags: list[str]) -> None:
    with gpt_model():
        layouts._pretrain(flags)


def train_gpt_model(run_dir: Path, layout: layouts.Layout, *flags: str) -> list[Any]:
    """Train `GPTModel` as `layouts.train` does, with checkpoints, and return the training rows."""
    return layouts.train(run_dir, layout, *flags, save=True, pretrain=_pretrain)
