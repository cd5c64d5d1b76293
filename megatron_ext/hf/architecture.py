"""Description of a model's architecture, independent of Megatron and of Hugging Face families."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.model.identity import default_value, read_settings, setting_value
from megatron_ext.moe.registry import ROUTERS, router_type

# Megatron's RoPE scaling has Llama 3's constants built in; only the factor can be set.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Arguments of Megatron that correspond to fields of `Architecture`.
_TRANSLATED = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("group_query_attention", "ffn_hidden_size", "vocab_size", "max_position_embeddings"),
    *("layernorm_epsilon", "qk_layernorm", "add_qkv_bias", "swiglu", "squared_relu"),
    *("untie_embeddings_and_output_weights", "rotary_base"),
    *("use_rope_scaling", "rope_scaling_factor"),
    *("et_norm_scale", "et_embedding_norm", "et_logit_softcap"),
    *("num_experts", "router_type", "moe_layer_freq", "moe_ffn_hidden_size"),
    *("experimental_attention_variant", "linear_attention_freq", "linear_num_key_heads"),
    *("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "mamba_layers"),
    *("moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_pre_softmax"),
    *("et_mean_experts", "et_threshold_estimator", "et_ema_decay", "et_gate"),
    "mtp_num_layers",  # the depths are left out
}
# Required values of other arguments that affect the model, where these are not their defaults.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "quick_geglu": False,
    "rotary_seq_len_interpolation_factor": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
}
# These make training drop tokens or add noise, which a converted model does not do.
_FIXED_WITH_TOKEN_CHOICE: dict[str, Any] = {
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
}


@dataclass(frozen=True)
class Architecture:
    """Architecture of a decoder with RMSNorm before each block and rotary positions.

    Attributes:
        layers: Number of layers.
        hidden: Hidden size.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Size of a head.
        ffn: Intermediate size of dense feed-forward blocks.
        vocab: Rows of the embedding without padding.
        max_length: Context length, in tokens.
        eps: Constant added to the mean square in every norm.
        rope_base: Base of RoPE.
        rope_factor: Factor by which Llama 3's scaling extends 8,192 positions; None for plain RoPE.
        gated: Whether feed-forward blocks are SwiGLU, and not squared ReLU.
        norm_scale: Whether every norm has a learnable scale.
        qk_norm: Whether queries and keys are normalized before the rotation.
        qkv_bias: Whether the projections of queries, keys and values have a bias.
        tied: Whether the output layer is the embedding.
        embedding_norm: Whether the embedding is followed by a norm.
        softcap: Bound of the logits; 0 for none.
        router: Type of the router; None without experts.
        moe_layers: For each layer, whether it has experts.
        experts: Number of routed experts in a layer.
        moe_ffn: Intermediate size of an expert.
        shared_ffn: Intermediate size of the shared expert; 0 for none.
        topk: Fan-out, an integer; see `mean_experts`.
        normalize_topk: Whether the weights of a token's experts sum to 1 (token choice).
        aux_loss: Coefficient of the load-balancing loss (token choice).
        gate: Function from router logits to weights (thresholds).
        estimator: Estimator of the thresholds, for training.
        ema_decay: Decay of the thresholds' moving average; 0 with another estimator, whose state is
            not converted: training continues from the thresholds.
        mean_experts: Mean fan-out, if it is not `topk`.
        delta_layers: For each layer, whether it is a Gated DeltaNet layer and has no attention.
            Empty if all layers have attention, and the next five are 0 then.
        delta_key_heads: Number of query and key heads of Gated DeltaNet layers.
        delta_value_heads: Number of their value heads.
        delta_key_dim: Size of their query and key heads.
        delta_value_dim: Size of their value heads.
        delta_kernel: Length of their convolution.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_length: int
    eps: float
    rope_base: int
    rope_factor: float | None = None
    gated: bool = True
    norm_scale: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    embedding_norm: bool = False
    softcap: float = 0.0
    router: str | None = None
    moe_layers: tuple[bool, ...] = ()
    experts: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    topk: int = 0
    normalize_topk: bool = True
    aux_loss: float = 0.0
    gate: str = "sigmoid"
    estimator: str = "ema"
    ema_decay: float = 0.0
    mean_experts: float | None = None
    delta_layers: tuple[bool, ...] = ()
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_dim: int = 0
    delta_value_dim: int = 0
    delta_kernel: int = 0

    @property
    def dims(self) -> dict[str, int]:
        """Sizes, by the names of dimensions in `megatron_ext.hf.names`."""
        sizes = ("hidden", "head_dim", "ffn", "vocab", "experts", "moe_ffn", "shared_ffn",
                 "delta_value_heads", "delta_value_dim", "delta_kernel")  # fmt: skip
        return {
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "delta_keys": self.delta_key_heads * self.delta_key_dim,
            "delta_values": self.delta_value_heads * self.delta_value_dim,
            "one": 1,
            **{name: getattr(self, name) for name in sizes},
        }

    @property
    def usual_head_dim(self) -> bool:
        """Whether the heads together have the hidden size."""
        return self.head_dim * self.heads == self.hidden

    @property
    def moe_everywhere(self) -> bool:
        """Whether every layer has experts."""
        return all(self.moe_layers)

    @property
    def hybrid(self) -> bool:
        """Whether some layers are Gated DeltaNet layers."""
        return bool(self.delta_layers)

    @property
    def thresholds(self) -> bool:
        """Whether experts are selected by thresholds."""
        return self.router is not None and router_type(self.router).uses_thresholds

    @property
    def shared(self) -> bool:
        """Whether layers with experts have a shared expert."""
        return self.shared_ffn > 0

    @property
    def qk_norm_scale(self) -> bool:
        """Whether the norms of queries and keys have a scale."""
        return self.qk_norm and self.norm_scale

    @property
    def untied(self) -> bool:
        """Whether the output layer is separate from the embedding."""
        return not self.tied

    @property
    def ungated(self) -> bool:
        """Whether feed-forward blocks are squared ReLU."""
        return not self.gated


def from_args(args: Namespace) -> Architecture:
    """Return the architecture of a training run.

    Args:
        args: Megatron's arguments of the run.

    Raises:
        UserError: The run used an option that no supported family has.
    """
    if any(setting_value(args, "mamba_layers")):
        raise UserError(
            "The model has Mamba layers, which no supported Hugging Face family has. Only models "
            "with attention and Gated DeltaNet layers can be converted or aligned."
        )
    experts = args.num_experts or 0
    router = _router(args.router_type) if experts else None
    fixed = {name: default_value(name) for name in read_settings(args) if name not in _TRANSLATED}
    fixed = {name: value for name, value in fixed.items() if value is not MISSING} | _FIXED
    fixed |= _FIXED_WITH_TOKEN_CHOICE if router == "token-choice" else {}
    for name, value in fixed.items():
        if (actual := getattr(args, name, value)) != value:
            raise UserError(
                f"The model was trained with {name} = {actual}, which no supported Hugging Face "
                f"family has. Only models with {value} can be converted."
            )
    if args.swiglu == args.squared_relu:
        raise UserError(
            "The model was trained without --swiglu and --squared-relu. Only models with one of "
            "them can be converted."
        )
    heads = args.num_attention_heads
    has_experts: dict[str, Any] = {
        "router": router,
        "moe_layers": _moe_layers(args),
        "experts": experts,
    }
    return Architecture(
        layers=args.num_layers,
        hidden=args.hidden_size,
        heads=heads,
        kv_heads=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        ffn=args.ffn_hidden_size,
        vocab=args.vocab_size,
        max_length=args.max_position_embeddings,
        eps=args.layernorm_epsilon,
        rope_base=args.rotary_base,
        rope_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        gated=args.swiglu,
        norm_scale=args.et_norm_scale,
        qk_norm=args.qk_layernorm,
        qkv_bias=args.add_qkv_bias,
        tied=not args.untie_embeddings_and_output_weights,
        embedding_norm=args.et_embedding_norm,
        softcap=args.et_logit_softcap,
        **(has_experts | _expert_settings(args, router) if experts else {}),
        **_delta_net_settings(args),
    )


# Sizes of Gated DeltaNet layers in Megatron, with the fields of `Architecture`.
_DELTA_SIZES = {
    "linear_num_key_heads": "delta_key_heads",
    "linear_num_value_heads": "delta_value_heads",
    "linear_key_head_dim": "delta_key_dim",
    "linear_value_head_dim": "delta_value_dim",
    "linear_conv_kernel_dim": "delta_kernel",
}


def _delta_net_settings(args: Namespace) -> dict[str, Any]:
    layers = tuple(map(bool, setting_value(args, "linear_attention_freq")))
    if not any(layers):
        return {}
    if all(layers):
        raise UserError(
            "The model has Gated DeltaNet layers only, and the cache of transformers takes its "
            "length from a layer with attention. Only models with such a layer can be converted."
        )
    sizes = {ours: setting_value(args, theirs) for theirs, ours in _DELTA_SIZES.items()}
    return {"delta_layers": layers, **sizes}


def _moe_layers(args: Namespace) -> tuple[bool, ...]:
    if isinstance(args.moe_layer_freq, int):
        return tuple(i % args.moe_layer_freq == 0 for i in range(args.num_layers))
    return tuple(bool(flag) for flag in args.moe_layer_freq)


def _router(name: str) -> str:
    """Return the router by which the models of a router evaluate."""
    kind = router_type(name)
    if kind.not_convertible:
        *convertible, last = (name for name, kind in ROUTERS.items() if not kind.not_convertible)
        raise UserError(
            f"The model was trained with --router-type {name}, which {kind.not_convertible}. Only "
            f"models with {', '.join(convertible)} or {last} can be converted."
        )
    return kind.evaluates_as or name


def _expert_settings(args: Namespace, router: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "moe_ffn": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_ffn": args.moe_shared_expert_intermediate_size or 0,
        "topk": args.moe_router_topk,
    }
    if router == "token-choice":
        coefficient = args.moe_aux_loss_coeff
        balanced = args.moe_router_load_balancing_type == "aux_loss"
        aux_loss = float(coefficient) if balanced and not isinstance(coefficient, list) else 0.0
        return settings | {
            "normalize_topk": not args.moe_router_pre_softmax,
            "aux_loss": aux_loss,
        }
    estimator = setting_value(args, "et_threshold_estimator")
    return settings | {
        "gate": args.et_gate,
        "estimator": estimator,
        "ema_decay": args.et_ema_decay if estimator == "ema" else 0.0,
        "mean_experts": args.et_mean_experts,
    }


def to_flags(model: Architecture, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Return the flags of `pretrain_et.py` that build this model.

    Args:
        model: Shape of the model.
        changes: Further settings, and those that replace the model's, as a recipe has them.
    """
    words: list[str] = []
    for name, value in (to_settings(model) | dict(changes or {})).items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def to_settings(model: Architecture) -> dict[str, Any]:
    """Return the settings of `pretrain_et.py` that build this model, as a recipe has them.

    Switches that are on have the value True; those that are off are left out.
    """
    values: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn,
        "seq_length": model.max_length,
        "max_position_embeddings": model.max_length,
        "norm_epsilon": model.eps,
        "rotary_base": model.rope_base,
        "et_logit_softcap": model.softcap,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "hidden_dropout": 0,
        "attention_dropout": 0,
    }
    switches = {
        "group_query_attention": True,
        "disable_bias_linear": True,
        "no_bias_gelu_fusion": True,
        "swiglu": model.gated,
        "squared_relu": not model.gated,
        "et_norm_scale": model.norm_scale,
        "qk_layernorm": model.qk_norm,
        "add_qkv_bias": model.qkv_bias,
        "untie_embeddings_and_output_weights": not model.tied,
        "no_et_embedding_norm": not model.embedding_norm,
        "use_rope_scaling": model.rope_factor is not None,
    }
    if model.rope_factor is not None:
        values["rope_scaling_factor"] = model.rope_factor
    if model.hybrid:
        experts = model.moe_layers or (False,) * model.layers
        values["hybrid_layer_pattern"] = "".join(
            ("G" if delta else "*") + ("E" if moe else "-")
            for delta, moe in zip(model.delta_layers, experts)
        )
        values |= {theirs: getattr(model, ours) for theirs, ours in _DELTA_SIZES.items()}
    if model.router is not None:
        pattern = ",".join(str(int(moe)) for moe in model.moe_layers)
        values |= {
            "router_type": model.router,
            "num_experts": model.experts,
            "moe_layer_freq": 1 if model.moe_everywhere else f"[{pattern}]",
            "moe_ffn_hidden_size": model.moe_ffn,
            "moe_router_topk": model.topk,
        }
        if model.shared_ffn:
            values["moe_shared_expert_intermediate_size"] = model.shared_ffn
        if model.thresholds:
            values |= {"et_gate": model.gate, "et_threshold_estimator": model.estimator}
            if model.estimator == "ema":
                values["et_ema_decay"] = model.ema_decay
            if model.mean_experts is not None:
                values["et_mean_experts"] = model.mean_experts
        else:
            switches["moe_router_pre_softmax"] = not model.normalize_topk
            values |= {"moe_router_load_balancing_type": "aux_loss"}
            values |= {"moe_aux_loss_coeff": model.aux_loss}
    return values | {name: True for name, on in switches.items() if on}
