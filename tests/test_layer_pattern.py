"""Tests of `--hybrid-layer-pattern` against the flags that it stands for."""

import re
from argparse import Namespace
from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.layer_pattern import expand_layer_pattern

DEFAULTS: dict[str, Any] = {
    "num_layers": None,
    "num_experts": 4,
    "moe_layer_freq": 1,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "mamba_layers": [],
    "mtp_num_layers": None,
}


def expanded(pattern: str | None, **explicit: Any) -> Namespace:
    args = Namespace(**(DEFAULTS | {"hybrid_layer_pattern": pattern} | explicit))
    expand_layer_pattern(args, {*explicit, "hybrid_layer_pattern"})
    return args


def test_pattern_determines_the_layers() -> None:
    args = expanded("G-*EGE*E")
    assert (args.num_layers, args.hybrid_layer_pattern) == (4, None)
    assert args.moe_layer_freq == [0, 1, 1, 1]
    assert args.experimental_attention_variant == "gated_delta_net"
    assert args.linear_attention_freq == [1, 0, 1, 0]
    args = expanded("*-*-", num_experts=None)
    assert (args.num_layers, args.moe_layer_freq) == (2, 1)
    assert args.linear_attention_freq is args.experimental_attention_variant is None
    args = expanded("G-*E/*E/*E")
    assert (args.num_layers, args.mtp_num_layers, args.moe_layer_freq) == (2, 2, [0, 1])
    args = expanded("M-MEME*E")
    assert (args.num_layers, args.mamba_layers) == (4, [1, 1, 1, 0])
    assert args.linear_attention_freq is args.experimental_attention_variant is None
    args = expanded("M-GE*E")
    assert (args.mamba_layers, args.linear_attention_freq) == ([1, 0, 0], [0, 1, 0])
    assert expanded(None) == Namespace(**DEFAULTS, hybrid_layer_pattern=None)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_layers": 4},
        {"moe_layer_freq": [0, 1, 0, 1]},
        {"linear_attention_freq": 4},
        {"linear_attention_freq": [1, 1, 1, 0]},
    ],
    ids=str,
)
def test_pattern_accepts_flags_that_say_the_same(flags: dict[str, Any]) -> None:
    assert expanded("G-GEG-*E", **flags).linear_attention_freq == [1, 1, 1, 0]


def test_pattern_accepts_mamba_layers_that_say_the_same() -> None:
    assert expanded("M-*E", mamba_layers=[1, 0]).mamba_layers == [1, 0]


@pytest.mark.parametrize(
    "pattern, flags, message",
    [
        ("", {}, "does not describe transformer layers. Use pairs of"),
        ("*", {}, "does not describe transformer layers"),
        ("*-*", {}, "does not describe transformer layers"),
        ("**-E", {}, "does not describe transformer layers"),
        ("-*E*", {}, "does not describe transformer layers"),
        ("D-*E", {}, "does not describe transformer layers"),
        ("MG-E", {}, "does not describe transformer layers"),
        ("MM*E", {}, "does not describe transformer layers"),
        ("M-*E", {"mamba_layers": [0, 1]}, "in other layers than --mamba-layers [0, 1]"),
        ("*-*E/*-", {}, "must end with a /*E for each depth of multi-token prediction"),
        ("*-*E/", {}, "must end with a /*E for each depth"),
        ("*-*E/*E*E", {}, "must end with a /*E for each depth"),
        ("*-*E/*E", {"mtp_num_layers": 2}, "has 1 / for depths of multi-token prediction, but"),
        ("*-|*E", {}, "has |: pipeline stages follow from --pipeline-model-parallel-size"),
        ("*-*E", {"num_layers": 4}, "but --num-layers is 4. Leave --num-layers out"),
        ("*-*E", {"num_experts": None}, "has layers of experts, E. Add --num-experts"),
        ("*-*-", {"num_experts": 4}, "no layer of experts, E, but --num-experts is 4"),
        ("*-*E", {"moe_layer_freq": [1, 0]}, "in other layers than --moe-layer-freq [1, 0]"),
        ("*-*E", {"moe_layer_freq": 2}, "in other layers than --moe-layer-freq 2"),
        ("*-*E", {"moe_layer_freq": 0}, "in other layers than --moe-layer-freq 0"),
        ("G-*E", {"linear_attention_freq": 0}, "in other layers than --linear-attention-freq 0"),
        ("G-*E", {"linear_attention_freq": 3}, "in other layers than --linear-attention-freq 3"),
    ],
)
def test_pattern_refusals(pattern: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        expanded(pattern, **flags)
