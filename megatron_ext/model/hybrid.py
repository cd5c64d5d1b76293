"""Megatron's `HybridModel`, with what its deprecated `GPTModel` has and it lacks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.training.models import HybridModelConfig
from megatron.training.models.hybrid import HybridModelBuilder
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor

from megatron_ext.patches import patched


@dataclass(kw_only=True)
class LanguageModelConfig(HybridModelConfig):
    """Configuration of a `LanguageModel`.

    Attributes:
        rope_scaling: Whether rotary frequencies are scaled as in Llama 3.
        rope_scaling_factor: Factor of this scaling.
    """

    builder: ClassVar[str] = f"{__name__}.LanguageModelBuilder"
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0


class LanguageModel(HybridModel):
    """Language model of attention layers, MLPs and layers of experts."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        padding_mask: Tensor | None = None,
        output_processor: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run this pipeline stage; see Megatron's `HybridModel`.

        Args:
            input_ids: Token ids, int64 `[batch, sequence]`.
            position_ids: Positions, int64 `[batch, sequence]`.
            attention_mask: Sample of every token, see `SDPAttention`, or None.
            args: Further arguments of `HybridModel`.
            padding_mask: Mask, bool `[batch, sequence]`, True for tokens that routers skip.
            output_processor: Function that computes the output of the last stage in place of the
                output layer. Its arguments, by name, are `hidden_states`, `output_layer`,
                `output_weight` and `scale_logits`.
            kwargs: Further arguments of `HybridModel`.
        """
        if padding_mask is not None and self.config.sequence_parallel:
            padding_mask = scatter_to_sequence_parallel_region(
                padding_mask.T.contiguous(), group=self.pg_collection.tp
            ).T.contiguous()
        forward = partial(
            super().forward,
            *(input_ids, position_ids, attention_mask, *args),
            padding_mask=padding_mask,
            **kwargs,
        )
        if output_processor is None or not self.post_process:
            return forward()
        with patched(self, "post_process", False):  # return hidden states, as other stages do
            hidden_states = forward()
        tied = self.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=hidden_states,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            scale_logits=self._scale_logits,
        )

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the tensors under the names that Megatron's `GPTModel` gives them."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)  # not in its checkpoints
        assert not (extra and extra.data)
        return state


class LanguageModelBuilder(HybridModelBuilder):
    """Builder of the pipeline stages of a `LanguageModel`."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> LanguageModel:
        """Build one pipeline stage.

        Args:
            pg_collection: Process groups of the model.
            pre_process: Whether the stage has the embedding. Default: the first stage has it.
            post_process: Whether the stage has the output layer. Default: the last stage has it.
            vp_stage: Number of the virtual stage on this rank, if there are several.
        """
        settings = self._model_config
        assert isinstance(settings, LanguageModelConfig)
        config, rank, chunk = settings.transformer, pg_collection.pp, vp_stage
        chunks = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(chunk, chunks) and is_pp_first_stage(rank)
        if post_process is None:
            post_process = is_vp_last_stage(chunk, chunks) and is_pp_last_stage(rank)
        vocab_size = settings.vocab_size
        assert vocab_size is not None
        if settings.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size,
                settings.make_vocab_size_divisible_by,
                config.tensor_model_parallel_size,
            )
        # HybridModel refuses these next to a pattern of stages, which follows from them.
        with (
            patched(config, "num_layers_in_first_pipeline_stage", None),
            patched(config, "num_layers_in_last_pipeline_stage", None),
        ):
            model = LanguageModel(
                config=config,
                hybrid_stack_spec=settings.hybrid_stack_spec,
                vocab_size=vocab_size,
                max_sequence_length=settings.seq_length,
                hybrid_layer_pattern=settings.hybrid_layer_pattern,
                pre_process=pre_process,
                post_process=post_process,
                fp16_lm_cross_entropy=settings.fp16_lm_cross_entropy,
                parallel_output=settings.parallel_output,
                share_embeddings_and_output_weights=settings.share_embeddings_and_output_weights,
                position_embedding_type=settings.position_embedding_type,
                rotary_percent=settings.rotary_percent,
                rotary_base=settings.rotary_base,
                seq_len_interpolation_factor=settings.seq_len_interpolation_factor,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        if rotary := getattr(model, "rotary_pos_emb", None):
            rotary.rotary_interleaved = config.rotary_interleaved
            if settings.rope_scaling:
                rotary.inv_freq = rotary._apply_scaling(
                    rotary.inv_freq, factor=settings.rope_scaling_factor
                )
        return model


def load_replacements() -> dict[str, Any]:
    """Return the patch that loads the names of `GPTModel` as they are; see the patches table."""
    target = "megatron.training.checkpointing._maybe_setup_gpt_to_hybrid_load"
    return {target: lambda args, checkpoint_args, model: (None, False)}
