"""Layers of a model as Megatron's `--hybrid-layer-pattern`.

A transformer layer is a pair of symbols: attention `*`, a Gated DeltaNet layer `G` or a Mamba-2
layer `M`, then an MLP `-` or experts `E`. Each `/` with a pair after it is a depth of multi-token
prediction. Megatron counts each symbol as a layer; here a pair is one, as in every other flag, so
the pattern is replaced by flags that say the same: those of GPT models, and `--mamba-layers`.
"""

from argparse import Namespace
from itertools import batched

from megatron_ext.errors import UserError

_PAIRS = (
    "pairs of * (attention), G (Gated DeltaNet) or M (Mamba-2), then - (MLP) or E (experts), like "
    '"*-GE"'
)


def expand_layer_pattern(args: Namespace, explicit: set[str]) -> None:
    """Replace a pattern by the number of layers and by which of them have experts and attention.

    Args:
        args: Arguments as parsed, which this function changes.
        explicit: Names of the arguments that the command line or a recipe sets.

    Raises:
        UserError: The pattern has other layers, or other flags contradict it.
    """
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    name = f"--hybrid-layer-pattern {pattern}"
    if "|" in pattern:
        raise UserError(
            f"{name} has |: pipeline stages follow from --pipeline-model-parallel-size. Leave | "
            "out."
        )
    decoder, *depths = pattern.split("/")
    layers = list(batched(decoder, 2))
    if not layers or any(
        len(pair) < 2 or pair[0] not in "*GM" or pair[1] not in "-E" for pair in layers
    ):
        raise UserError(f"{name} does not describe transformer layers. Use {_PAIRS}.")
    last = "".join(layers[-1])
    if any(depth != last for depth in depths):
        raise UserError(
            f"{name} must end with a /{last} for each depth of multi-token prediction, whose layer "
            "is of the kind of the last one. Replace what follows the first /."
        )
    if depths and "mtp_num_layers" in explicit and args.mtp_num_layers != len(depths):
        raise UserError(
            f"{name} has {len(depths)} / for depths of multi-token prediction, but "
            f"--mtp-num-layers is {args.mtp_num_layers}. Leave --mtp-num-layers out."
        )
    experts = [int(second == "E") for _, second in layers]
    linear, mamba = ([int(first == symbol) for first, _ in layers] for symbol in "GM")
    if "num_layers" in explicit and args.num_layers != len(layers):
        raise UserError(
            f"{name} has {len(layers)} pairs, which are transformer layers, but --num-layers is "
            f"{args.num_layers}. Leave --num-layers out."
        )
    if any(experts) and not args.num_experts:
        raise UserError(f"{name} has layers of experts, E. Add --num-experts.")
    if args.num_experts and not any(experts):
        raise UserError(
            f"{name} has no layer of experts, E, but --num-experts is {args.num_experts}. Leave "
            "--num-experts out, or add E."
        )
    for flag, text, values, default in (
        ("moe_layer_freq", "experts, E", experts, 1),
        ("linear_attention_freq", "Gated DeltaNet, G", linear, None),
        ("mamba_layers", "Mamba, M", mamba, []),
    ):
        other = getattr(args, flag)
        if flag in explicit and other != default and _expanded(other, flag, len(layers)) != values:
            raise UserError(
                f"{name} has {text}, in other layers than --{flag.replace('_', '-')} {other}. "
                "Leave one of them out."
            )
    args.num_layers = len(layers)
    if depths:
        args.mtp_num_layers = len(depths)
    if args.num_experts:
        args.moe_layer_freq = experts
    if any(linear):
        args.experimental_attention_variant = "gated_delta_net"
        args.linear_attention_freq = linear
    if any(mamba):
        args.mamba_layers = mamba
    args.hybrid_layer_pattern = None


def _expanded(frequency: int | list[int], flag: str, layers: int) -> list[int]:
    """Return the list that a frequency of Megatron stands for."""
    if not isinstance(frequency, int):
        return list(frequency)
    if frequency < 1:
        return []
    if flag == "linear_attention_freq":
        return [int((layer + 1) % frequency != 0) for layer in range(layers)]
    return [int(layer % frequency == 0) for layer in range(layers)]
