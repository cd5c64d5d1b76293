"""Layers of Expert Threshold models in vLLM: attention, feed-forward and mixture-of-experts blocks.

They compute the same as the layers of `megatron_ext/hf/remote/modeling_et.py`.
"""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import ReLUSquaredActivation, SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
from megatron_ext.vllm.experts import route
from megatron_ext.vllm.stacked_experts import StackedExperts


class ExpertThresholdMLP(nn.Module):
    """Feed-forward block: SwiGLU, or squared ReLU without a gate projection."""

    def __init__(
        self, config: ExpertThresholdConfig, size: int, reduce_results: bool, prefix: str
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        if config.gated_mlp:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
            )
        else:
            self.up_proj = ColumnParallelLinear(
                hidden, size, bias=False, prefix=f"{prefix}.up_proj"
            )
        self.gated = config.gated_mlp
        self.act = SiluAndMul() if config.gated_mlp else ReLUSquaredActivation()
        self.down_proj = RowParallelLinear(
            size, hidden, bias=False, reduce_results=reduce_results, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block for `x` `[tokens, hidden]`."""
        inner, _ = (self.gate_up_proj if self.gated else self.up_proj)(x)
        return self.down_proj(self.act(inner))[0]


class ExpertThresholdGate(nn.Module):
    """Weight `[experts, hidden]` and thresholds `[experts]` of a router."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden), requires_grad=False)
        # A parameter, as vLLM reloads no buffers; fp32, whatever the data type of the model.
        thresholds = torch.empty(experts, dtype=torch.float32)
        self.thresholds = nn.Parameter(thresholds, requires_grad=False)


class ExpertThresholdMoE(nn.Module):
    """Mixture-of-experts block with an optional shared expert.

    Each rank has a slice of every expert or, with expert parallelism, whole experts. The ranks'
    sums, that of the shared expert included, are added in one reduction.
    """

    def __init__(self, config: ExpertThresholdConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.ranks, self.gated = ranks, config.gated_mlp
        self.whole_experts = vllm_config.parallel_config.enable_expert_parallel
        experts, inner = config.num_experts, config.moe_intermediate_size
        divided, name = (experts, "num_experts") if self.whole_experts else (inner, "inner size")
        if divided % ranks:
            raise ValueError(
                f"The experts' {name} {divided} is not divisible by --tensor-parallel-size "
                f"{ranks}. Choose a divisor of it."
            )
        share = divided // ranks
        self.local = slice(rank * share, (rank + 1) * share) if self.whole_experts else slice(None)
        local_experts = share if self.whole_experts else experts
        local_inner = inner if self.whole_experts else share
        # The dummy weights of --load-format dummy are routed to half of all experts.
        dummy = vllm_config.load_config.load_format == "dummy"
        max_fan_out = experts if dummy else (config.max_fan_out or experts)
        self.router_gate = config.router_gate
        self.gate = ExpertThresholdGate(experts, config.hidden_size)
        self.experts = StackedExperts(
            local_experts, local_inner, config.hidden_size, self.gated, max_fan_out
        )
        self.experts_name = f"{prefix}.experts"
        vllm_config.compilation_config.static_forward_context[self.experts_name] = self.experts
        for parameter in self.experts.parameters():
            set_weight_attrs(parameter, {"weight_loader": self.load_expert})
        shared = config.shared_expert_intermediate_size
        self.shared_expert = (
            ExpertThresholdMLP(config, shared, False, f"{prefix}.shared_expert") if shared else None
        )

    def load_expert(
        self, param: nn.Parameter, loaded_weight: Tensor, projection: str, expert: int
    ) -> None:
        """Copy this rank's part of one projection of one expert.

        Args:
            param: The parameter of all local experts.
            loaded_weight: The whole projection, as a folder has it.
            projection: "gate_proj", "up_proj" or "down_proj".
            expert: Number of the expert in the model.
        """
        if self.whole_experts:
            expert -= self.local.start
            if not 0 <= expert < param.shape[0]:
                return
        target, dim = param.data[expert], 1 if projection == "down_proj" else 0
        if self.gated and dim == 0:
            target = target.chunk(2)[projection == "up_proj"]
        if not self.whole_experts:
            size = target.shape[dim]
            start = get_tensor_model_parallel_rank() * size
            loaded_weight = loaded_weight.narrow(dim, start, size)
        target.copy_(loaded_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block for `x` `[tokens, hidden]`."""
        weights, routing_map = route(x, self.gate.weight, self.gate.thresholds, self.router_gate)
        if self.whole_experts:
            weights, routing_map = weights[:, self.local], routing_map[:, self.local]
        if torch.compiler.is_compiling():
            output = torch.ops.megatron_et.experts(x, weights, routing_map, self.experts_name)
        else:  # without the operation's overhead
            output = self.experts(x, weights, routing_map)
        if self.shared_expert is not None:
            output = output + self.shared_expert(x)
        return tensor_model_parallel_all_reduce(output) if self.ranks > 1 else output


class ExpertThresholdAttention(nn.Module):
    """Grouped-query attention with rotary positions and vLLM's paged cache."""

    def __init__(self, config: ExpertThresholdConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        size, heads, groups = (
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            heads,
            groups,
            bias=config.qkv_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * size, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        if current_platform.is_cpu() and size not in CPUAttentionBackend.get_supported_head_sizes():
            raise ValueError(
                f"vLLM's attention on CPUs has no heads of size {size} (head_dim in config.json), "
                f"only {CPUAttentionBackend.get_supported_head_sizes()}. Serve the model on a GPU, "
                "or with tools.serve."
            )
        self.head_dim = size
        self.heads, self.groups = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = rms_norm(config, size)
            self.k_norm = rms_norm(config, size)
        self.rotary_emb = get_rope(
            size,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.attn = Attention(
            self.heads,
            size,
            size**-0.5,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Return the output for `x` `[tokens, hidden]` at `positions` `[tokens]`."""
        qkv, _ = self.qkv_proj(x)
        sizes = [self.heads * self.head_dim, *2 * [self.groups * self.head_dim]]
        q, k, v = qkv.split(sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.heads, self.head_dim)).flatten(1)
            k = self.k_norm(k.reshape(-1, self.groups, self.head_dim)).flatten(1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class ExpertThresholdLayer(nn.Module):
    """Decoder layer: attention, then a dense or mixture-of-experts block."""

    def __init__(self, config: ExpertThresholdConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = rms_norm(config, config.hidden_size)
        self.self_attn = ExpertThresholdAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = rms_norm(config, config.hidden_size)
        self.mlp: nn.Module
        if config.moe_layers[extract_layer_index(prefix)]:
            self.mlp = ExpertThresholdMoE(config, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = ExpertThresholdMLP(config, config.intermediate_size, True, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Return the output of the layer for `x` `[tokens, hidden]`."""
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def rms_norm(config: ExpertThresholdConfig, size: int) -> RMSNorm:
    """Return a norm over `size` elements, with a weight if the model's norms have one."""
    return RMSNorm(size, eps=config.rms_norm_eps, has_weight=config.norm_scale)
