"""Expert Threshold models (arXiv 2603.11535) for transformers: inference and fine-tuning.

An expert takes the tokens whose router logit exceeds its threshold, independently of the other
tokens in the batch. Thresholds are constant.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from .configuration_et import ExpertThresholdConfig

LINEAR = "linear_attention"

GATES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "relu": F.relu,
}


class ExpertThresholdRMSNorm(nn.Module):
    """RMSNorm over the last dimension, with a scale if the configuration has `norm_scale`."""

    def __init__(self, config: ExpertThresholdConfig, size: int) -> None:
        super().__init__()
        self.shape, self.eps = (size,), config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size)) if config.norm_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input."""
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ExpertThresholdConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, True
        q, kv = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, config.hidden_size, bias=False)
        self.q_norm = (
            ExpertThresholdRMSNorm(config, self.head_dim) if config.qk_norm else nn.Identity()
        )
        self.k_norm = (
            ExpertThresholdRMSNorm(config, self.head_dim) if config.qk_norm else nn.Identity()
        )

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output of the block for `x` `[batch, length, hidden]`."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        context, _ = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(context.reshape(batch, length, -1))


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464): a layer whose state does not grow with the sequence."""

    def __init__(self, config: ExpertThresholdConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.kernel = layer_idx, config.linear_conv_kernel_dim
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        heads, hidden = config.linear_num_value_heads, config.hidden_size
        self.group = heads // config.linear_num_key_heads
        keys, values = config.linear_num_key_heads * self.key_dim, heads * self.value_dim
        self.sizes = [keys, keys, values]
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden, size, bias=False) for size in self.sizes
        )
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Conv1d(size, size, self.kernel, groups=size, bias=False) for size in self.sizes
        )
        self.z_proj = nn.Linear(hidden, values, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.norm = ExpertThresholdRMSNorm(config, self.value_dim)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        past_key_values: Cache | None,
        padding_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output of the block for `x` `[batch, length, hidden]`.

        Tokens whose `padding_mask` `[batch, length]` is 0 do not change the state.
        """
        length = x.shape[1]
        if padding_mask is not None:
            x = x * padding_mask.unsqueeze(-1).to(x.dtype)
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).transpose(1, 2)
        state = None
        if past_key_values is not None:
            memory = past_key_values.layers[self.layer_idx]
            state = memory.recurrent_states[0] if memory.has_previous_state[0] else None
            mixed = past_key_values.update_conv_state(
                mixed, self.layer_idx, conv_kernel_size=self.kernel
            )
        weight = torch.cat([self.q_conv.weight, self.k_conv.weight, self.v_conv.weight])
        mixed = F.conv1d(F.pad(mixed, (self.kernel - 1, 0)), weight, groups=len(weight))
        mixed = F.silu(mixed[..., -length:]).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(
            mixed.split(self.sizes, dim=-1), (self.key_dim, self.key_dim, self.value_dim)
        ))  # fmt: skip
        q, k = (part.repeat_interleave(self.group, dim=2) for part in (q, k))
        decay = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)
        rule = torch_recurrent_gated_delta_rule if length == 1 else torch_chunk_gated_delta_rule
        output, state = rule(
            *(q, k, v),
            g=decay,
            beta=self.b_proj(x).sigmoid(),
            initial_state=state,
            output_final_state=past_key_values is not None,
            use_qk_l2norm_in_kernel=True,
        )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        gate = F.silu(self.z_proj(x).float()).unflatten(-1, (-1, self.value_dim))
        return self.o_proj((self.norm(output) * gate).to(x.dtype).flatten(2))


class MLP(nn.Module):
    """Feed-forward block: SwiGLU, or squared ReLU without a gate projection."""

    def __init__(self, config: ExpertThresholdConfig, size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate_proj = nn.Linear(hidden, size, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the output of the block, scaled by `weight` `[tokens, 1]`."""
        up = self.up_proj(x)
        inner = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        if weight is not None:
            inner = inner * weight.to(inner.dtype)
        return self.down_proj(inner)


class Router(nn.Module):
    """Router by thresholds.

    Routing depends on `thresholds`. `threshold_average` and `threshold_updates` are the state of
    the estimate from which they are computed and with which training resumes. All are fp32
    or int64, whatever the data type of the model.
    """

    thresholds: Tensor
    threshold_average: Tensor
    threshold_updates: Tensor

    def __init__(self, config: ExpertThresholdConfig) -> None:
        super().__init__()
        experts = config.num_experts
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        self.register_buffer("thresholds", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("threshold_average", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        self.gate = GATES[config.router_gate]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, fp32, and the routing map, bool, both `[tokens, experts]`."""
        logits = F.linear(x.float(), self.weight.float())
        return self.gate(logits), logits > self.thresholds

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        buffers = {name: getattr(self, name) for name in ("thresholds", "threshold_average")}
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:  # follow the device, not the dtype
                setattr(self, name, before.to(now.device) if not before.is_meta else now.float())
        return self


class MoE(nn.Module):
    """Mixture-of-experts block with an optional shared expert."""

    def __init__(self, config: ExpertThresholdConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        # A dictionary, as vLLM replaces every list called experts by a layer of fixed fan-out.
        self.experts = nn.ModuleDict(
            {str(n): MLP(config, config.moe_intermediate_size) for n in range(config.num_experts)}
        )
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block for `x` `[batch, length, hidden]`."""
        tokens = x.view(-1, x.shape[-1])
        weights, routing_map = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts.values()):
            chosen = routing_map[:, number].nonzero().squeeze(1)
            # In training, all data-parallel ranks must have gradients of the same experts.
            if chosen.numel() or self.training:
                weight = weights[chosen, number].unsqueeze(1)
                output.index_add_(0, chosen, expert(tokens[chosen], weight))
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        return output.view(x.shape)


class DecoderLayer(nn.Module):
    """Decoder layer: attention or Gated DeltaNet, then a dense or mixture-of-experts block."""

    def __init__(self, config: ExpertThresholdConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = ExpertThresholdRMSNorm(config, config.hidden_size)
        linear = config.layer_types is not None and config.layer_types[layer_idx] == LINEAR
        self.self_attn = (
            GatedDeltaNet(config, layer_idx) if linear else Attention(config, layer_idx)
        )
        self.post_attention_layernorm = ExpertThresholdRMSNorm(config, config.hidden_size)
        moe = config.moe_layers[layer_idx]
        self.mlp = MoE(config) if moe else MLP(config, config.intermediate_size)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the output of the layer; `kwargs` are those of its first block."""
        x = x + self.self_attn(self.input_layernorm(x), **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


class ExpertThresholdPreTrainedModel(PreTrainedModel):
    """Base class of Expert Threshold models in transformers."""

    config_class = ExpertThresholdConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["thresholds", "threshold_average"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class ExpertThresholdModel(ExpertThresholdPreTrainedModel):
    """Decoder without its head."""

    def __init__(self, config: ExpertThresholdConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = ExpertThresholdRMSNorm(config, config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states; `kwargs` are passed to the attention function."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(cached, cached + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        padding_mask = None
        if self.config.layer_types is not None and self.config._attn_implementation == "vllm":
            raise ValueError(
                "vLLM does not serve Expert Threshold models with Gated DeltaNet layers"
            )
        if attention_mask is not None and self.config.layer_types is not None:
            if attention_mask.dim() != 2:
                raise ValueError("a model with Gated DeltaNet layers needs a mask [batch, length]")
            padding_mask = attention_mask[:, -x.shape[1] :]
        rotary = self.rotary_emb(x, position_ids)
        if self.config.embedding_norm:
            x = F.rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps)
        for layer in self.layers:
            x = layer(
                x,
                position_embeddings=rotary,
                attention_mask=mask,
                padding_mask=padding_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class ExpertThresholdForCausalLM(ExpertThresholdPreTrainedModel, GenerationMixin):
    """Decoder with its head: logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ExpertThresholdConfig) -> None:
        super().__init__(config)
        self.model = ExpertThresholdModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits and, with labels, the loss, as transformers' models do."""
        output = self.model(input_ids=input_ids, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        if cap := self.config.logit_softcap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )
