"""Registry of the Hugging Face families that models are converted to and from.

To add a family whose tensors are named like Llama's, add one entry to `FAMILIES`: the architectures
that belong to it, the names of their sizes in its configuration, and the map of its tensor names.
Nothing else depends on the name of a family, except that Expert Threshold models (`OWN`) come with
their own code.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf import names
from megatron_ext.hf.architecture import LLAMA3_ROPE, Architecture

# Configuration entries of all families, with the corresponding fields of `Architecture`.
COMMON = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "vocab",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
}
# Properties of every architecture outside this project's own family.
PLAIN = {
    "gated": True,
    "norm_scale": True,
    "embedding_norm": False,
    "softcap": 0.0,
    "hybrid": False,
}
FULL, LINEAR = "full_attention", "linear_attention"
TOKEN_CHOICE = {"router": "token-choice", "shared": False}
TOP_K = {"num_experts_per_tok": "topk", "router_aux_loss_coef": "aux_loss"}
# Configuration values that are required, if the configuration has them.
SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
WITHOUT_WINDOW = {"sliding_window": None}


@dataclass(frozen=True)
class Family:
    """Family of models in transformers.

    Attributes:
        name: `model_type` of its configuration.
        required: Properties that an architecture must have to belong to this family.
        config: Configuration entries, each with the field of `Architecture` it corresponds to.
        fixed: Values that other configuration entries must have, if they are present.
        rules: Function from an architecture to the map of its tensor names.
        read: Function from a configuration to computed fields of the architecture.
        write: Function from an architecture to computed entries of the configuration.
    """

    name: str
    required: dict[str, Any]
    config: dict[str, str]
    fixed: dict[str, Any]
    rules: Callable[[Architecture], tuple[names.NameRule, ...]]
    read: Callable[[Any], dict[str, Any]] = field(default=lambda config: {})
    write: Callable[[Architecture], dict[str, Any]] = field(default=lambda model: {})

    def misfit(self, model: Architecture) -> str | None:
        """Return the first property that excludes a model from this family, or None."""
        keys = {ours: theirs for theirs, ours in self.config.items()}
        for name, value in self.required.items():
            if getattr(model, name) != value:
                return f"{keys.get(name, name)} is {getattr(model, name)}, not {value}"
        return None

    def links(self, model: Architecture) -> list[names.TensorLink]:
        """Return every tensor of a model, with its names on both sides."""
        return names.expand(self.rules(model), model)


def _qwen3_moe_layers(config: Any) -> dict[str, Any]:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    layers = range(config.num_hidden_layers)
    return {"moe_layers": tuple(i not in dense and (i + 1) % step == 0 for i in layers)}


def _own_rules(model: Architecture) -> tuple[names.NameRule, ...]:
    return names.expert_threshold(model.gated)


FAMILIES = (
    Family(
        "llama",
        {**PLAIN, "router": None, "qk_norm": False, "qkv_bias": False},
        {**COMMON, "head_dim": "head_dim", "intermediate_size": "ffn"},
        {**SILU, "attention_bias": False, "mlp_bias": False},
        lambda model: names.DENSE,
    ),
    Family(
        "qwen2",
        {**PLAIN, "router": None, "qk_norm": False, "qkv_bias": True, "usual_head_dim": True},
        {**COMMON, "intermediate_size": "ffn"},
        {**SILU, **WITHOUT_WINDOW},
        lambda model: names.DENSE,
        read=lambda config: {"head_dim": config.hidden_size // config.num_attention_heads},
    ),
    Family(
        "qwen3",
        {**PLAIN, "router": None, "qk_norm": True, "qkv_bias": False},
        {**COMMON, "head_dim": "head_dim", "intermediate_size": "ffn"},
        {**SILU, **WITHOUT_WINDOW, "attention_bias": False},
        lambda model: names.DENSE,
    ),
    Family(
        "mixtral",
        {
            **PLAIN,
            **TOKEN_CHOICE,
            "qk_norm": False,
            "qkv_bias": False,
            "moe_everywhere": True,
            "normalize_topk": True,
        },
        {
            **COMMON,
            **TOP_K,
            "intermediate_size": "moe_ffn",
            "num_local_experts": "experts",
        },
        # transformers jitters the input of router and experts, Megatron that of the router alone.
        {**SILU, **WITHOUT_WINDOW, "router_jitter_noise": 0.0},
        lambda model: names.MIXTRAL,
        read=lambda config: {
            "moe_layers": (True,) * config.num_hidden_layers,
            "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
            "ffn": config.intermediate_size,
        },
        write=lambda model: {"head_dim": model.head_dim},
    ),
    Family(
        "qwen3_moe",
        {**PLAIN, **TOKEN_CHOICE, "qk_norm": True, "qkv_bias": False},
        {
            **COMMON,
            **TOP_K,
            "head_dim": "head_dim",
            "intermediate_size": "ffn",
            "moe_intermediate_size": "moe_ffn",
            "num_experts": "experts",
            "norm_topk_prob": "normalize_topk",
        },
        {**SILU, **WITHOUT_WINDOW, "attention_bias": False},
        lambda model: names.QWEN3_MOE,
        read=_qwen3_moe_layers,
        write=lambda model: {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, moe in enumerate(model.moe_layers) if not moe],
        },
    ),
    Family(
        "expert_threshold",
        {"router": "expert-threshold"},
        {
            **COMMON,
            "head_dim": "head_dim",
            "intermediate_size": "ffn",
            "gated_mlp": "gated",
            "norm_scale": "norm_scale",
            "qk_norm": "qk_norm",
            "qkv_bias": "qkv_bias",
            "embedding_norm": "embedding_norm",
            "logit_softcap": "softcap",
            "num_experts": "experts",
            "moe_intermediate_size": "moe_ffn",
            "shared_expert_intermediate_size": "shared_ffn",
            "router_gate": "gate",
            "num_experts_per_tok": "topk",
            "mean_experts": "mean_experts",
            "threshold_estimator": "estimator",
            "threshold_ema_decay": "ema_decay",
            "linear_num_key_heads": "delta_key_heads",
            "linear_num_value_heads": "delta_value_heads",
            "linear_key_head_dim": "delta_key_dim",
            "linear_value_head_dim": "delta_value_dim",
            "linear_conv_kernel_dim": "delta_kernel",
        },
        {},
        _own_rules,
        read=lambda config: {
            "moe_layers": tuple(map(bool, config.moe_layers)),
            "delta_layers": tuple(kind == LINEAR for kind in config.layer_types or ()),
        },
        write=lambda model: {
            "moe_layers": [int(moe) for moe in model.moe_layers],
            "layer_types": [LINEAR if delta else FULL for delta in model.delta_layers] or None,
            "hidden_act": "silu" if model.gated else "relu2",
        },
    ),
)
OWN = FAMILIES[-1]


def family_of(model: Architecture) -> Family:
    """Return the first family that a model trained here belongs to.

    Raises:
        UserError: The model belongs to none.
    """
    for family in FAMILIES:
        if family.misfit(model) is None:
            return family
    reasons = "; ".join(f"for {family.name}, {family.misfit(model)}" for family in FAMILIES)
    raise UserError(
        f"The model belongs to no Hugging Face family that is supported: {reasons}. Train a model "
        "with the properties of one of these families to convert it."
    )


def family_named(model_type: str) -> Family:
    """Return the family with a `model_type`.

    Raises:
        UserError: The family is not supported.
    """
    for family in FAMILIES:
        if family.name == model_type:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise UserError(
        f"Models of type {model_type} (model_type in config.json) cannot be converted. Supported "
        f"types are {names}. To add one, see megatron_ext/hf/families.py."
    )


def read_config(config: Any) -> Architecture:
    """Return the architecture that a configuration of transformers describes.

    Raises:
        UserError: The family is not supported, or the configuration requires something that has no
            counterpart in Megatron or in the family's entry.
    """
    family = family_named(config.model_type)
    for name, value in family.fixed.items():
        if (actual := getattr(config, name, value)) != value:
            raise UserError(
                f"config.json has {name} = {actual}. Only {family.name} models with {name} = "
                f"{value} can be converted."
            )
    field_names = {item.name for item in fields(Architecture)}
    values = {name: value for name, value in family.required.items() if name in field_names}
    values |= {ours: getattr(config, theirs) for theirs, ours in family.config.items()}
    values |= family.read(config) | _read_rope(config)
    return Architecture(**values)


def write_config(model: Architecture, family: Family) -> dict[str, Any]:
    """Return the entries of a configuration of transformers, without its class's defaults."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rope_base)}
    if model.rope_factor is not None:
        rope |= {"rope_type": "llama3", "factor": model.rope_factor, **LLAMA3_ROPE}
    values = {theirs: getattr(model, ours) for theirs, ours in family.config.items()}
    return values | family.write(model) | {"rope_parameters": rope}


def _read_rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    kind, base = rope.pop("rope_type", "default"), rope.pop("rope_theta")
    if kind not in ("default", "llama3"):
        raise UserError(
            f"config.json has rope_type {kind}. Only models with rope_type default or llama3 can "
            "be converted."
        )
    if base != int(base):
        raise UserError(
            f"config.json has rope_theta {base}, but Megatron's --rotary-base is an integer, "
            "so the model cannot be converted."
        )
    factor = float(rope.pop("factor")) if kind == "llama3" else None
    expected = {"partial_rotary_factor": 1.0, **(LLAMA3_ROPE if kind == "llama3" else {})}
    for name, value in expected.items():
        if (actual := rope.get(name, value)) != value:
            raise UserError(
                f"config.json has {name} = {actual} in its RoPE parameters. Megatron "
                f"supports only {value}, so the model cannot be converted."
            )
    return {"rope_base": int(base), "rope_factor": factor}
