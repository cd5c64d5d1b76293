"""Identity of models: comparison of the settings that two models must share.

`megatron_ext.model.setting_marks` lists these settings.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.errors import UserError
from megatron_ext.model.setting_marks import MARKS, Mark
from megatron_ext.moe.registry import router_type, routing_flags


class Difference(NamedTuple):
    """Setting that two models do not share.

    Attributes:
        name: Name of the argument.
        saved: Value of the run that saved the checkpoint.
        current: Value of this run.
    """

    name: str
    saved: Any
    current: Any


def differences(saved: Namespace, current: Namespace, mark: Mark = "same") -> Iterator[Difference]:
    """Compare two sets of arguments in the settings of one mark.

    A setting that a model does not read, such as those of a router that it does not have, is left
    out.

    Args:
        saved: Arguments of the run that saved a checkpoint. Missing ones have their defaults.
        current: Arguments of this run.
        mark: Mark of the settings to compare.

    Yields:
        The settings that differ.
    """
    for name in names_with_mark(mark):
        if not (_is_read(saved, name) and _is_read(current, name)):
            continue  # the setting that makes the other unused is compared as well
        saved_value, current_value = setting_value(saved, name), setting_value(current, name)
        if saved_value != current_value and saved_value is not MISSING:
            yield Difference(name, saved_value, current_value)


def check_same_model(checkpoint: Path, saved: Namespace, current: Namespace) -> None:
    """Refuse flags that describe another model than a checkpoint's.

    Raises:
        UserError: A setting differs; the message names the first one and both values.
    """
    for name, saved_value, current_value in differences(saved, current):
        if name == "et_mean_experts":
            raise UserError(
                f"{checkpoint} was trained with {float(saved_value):g} experts per token on "
                f"average, but the flags say {float(current_value):g}. Make them equal."
            )
        if name == "et_threshold_estimator":
            if current_value == "adaptive":  # its filters start at the moving average
                continue
            raise UserError(
                f"{checkpoint} was trained with --et-threshold-estimator {saved_value}, whose "
                f"filters do not have the moving average that {current_value} continues. Use "
                f"{saved_value}."
            )
        raise UserError(
            f"{checkpoint} was trained with {_display_name(name)} = {saved_value}, but the flags "
            f"say {current_value}. Make them equal, or choose another --run-dir or --load."
        )


def check_same_schedule(checkpoint: Path, saved: Namespace, current: Namespace) -> None:
    """Refuse flags that train differently from the run that saved a checkpoint.

    Raises:
        UserError: A setting differs; the message names the first one and both values.
    """
    for name, saved_value, current_value in differences(saved, current, "schedule"):
        raise UserError(
            f"{checkpoint} was trained with {_display_name(name)} = {saved_value}, but the flags "
            f"say {current_value}. Make them equal, or add --override-opt-param-scheduler to train "
            "by the flags."
        )


def _display_name(name: str) -> str:
    """Return an argument's name, and its flag if that is spelled differently."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(add_help=False, allow_abbrev=False))
    options = [
        option
        for action in parser._actions
        if action.dest == name
        for option in action.option_strings
    ]
    default_flags = {f"--{prefix}{name.replace('_', '-')}" for prefix in ("", "no-")}
    if not options or default_flags & set(options):
        return name
    return f"{name} ({options[0]})"


def names_with_mark(mark: Mark) -> list[str]:
    """Return the names with a mark, in the order of the table."""
    marks = MARKS | {name: "same" for name in _defaults() if name not in MARKS}
    return [name for name, value in marks.items() if value == mark]


def read_settings(args: Namespace) -> list[str]:
    """Return the names of the "same" settings that the model of these arguments depends on."""
    return [name for name in names_with_mark("same") if _is_read(args, name)]


def setting_value(args: Namespace, name: str) -> Any:
    """Return the effective value of a setting, which is the same for the same model.

    Returns:
        `MISSING` for an argument that the run did not have and that has no default in the
        configuration.
    """
    if name in _EQUIVALENTS:
        return _EQUIVALENTS[name](args)
    value = getattr(args, name, MISSING)
    return _defaults().get(name, MISSING) if value is MISSING else value


def default_value(name: str) -> Any:
    """Return the default of a field of the configuration, `MISSING` if it has none."""
    return _defaults().get(name, MISSING)


def _query_groups(args: Namespace) -> int:
    grouped = args.num_query_groups if args.group_query_attention else None
    return grouped or args.num_attention_heads


def _layers_with_experts(args: Namespace) -> list[int]:
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        return [int(layer % pattern == 0) for layer in range(args.num_layers)]
    return [int(flag) for flag in pattern]


def _gated_delta_net_layers(args: Namespace) -> list[int]:
    frequency = getattr(args, "linear_attention_freq", None)
    if frequency is None or getattr(args, "experimental_attention_variant", None) is None:
        return [0] * args.num_layers
    if isinstance(frequency, int):
        return [int((layer + 1) % frequency != 0) for layer in range(args.num_layers)]
    return [int(flag) for flag in frequency]


def _mamba_layers(args: Namespace) -> list[int]:
    return [int(flag) for flag in getattr(args, "mamba_layers", None) or [0] * args.num_layers]


def _mean_experts(args: Namespace) -> Fraction:
    mean = args.moe_router_topk if args.et_mean_experts is None else args.et_mean_experts
    return Fraction(str(mean))


def _router(args: Namespace) -> str:
    return router_type(args.router_type).evaluates_as or args.router_type


# Settings that several flags determine, or that one flag can express in several ways.
_EQUIVALENTS: dict[str, Callable[[Namespace], Any]] = {
    "group_query_attention": lambda args: True,  # implied by num_query_groups
    "num_query_groups": _query_groups,
    "moe_layer_freq": _layers_with_experts,
    "linear_attention_freq": _gated_delta_net_layers,
    "experimental_attention_variant": lambda args: True,  # implied by linear_attention_freq
    "mamba_layers": _mamba_layers,
    "moe_ffn_hidden_size": lambda args: args.moe_ffn_hidden_size or args.ffn_hidden_size,
    "moe_shared_expert_intermediate_size": (
        lambda args: args.moe_shared_expert_intermediate_size or None
    ),
    "et_mean_experts": _mean_experts,
    "router_type": _router,  # expert choice in training, thresholds in evaluation
}


def _is_read(args: Namespace, name: str) -> bool:
    """Return whether the model of these arguments depends on a setting."""
    if name == "et_ema_decay" and setting_value(args, "et_threshold_estimator") != "ema":
        return False
    if name.startswith("linear_") and name != "linear_attention_freq":
        return any(_gated_delta_net_layers(args))
    if name.startswith("mamba_") and name != "mamba_layers":
        return any(_mamba_layers(args))
    if name.startswith("moe_") or name == "router_type" or name in routing_flags():
        return bool(args.num_experts) and router_type(args.router_type).reads(name)
    if name == "max_position_embeddings":
        return bool(args.position_embedding_type == "learned_absolute")
    if name.startswith(("yarn_", "mscale")) or name in ("rotary_scaling_factor", "rope_type"):
        return bool(args.position_embedding_type == "yarn")
    if name.startswith(("rotary_", "rope_")) or name == "use_rope_scaling":
        if name == "rope_scaling_factor" and not args.use_rope_scaling:
            return False
        return args.position_embedding_type not in ("learned_absolute", "none")
    return True


@cache
def _defaults() -> dict[str, Any]:
    from megatron_ext.config import ETConfig
    from megatron_ext.model.hybrid import LanguageModelConfig

    defaults: dict[str, Any] = {}
    for field in (*fields(LanguageModelConfig), *fields(ETConfig)):
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    return defaults
