"""Layer specifications: which modules make up the decoder's layers."""

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_ext import patches
from megatron_ext.config import ETConfig, linear_attention_pattern, mamba_pattern
from megatron_ext.model.attention import SDPAttention
from megatron_ext.model.cached_layer import AttentionLayer, CachedSelfAttention, FeedForwardLayer
from megatron_ext.model.gated_delta_net import CachedGatedDeltaNet
from megatron_ext.model.layer_stack import LayerStack
from megatron_ext.model.mamba import CachedMambaMixer
from megatron_ext.model.multi_token_prediction import prediction_spec
from megatron_ext.model.norm import RMSNorm
from megatron_ext.moe.layer import VariableFanOutMoELayer


def layer_stack_spec(config: ETConfig) -> ModuleSpec:
    """Return the specification of the decoder, on Transformer Engine or torch."""
    use_te = config.transformer_impl == "transformer_engine"
    assert not use_te or HAVE_TE
    backend: BackendSpecProvider = TESpecProvider() if use_te else LocalSpecProvider()
    submodules = HybridStackSubmodules(
        attention_layer=_attention(config, backend, use_te),
        mlp_layer=_feed_forward(_mlp(backend)),
    )
    if any(linear_attention_pattern(config)):
        patches.apply("gated delta net")
        submodules.gdn_layer = _recurrent(_gated_delta_net(backend))
    if any(mamba_pattern(config)):
        patches.apply("mamba")
        submodules.mamba_layer = _recurrent(_mamba(backend))
    if config.num_moe_experts is not None:
        submodules.moe_layer = _feed_forward(_experts(config, backend))
    if config.mtp_num_layers:
        patches.apply("multi-token prediction")
        submodules.mtp_block_spec = prediction_spec(backend, submodules)
    return ModuleSpec(module=LayerStack, submodules=submodules)


def _attention(config: ETConfig, backend: BackendSpecProvider, use_te: bool) -> ModuleSpec:
    # Without a scale, normalizing queries and keys before the rotation is the same as after it.
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=AttentionLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=backend.core_attention() if use_te else SDPAttention,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _recurrent(layer: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=AttentionLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm, self_attention=layer, self_attn_bda=get_bias_dropout_add
        ),
    )


def _gated_delta_net(backend: BackendSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=CachedGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column_parallel_linear(),
            out_norm=RMSNorm,
            out_proj=backend.row_parallel_linear(),
        ),
    )


def _mamba(backend: BackendSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=CachedMambaMixer,
        submodules=MambaMixerSubmodules(
            in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
        ),
    )


def _feed_forward(mlp: Any) -> ModuleSpec:
    return ModuleSpec(
        module=FeedForwardLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=RMSNorm, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )


def _mlp(backend: BackendSpecProvider) -> Any:
    submodules = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    return partial(MLP.as_mlp_submodule, submodules=submodules)


def _experts(config: ETConfig, backend: BackendSpecProvider) -> Any:
    spec = get_moe_module_spec_for_backend(backend, config.num_moe_experts, config.moe_grouped_gemm)
    experts: MoESubmodules = spec.keywords["submodules"]
    experts.router = config.router.load()
    if config.router.variable_fan_out:
        return partial(VariableFanOutMoELayer, submodules=experts)
    return spec
