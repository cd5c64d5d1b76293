"""Registry of the routers that `--router-type` selects.

A router is a class derived from :class:`megatron_ext.moe.router.ETRouter` and an entry of `ROUTERS`
with the facts that are needed before a model is built: which flags the router reads, which flags of
Megatron it replaces, and how its models are evaluated and converted. The command line, the checks,
the model and the conversions all use these entries, so a new router needs nothing else.
`docs/how-to/extending.md` has an example.

This module imports neither torch nor Megatron.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.moe.router import ETRouter

_NEEDS_FIXED_FAN_OUT: dict[str, str] = {
    "moe_router_fusion": "the fused kernel selects a fixed number of experts per token",
    "moe_expert_capacity_factor": "experts take a variable number of tokens",
    "moe_pad_expert_input_to_capacity": "experts take a variable number of tokens",
    "moe_enable_routing_replay": "it replays a fixed number of experts per token",
    "moe_apply_probs_on_input": "a token may have any number of experts",
}

# What a router that does not read Megatron's router flags sets, refuses and replaces.
_OWN_SETTINGS: dict[str, Any] = {
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_router_score_function": "sigmoid",  # unused; Megatron checks others with top 1
}
_NEEDS_MEGATRONS_ROUTER: dict[str, str] = {
    "moe_router_enable_expert_bias": "the router has no balancing bias",
    "moe_router_num_groups": "the router has no groups of experts",
    "moe_input_jitter_eps": "the router adds no noise",
    "moe_z_loss_coeff": "the router has no auxiliary loss",
}
_REPLACED: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_aux_loss_coeff": ((0, [0.0]), "the router has no auxiliary loss"),
    "moe_router_load_balancing_type": (("none", ["none"]), "the router has no auxiliary loss"),
    "moe_router_topk_scaling_factor": ((None, 1), "the router does not scale its gates"),
    "moe_router_score_function": (("sigmoid",), "the router has its own gates"),
    "moe_router_pre_softmax": ((False,), "the router has its own gates"),
    "moe_router_dtype": (("fp32",), "the router computes in fp32"),
    "moe_router_force_load_balancing": ((False,), "its random logits would never reach it"),
    "moe_router_force_biased": ((None,), "its random logits would never reach it"),
}


@dataclass(frozen=True)
class RouterType:
    """Description of a router by which the rest of the project treats it.

    Attributes:
        summary: When a token goes to an expert, in one sentence for `--help`.
        router: Import path `module:Class` of the router.
        variable_fan_out: Whether the number of experts per token varies.
        uses_thresholds: Whether the router has one threshold per expert, by which it evaluates.
        trains_by_threshold: Whether thresholds also decide in training, after the warm-up.
        flags: Fields of ETConfig for routing that the router reads.
        reads_megatron_flags: Whether it reads Megatron's `--moe-router-*` and auxiliary loss. They
            are refused for a router that does not.
        settings: Fields of Megatron's configuration that it sets, whatever the flags say.
        unsupported: Fields of Megatron's configuration that it cannot work with, and the reason.
        replaced: Flags of Megatron that it would ignore: harmless values, and the reason.
        evaluation: Name of its evaluation rule among the routing modes of evaluation.
        evaluates_as: Name of the router whose model a trained one is, if not its own.
        not_convertible: Why its models cannot be converted to Hugging Face; empty if they can.
        margin_unit: What a margin measures, for the axis of a plot.
        without_margins: Fields of Megatron's configuration with which margins are undefined.
    """

    summary: str
    router: str
    variable_fan_out: bool = False
    uses_thresholds: bool = False
    trains_by_threshold: bool = False
    flags: frozenset[str] = frozenset()
    reads_megatron_flags: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    evaluation: str = "own"
    evaluates_as: str | None = None
    not_convertible: str = "has no counterpart among the Hugging Face families"
    margin_unit: str = "distance from being routed otherwise"
    without_margins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.reads_megatron_flags:
            for name, facts in (
                ("settings", _OWN_SETTINGS),
                ("unsupported", _NEEDS_MEGATRONS_ROUTER),
                ("replaced", _REPLACED),
            ):
                object.__setattr__(self, name, {**facts, **getattr(self, name)})

    def load(self) -> "type[ETRouter]":
        """Import and return the class of the router."""
        module, _, name = self.router.partition(":")
        return getattr(import_module(module), name)

    def reads(self, name: str) -> bool:
        """Return whether routing depends on a field of the configuration."""
        if name in routing_flags():
            return name in self.flags
        if name.startswith("moe_router_") or name == "moe_aux_loss_coeff":
            return self.reads_megatron_flags
        return True

    def refusals(self) -> dict[str, str]:
        """Return the fields of the configuration that must be unset, each with the reason."""
        return {**(_NEEDS_FIXED_FAN_OUT if self.variable_fan_out else {}), **self.unsupported}


_THRESHOLD_FLAGS = frozenset(
    {"et_mean_experts", "et_threshold_estimator", "et_ema_decay", "et_gate", "et_cutoff_pool"}
)
_THRESHOLD_ROUTER: dict[str, Any] = {
    "router": "megatron_ext.moe.threshold_router:ThresholdRouter",
    "variable_fan_out": True,
    "uses_thresholds": True,
    "unsupported": {
        "moe_expert_capacity_factor": "--et-capacity limits what an expert takes",
        "moe_router_enable_expert_bias": "thresholds balance the load without a bias",
        "moe_router_num_groups": "experts choose on their own, not in groups",
        "moe_input_jitter_eps": "noise would make the cutoffs random",
        "moe_latent_size": "it needs a separate dispatcher",
    },
    "replaced": {
        "moe_aux_loss_coeff": (
            (0, [0.0]),
            "thresholds balance the load without an auxiliary loss",
        ),
        "moe_router_load_balancing_type": (
            ("none", ["none"]),
            "thresholds balance the load without an auxiliary loss",
        ),
        "moe_router_topk_scaling_factor": ((None, 1), "use --et-gate for the weight of an expert"),
        "moe_router_score_function": (("sigmoid",), "use --et-gate for the weight of an expert"),
        "moe_router_pre_softmax": ((False,), "use --et-gate for the weight of an expert"),
        "moe_router_dtype": (("fp32",), "logits, cutoffs and thresholds are fp32"),
    },
    "evaluation": "et",
    "not_convertible": "",
    "margin_unit": "logit − threshold",
}
_TOP_K_ROUTER: dict[str, Any] = {
    "router": "megatron_ext.moe.token_choice_router:TokenChoiceRouter",
    "reads_megatron_flags": True,
    "evaluation": "tc",
    "margin_unit": "score − k-th of the others",
    "without_margins": ("moe_router_group_topk", "moe_expert_capacity_factor"),
}

ROUTERS: dict[str, RouterType] = {
    "expert-threshold": RouterType(
        summary="An expert takes the tokens whose logit exceeds the expert's threshold.",
        trains_by_threshold=True,
        flags=_THRESHOLD_FLAGS | {"et_warmup_iters", "et_capacity", "et_capacity_pool"},
        **_THRESHOLD_ROUTER,
    ),
    "expert-choice": RouterType(
        summary="In training an expert takes the k largest logits of the micro-batch over all "
        "data-parallel ranks; evaluation uses thresholds.",
        flags=_THRESHOLD_FLAGS,
        evaluates_as="expert-threshold",
        **_THRESHOLD_ROUTER,
    ),
    "token-choice": RouterType(
        summary="A token goes to its k largest logits, by Megatron's top-k router with the "
        "balancing of --moe-router-load-balancing-type.",
        not_convertible="",
        **_TOP_K_ROUTER,
    ),
    "quantile-balancing": RouterType(
        summary="A token goes to its k largest logits after Megatron's quantile bias is added.",
        settings={
            "moe_router_load_balancing_type": "quantile_balancing",
            "moe_aux_loss_coeff": 0.0,
        },
        not_convertible="adds a bias that no Hugging Face family has",
        **_TOP_K_ROUTER,
    ),
}


def router_type(name: str) -> RouterType:
    """Return the entry of a router.

    Raises:
        UserError: No router has this name, such as that of a checkpoint made with another registry.
    """
    if name not in ROUTERS:
        raise UserError(
            f"--router-type {name} is not registered in megatron_ext.moe.registry.ROUTERS. Add its "
            f"entry, or use one of {', '.join(ROUTERS)}."
        )
    return ROUTERS[name]


def routing_flags() -> frozenset[str]:
    """Return the fields of ETConfig that some router reads, and others ignore."""
    return frozenset().union(*(kind.flags for kind in ROUTERS.values()))


def routers_help() -> str:
    """Return the help text of `--router-type`, made of the routers' summaries."""
    summaries = " ".join(f"{name}: {kind.summary}" for name, kind in ROUTERS.items())
    return f"Rule by which tokens are matched with experts. {summaries} Default: expert-threshold."
