"""Configuration of Expert Threshold models (arXiv 2603.11535) for transformers."""

from typing import Any

from transformers import PreTrainedConfig


class ExpertThresholdConfig(PreTrainedConfig):
    """Configuration of a decoder whose experts take the tokens above their thresholds.

    Args:
        moe_layers: For each layer, 1 if it has experts, else 0.
        gated_mlp: Whether feed-forward blocks are SwiGLU (`hidden_act` "silu"), and not squared
            ReLU ("relu2").
        norm_scale: Whether every RMSNorm has a learnable scale.
        qk_norm: Whether queries and keys are normalized before the rotation.
        embedding_norm: Whether embeddings are normalized, without a scale.
        logit_softcap: Bound c in c * tanh(logits / c); 0 for none.
        router_gate: Function from router logits to weights: "sigmoid", "softmax" or "relu".
        num_experts_per_tok: Mean fan-out, unless `mean_experts` is set.
        mean_experts: Mean fan-out if it is not an integer.
        threshold_estimator: Estimator of the thresholds, "ema" or "adaptive", for training.
        threshold_ema_decay: Decay of the moving average of the thresholds, for training.
        max_fan_out: Largest mean fan-out of a batch for which a server on a GPU reserves memory;
            None for the number of experts. It refuses batches above it, and one on a CPU warns.
        layer_types: For each layer, "full_attention", or "linear_attention" for a Gated DeltaNet
            layer; None if all layers have attention.
        linear_num_key_heads: Number of query and key heads of Gated DeltaNet layers.
        linear_num_value_heads: Number of their value heads.
        linear_key_head_dim: Size of their query and key heads.
        linear_value_head_dim: Size of their value heads.
        linear_conv_kernel_dim: Length of their convolution.
    """

    model_type = "expert_threshold"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        intermediate_size: int = 128,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        hidden_act: str = "relu2",
        gated_mlp: bool = False,
        norm_scale: bool = False,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        embedding_norm: bool = True,
        logit_softcap: float = 15.0,
        moe_layers: list[int] | None = None,
        num_experts: int = 8,
        moe_intermediate_size: int = 64,
        shared_expert_intermediate_size: int = 0,
        router_gate: str = "sigmoid",
        num_experts_per_tok: int = 1,
        mean_experts: float | None = None,
        threshold_estimator: str = "ema",
        threshold_ema_decay: float = 0.999,
        max_fan_out: int | None = None,
        layer_types: list[str] | None = None,
        linear_num_key_heads: int = 0,
        linear_num_value_heads: int = 0,
        linear_key_head_dim: int = 0,
        linear_value_head_dim: int = 0,
        linear_conv_kernel_dim: int = 0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        attention_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.norm_scale = norm_scale
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.embedding_norm = embedding_norm
        self.logit_softcap = logit_softcap
        self.moe_layers = moe_layers or [0] * num_hidden_layers
        self.num_experts = num_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router_gate = router_gate
        self.num_experts_per_tok = num_experts_per_tok
        self.mean_experts = mean_experts
        self.threshold_estimator = threshold_estimator
        self.threshold_ema_decay = threshold_ema_decay
        self.max_fan_out = max_fan_out
        self.layer_types = layer_types
        self.linear_num_key_heads = linear_num_key_heads
        self.linear_num_value_heads = linear_num_value_heads
        self.linear_key_head_dim = linear_key_head_dim
        self.linear_value_head_dim = linear_value_head_dim
        self.linear_conv_kernel_dim = linear_conv_kernel_dim
        self.use_cache = use_cache
        self.attention_dropout = attention_dropout
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def final_logit_softcapping(self) -> float | None:
        """Bound of the logits under the name by which vLLM's own head reads it."""
        return self.logit_softcap or None
