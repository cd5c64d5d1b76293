"""Expert Threshold models in vLLM's layers: paged attention, tensor, pipeline, expert parallelism.

The same computation as `megatron_ext/hf/remote/modeling_et.py`, which is its reference.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.activation import ReLUSquaredActivation, SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
from megatron_ext.vllm.experts import grouped_experts, loop_over_experts, route

# Names of projections in a folder, and the parameter and the part of it that they become.
_PARTS: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@torch.library.custom_op("megatron_et::experts", mutates_args=())
def _experts(
    tokens: Tensor,
    weights: Tensor,
    routing_map: Tensor,
    up: Tensor,
    down: Tensor,
    gated: bool,
    max_fan_out: int,
) -> Tensor:
    """Return the sum over experts; one operation to torch.compile, which sees no shapes in it."""
    if tokens.device.type == "cpu":
        return loop_over_experts(tokens, weights, routing_map, up, down, gated)
    # Runs that measure memory use made-up tokens, which may be routed to any number of experts.
    if not is_forward_context_available() or get_forward_context().attn_metadata is None:
        max_fan_out = routing_map.shape[1]
    return grouped_experts(tokens, weights, routing_map, up, down, gated, max_fan_out)


@_experts.register_fake
def _(
    tokens: Tensor,
    weights: Tensor,
    routing_map: Tensor,
    up: Tensor,
    down: Tensor,
    gated: bool,
    max_fan_out: int,
) -> Tensor:
    return torch.empty_like(tokens)


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


class StackedExperts(nn.Module):
    """First and second projections of all local experts of a layer."""

    def __init__(self, experts: int, inner: int, hidden: int, gated: bool) -> None:
        super().__init__()
        up = torch.empty(experts, inner * (1 + gated), hidden)
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, hidden, inner), requires_grad=False)


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
        self.max_fan_out = experts if dummy else (config.max_fan_out or experts)
        self.router_gate = config.router_gate
        self.gate = ExpertThresholdGate(experts, config.hidden_size)
        self.experts = StackedExperts(local_experts, local_inner, config.hidden_size, self.gated)
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
        output = torch.ops.megatron_et.experts(
            x,
            weights[:, self.local],
            routing_map[:, self.local],
            self.experts.up,
            self.experts.down,
            self.gated,
            self.max_fan_out,
        )
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
            self.q_norm = _norm(config, size)
            self.k_norm = _norm(config, size)
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
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = ExpertThresholdAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        self.mlp: nn.Module
        if config.moe_layers[extract_layer_index(prefix)]:
            self.mlp = ExpertThresholdMoE(config, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = ExpertThresholdMLP(config, config.intermediate_size, True, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Return the output of the layer for `x` `[tokens, hidden]`."""
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def _norm(config: ExpertThresholdConfig, size: int) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, has_weight=config.norm_scale)


@support_torch_compile
class ExpertThresholdModel(nn.Module):
    """Decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ExpertThresholdConfig = vllm_config.model_config.hf_config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens: nn.Module = PPMissingLayer()
        self.embedding_norm: RMSNorm | None = None
        if first or (config.tie_word_embeddings and last):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embedding_norm = RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps, has_weight=False
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: ExpertThresholdLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = _norm(config, config.hidden_size) if last else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of `input_ids` `[tokens]`, before their norm."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states `[tokens, hidden]`, for the head or for the next stage."""
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            x = inputs_embeds
            if self.embedding_norm is not None:
                x = self.embedding_norm(x)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(positions, x)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)


class ExpertThresholdForCausalLM(nn.Module, SupportsPP):
    """Decoder with its head."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ExpertThresholdConfig = vllm_config.model_config.hf_config
        if vllm_config.quant_config is not None:
            raise ValueError(
                "Expert Threshold models cannot be served quantized. Remove --quantization."
            )
        parallel = vllm_config.parallel_config
        if parallel.data_parallel_size > 1 and parallel.enable_expert_parallel:
            raise ValueError(
                "Expert Threshold models do not divide experts over data-parallel ranks. Remove "
                "--enable-expert-parallel, or start one server per replica."
            )
        self.config = config
        # On CPUs vLLM packs the head's weight, and packs it again only if it is loaded again: a
        # head that is tied there keeps the weights of the first load.
        self.tied = config.tie_word_embeddings and not current_platform.is_cpu()
        self.model = ExpertThresholdModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            self.lm_head = head.tie_weights(self.model.embed_tokens) if self.tied else head
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=config.logit_softcap or None
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of `input_ids` `[tokens]`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return hidden states `[tokens, hidden]`, for the head or for the next stage."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits, `[tokens, vocab]`, on the ranks that sample."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors of a Hugging Face folder, at the start or again.

        Args:
            weights: Names, as in the folder, and tensors, in any order.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: The thresholds were never updated, or a tensor is unknown.
        """
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, tensor in weights:
            if name.endswith(".threshold_updates") and not int(tensor):
                raise ValueError(
                    f"The thresholds of the model were never updated ({name} is 0). Train it for "
                    "at least one step, or set them with tools.calibrate_thresholds."
                )
            if name.endswith((".threshold_average", ".threshold_updates")):
                continue  # state of training
            for name_of_use in self._uses(name):
                if is_pp_missing_parameter(name_of_use, self):
                    continue
                target, arguments = self._parameter_name(name_of_use)
                if target not in params:
                    raise ValueError(f"The model has no parameter for the tensor {name}.")
                loader = getattr(params[target], "weight_loader", default_weight_loader)
                loader(params[target], tensor, *arguments)
                loaded.add(target)
        return loaded

    def _uses(self, name: str) -> list[str]:
        """Return the names under which a tensor is loaded."""
        if self.config.tie_word_embeddings:
            if name == "lm_head.weight":
                return []
            if name == "model.embed_tokens.weight" and not self.tied:
                return [name, "lm_head.weight"]
        return [name]

    def _parameter_name(self, name: str) -> tuple[str, tuple[str | int, ...]]:
        """Return the parameter of a tensor and what its loader needs to know about the tensor."""
        block, *rest = name.split(".experts.")
        if rest:  # MODULE.experts.NUMBER.PROJECTION.weight
            expert, projection, _ = rest[0].split(".")
            part = "down" if projection == "down_proj" else "up"
            return f"{block}.experts.{part}", (projection, int(expert))
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if projection in _PARTS and (self.config.gated_mlp or projection != "up_proj"):
            packed, slot = _PARTS[projection]
            return f"{parent}.{packed}.{kind}", (slot,)
        return name, ()
