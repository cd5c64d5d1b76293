"""Layer specifications: which modules make up the decoder's layers."""

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.config import ETConfig, moe_layer_pattern
from megatron_ext.model.attention import SDPAttention
from megatron_ext.model.cached_layer import CachedSelfAttention, CachedTransformerLayer
from megatron_ext.model.norm import RMSNorm
from megatron_ext.moe.layer import VariableFanOutMoELayer


def decoder_block_spec(config: ETConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage, on Transformer Engine or torch."""
    use_te = config.transformer_impl == "transformer_engine"
    assert not use_te or HAVE_TE
    backend: BackendSpecProvider = TESpecProvider() if use_te else LocalSpecProvider()
    core_attention = backend.core_attention() if use_te else SDPAttention
    kinds = {
        moe: _layer_spec(config, backend, core_attention, _mlp(config, backend, moe))
        for moe in set(moe_layer_pattern(config))
    }
    layers = [kinds[moe] for moe in moe_layer_pattern(config)]
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[offset : offset + count], layer_norm=RMSNorm
    )


def _mlp(config: ETConfig, backend: BackendSpecProvider, moe: bool) -> Any:
    if not moe:
        submodules = MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
        )
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    spec = get_moe_module_spec_for_backend(backend, config.num_moe_experts, config.moe_grouped_gemm)
    experts: MoESubmodules = spec.keywords["submodules"]
    experts.router = config.router.load()
    if config.router.variable_fan_out:
        return partial(VariableFanOutMoELayer, submodules=experts)
    return spec


def _layer_spec(
    config: ETConfig, backend: BackendSpecProvider, core_attention: type, mlp: Any
) -> ModuleSpec:
    # Without a scale, normalizing queries and keys before the rotation is the same as after it.
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=CachedTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=core_attention,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
