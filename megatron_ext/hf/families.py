"""The Hugging Face families that models are converted to and from, as data.

A family says which architectures it holds, what its configuration calls their sizes, and by which
map its tensors are named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.hf import names
from megatron_ext.hf.architecture import LLAMA3_ROPE, Architecture

_COMMON = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "vocab_size": "vocab",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
}
_PLAIN = {"gated": True, "norm_scale": True, "embedding_norm": False, "softcap": 0.0}
_TOKEN_CHOICE = {"router": "token-choice", "shared": False}
_TOP_K = {"num_experts_per_tok": "topk", "router_aux_loss_coef": "aux_loss"}
_SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
_WITHOUT_WINDOW = {"sliding_window": None}


@dataclass(frozen=True)
class Family:
    """One kind of model of transformers.

    Attributes:
        name: `model_type` of its configuration.
        holds: properties an architecture must have to be of this family.
        config: the configuration's names of the architecture's fields.
        fixed: what the configuration must say besides, where it says anything.
        rules: the name map of a model.
        read: fields of the architecture that are computed from a configuration.
        write: entries of a configuration that are computed from an architecture.
    """

    name: str
    holds: dict[str, Any]
    config: dict[str, str]
    fixed: dict[str, Any]
    rules: Callable[[Architecture], tuple[names.NameRule, ...]]
    read: Callable[[Any], dict[str, Any]] = field(default=lambda config: {})
    write: Callable[[Architecture], dict[str, Any]] = field(default=lambda model: {})

    def misfit(self, model: Architecture) -> str | None:
        """The first property that keeps a model out of this family, or None."""
        for name, value in self.holds.items():
            if getattr(model, name) != value:
                return f"{name} = {getattr(model, name)}, not {value}"
        return None

    def links(self, model: Architecture) -> list[names.TensorLink]:
        """Every tensor of a model under both names."""
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
        {**_PLAIN, "router": None, "qk_norm": False, "qkv_bias": False},
        {**_COMMON, "head_dim": "head_dim", "intermediate_size": "ffn"},
        {**_SILU, "attention_bias": False, "mlp_bias": False},
        lambda model: names.DENSE,
    ),
    Family(
        "qwen2",
        {**_PLAIN, "router": None, "qk_norm": False, "qkv_bias": True, "usual_head_dim": True},
        {**_COMMON, "intermediate_size": "ffn"},
        {**_SILU, **_WITHOUT_WINDOW},
        lambda model: names.DENSE,
        read=lambda config: {"head_dim": config.hidden_size // config.num_attention_heads},
    ),
    Family(
        "qwen3",
        {**_PLAIN, "router": None, "qk_norm": True, "qkv_bias": False},
        {**_COMMON, "head_dim": "head_dim", "intermediate_size": "ffn"},
        {**_SILU, **_WITHOUT_WINDOW, "attention_bias": False},
        lambda model: names.DENSE,
    ),
    Family(
        "mixtral",
        {
            **_PLAIN,
            **_TOKEN_CHOICE,
            "qk_norm": False,
            "qkv_bias": False,
            "moe_everywhere": True,
            "normalize_topk": True,
        },
        {
            **_COMMON,
            **_TOP_K,
            "intermediate_size": "moe_ffn",
            "num_local_experts": "experts",
        },
        {**_SILU, **_WITHOUT_WINDOW},
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
        {**_PLAIN, **_TOKEN_CHOICE, "qk_norm": True, "qkv_bias": False},
        {
            **_COMMON,
            **_TOP_K,
            "head_dim": "head_dim",
            "intermediate_size": "ffn",
            "moe_intermediate_size": "moe_ffn",
            "num_experts": "experts",
            "norm_topk_prob": "normalize_topk",
        },
        {**_SILU, **_WITHOUT_WINDOW, "attention_bias": False},
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
            **_COMMON,
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
            "threshold_ema_decay": "ema_decay",
        },
        {},
        _own_rules,
        read=lambda config: {"moe_layers": tuple(map(bool, config.moe_layers))},
        write=lambda model: {
            "moe_layers": [int(moe) for moe in model.moe_layers],
            "hidden_act": "silu" if model.gated else "relu2",
        },
    ),
)
OWN = FAMILIES[-1]


def family_of(model: Architecture) -> Family:
    """The family that a model trained here belongs to.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if family.misfit(model) is None:
            return family
    reasons = "; ".join(f"for {family.name} it has {family.misfit(model)}" for family in FAMILIES)
    raise UserError(f"the model is of none of the families known here ({reasons})")


def family_named(model_type: str) -> Family:
    """The family of a configuration's `model_type`.

    Raises:
        UserError: it is not known; the message says which are.
    """
    for family in FAMILIES:
        if family.name == model_type:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"models of type {model_type} cannot be converted: known are {known}")


def read_config(config: Any) -> Architecture:
    """The architecture that a configuration of transformers describes.

    Raises:
        UserError: the family is not known, or the configuration asks for something that Megatron
            or its family's map has no counterpart of.
    """
    family = family_named(config.model_type)
    for name, value in family.fixed.items():
        if (found := getattr(config, name, value)) != value:
            raise UserError(
                f"the configuration has {name} = {found}: of {family.name} only models with "
                f"{value} can be converted"
            )
    own = {item.name for item in fields(Architecture)}
    values = {name: value for name, value in family.holds.items() if name in own}
    values |= {ours: getattr(config, theirs) for theirs, ours in family.config.items()}
    values |= family.read(config) | _read_rope(config)
    return Architecture(**values)


def write_config(model: Architecture, family: Family) -> dict[str, Any]:
    """The entries of a configuration of transformers, without the class's own defaults."""
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
            f"the configuration has rope_type {kind}: only default and llama3 can be converted"
        )
    if base != int(base):
        raise UserError(f"the configuration has rope_theta {base}: --rotary-base is a whole number")
    factor = float(rope.pop("factor")) if kind == "llama3" else None
    expected = {"partial_rotary_factor": 1.0, **(LLAMA3_ROPE if kind == "llama3" else {})}
    for name, value in expected.items():
        if (found := rope.get(name, value)) != value:
            raise UserError(
                f"the configuration has {name} = {found} in its RoPE parameters: Megatron has "
                f"{value} built in"
            )
    return {"rope_base": int(base), "rope_factor": factor}
