"""Tests of the marks of all settings, which decide whether a setting may change on resume."""

import contextlib
from argparse import ArgumentParser, Namespace
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import UserError
from megatron_ext.model.identity import check_same_model, check_same_schedule, differences
from megatron_ext.model.setting_marks import MARKS
from megatron_ext.moe.registry import ROUTERS
from tests import megatron
from tests.distributed import run_ranks
from tests.megatron import DELTA_NET, MAMBA, TINY

ROTATED = ("--use-rope-scaling",)
TOP_K = ("--router-type", "token-choice", "--moe-router-topk", "2")
YARN = ("--position-embedding-type", "yarn")
ABSOLUTE = ("--position-embedding-type", "learned_absolute")
LINEAR = (
    *("--experimental-attention-variant", "gated_delta_net", "--linear-attention-freq", "2"),
    *DELTA_NET,
)
MAMBA_FIRST = ("--mamba-layers", "1", "0", *MAMBA)
GROUPED = ("--group-query-attention", "--num-query-groups", "2")


Flags = tuple[str, ...]
# A model's flags, further flags, and the argument by which that is another model.
OTHER_MODELS: list[tuple[Flags, Flags, str]] = [
    ((), ("--norm-epsilon", "0.1"), "layernorm_epsilon"),
    ((), ("--apply-layernorm-1p",), "layernorm_zero_centered_gamma"),
    ((), ("--rotary-percent", "0.5"), "rotary_percent"),
    ((), ("--rotary-base", "500000"), "rotary_base"),
    ((), ("--rotary-interleaved",), "rotary_interleaved"),
    ((), ("--rotary-seq-len-interpolation-factor", "2"), "rotary_seq_len_interpolation_factor"),
    ((), ("--use-rope-scaling",), "use_rope_scaling"),
    (ROTATED, ("--rope-scaling-factor", "32"), "rope_scaling_factor"),
    ((), ("--no-rope-freq", "2"), "no_rope_freq"),
    (ABSOLUTE, ("--max-position-embeddings", "64"), "max_position_embeddings"),
    ((), ("--softmax-type", "off-by-one"), "softmax_type"),
    ((), ("--window-size", "8,0"), "window_size"),
    ((), ("--attention-output-gate",), "attention_output_gate"),
    ((), ("--activation-func-clamp-value", "7"), "activation_func_clamp_value"),
    ((), ("--add-qkv-bias",), "add_qkv_bias"),
    (GROUPED, ("--num-query-groups", "1"), "num_query_groups"),
    ((), LINEAR, "linear_attention_freq"),
    (LINEAR, ("--linear-attention-freq", "[0,1]"), "linear_attention_freq"),
    (LINEAR, ("--linear-conv-kernel-dim", "2"), "linear_conv_kernel_dim"),
    ((), MAMBA_FIRST, "mamba_layers"),
    (MAMBA_FIRST, ("--mamba-layers", "0", "1"), "mamba_layers"),
    (MAMBA_FIRST, ("--mamba-state-dim", "4"), "mamba_state_dim"),
    ((), ("--group-query-attention", "--num-query-groups", "1"), "num_query_groups"),
    ((), ("--moe-layer-freq", "[1,0]"), "moe_layer_freq"),
    ((), ("--moe-shared-expert-gate",), "moe_shared_expert_gate"),
    ((), ("--et-gate", "relu"), "et_gate"),
    ((), ("--et-mean-experts", "1.5"), "experts per token on average"),
    ((), ("--et-norm-scale",), "et_norm_scale"),
    ((), ("--no-et-embedding-norm",), "et_embedding_norm"),
    ((), ("--et-logit-softcap", "30"), "et_logit_softcap"),
    (TOP_K, ("--moe-router-topk", "1"), "moe_router_topk"),
    (TOP_K, ("--moe-router-pre-softmax",), "moe_router_pre_softmax"),
    (TOP_K, ("--moe-router-score-function", "sigmoid"), "moe_router_score_function"),
    (TOP_K, ("--moe-router-topk-scaling-factor", "2.5"), "moe_router_topk_scaling_factor"),
    (TOP_K, ("--moe-router-enable-expert-bias",), "moe_router_enable_expert_bias"),
    (TOP_K, ("--moe-router-num-groups", "2"), "moe_router_num_groups"),
    (TOP_K, ("--router-type", "quantile-balancing"), "router_type"),
    (TOP_K, ("--router-type", "expert-threshold"), "router_type"),
]
SAME_MODELS: list[tuple[Flags, Flags]] = [
    ((), ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    ((), ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2")),
    ((), ("--micro-batch-size", "1", "--seq-length", "16", "--max-position-embeddings", "16")),
    ((), ("--moe-token-dispatcher-type", "allgather", "--moe-grouped-gemm")),
    ((), ("--recompute-granularity", "full", "--recompute-method", "uniform")),
    ((), ("--attention-backend", "fused", "--transformer-impl", "transformer_engine")),
    ((), ("--log-interval", "7", "--eval-interval", "3", "--save-interval", "5")),
    ((), ("--make-vocab-size-divisible-by", "64", "--seed", "5", "--et-init", "paper")),
    ((), ("--et-logit-buffer-mb", "1", "--moe-router-dtype", "fp64")),
    ((), ("--bf16", "--fp8-format", "hybrid", "--attention-softmax-in-fp32")),
    # The same in other words, or nothing that the model reads.
    ((), ("--moe-router-topk", "1", "--et-mean-experts", "1.0")),
    ((), ("--router-type", "expert-choice")),
    ((), ("--rope-scaling-factor", "32")),
    ((), ("--moe-router-pre-softmax", "--moe-router-topk-scaling-factor", "2")),
    ((), ("--group-query-attention", "--num-query-groups", "2")),
    ((), ("--linear-num-key-heads", "2")),
    (LINEAR, ("--linear-attention-freq", "[1,0]")),
    ((), ("--mamba-layers", "0", "0", "--mamba-state-dim", "4")),
    (TOP_K, ("--et-gate", "relu", "--et-ema-decay", "0.9")),
    (TOP_K, ("--moe-layer-freq", "[0]+[1]")),
]
OTHER_TRAININGS: list[tuple[Flags, Flags, str]] = [
    ((), ("--hidden-dropout", "0.1"), "hidden_dropout"),
    ((), ("--et-warmup-iters", "4"), "et_warmup_iters"),
    ((), ("--et-capacity", "none"), "et_capacity"),
    (TOP_K, ("--moe-aux-loss-coeff", "0.01"), "moe_aux_loss_coeff"),
    (TOP_K, ("--moe-expert-capacity-factor", "1"), "moe_expert_capacity_factor"),
]


@cache
def parser() -> ArgumentParser:
    """Return, on a rank, the parser of `pretrain_et.py`."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.run_flags import add_arguments

    return add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def arguments(*flags: str) -> Namespace:
    """Return, on a rank, the parsed arguments of `TINY` and more flags."""
    return parser().parse_args([*TINY, *flags])


class Recording(Namespace):
    """Arguments that record which of them are read."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(**vars(args))
        self.read_names: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "read_names":
            self.read_names.add(name)
        return super().__getattribute__(name)


def names_of_the_configuration() -> set[str]:
    """Return, on a rank, fields of the configuration and the arguments they are made from."""
    args, *_ = megatron.start()
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_ext.config import ETConfig
    from megatron_ext.model.hybrid import LanguageModelConfig
    from megatron_ext.model.language_model import language_model_config

    names = {field.name for config in (ETConfig, LanguageModelConfig) for field in fields(config)}
    for settings in (
        {},
        {"squared_relu": False, "swiglu": True},
        {"squared_relu": False, "quick_geglu": True},
        {"position_embedding_type": "yarn"},
    ):
        recording = Recording(Namespace(**{**vars(args), **settings}))
        config = core_transformer_config_from_args(recording, ETConfig)
        language_model_config(recording, config)
        # Megatron asks for every field; what is no argument is in the configuration alone.
        names |= {name for name in recording.read_names if hasattr(args, name)}
    return names


def test_every_setting_of_the_configuration_has_a_mark() -> None:
    [names] = run_ranks(names_of_the_configuration, 1)
    assert names - MARKS.keys() == set(), "mark them in megatron_ext/model/setting_marks.py"
    assert MARKS.keys() - names == set(), "the configuration has them no more"


def refusals_of(cases: list[tuple[Flags, Flags]]) -> list[tuple[str, str]]:
    """Return, on a rank, the refusals of each pair's model and of its training."""
    refusals = []
    for base, flags in cases:
        saved, here = arguments(*base), arguments(*base, *flags)
        answers = []
        for check in (check_same_model, check_same_schedule):
            check(Path("step"), here, deepcopy(here))
            try:
                check(Path("step"), saved, here)
            except UserError as error:
                answers.append(str(error))
            else:
                answers.append("")
        refusals.append((answers[0], answers[1]))
    return refusals


@pytest.fixture(scope="module")
def refusals() -> dict[tuple[Flags, Flags], tuple[str, str]]:
    cases = [(base, flags) for base, flags, *_ in OTHER_MODELS + SAME_MODELS + OTHER_TRAININGS]
    [answers] = run_ranks(refusals_of, 1, cases)
    return dict(zip(cases, answers, strict=True))


@pytest.mark.parametrize("base, flags, name", OTHER_MODELS)
def test_check_same_model_refuses_another_model(
    refusals: Any, base: Flags, flags: Flags, name: str
) -> None:
    of_model, _ = refusals[base, flags]
    assert of_model.startswith("step was trained with ")
    assert name in of_model and "but the flags say" in of_model


@pytest.mark.parametrize("base, flags", SAME_MODELS)
def test_check_same_model_accepts_another_layout(refusals: Any, base: Flags, flags: Flags) -> None:
    assert refusals[base, flags] == ("", "")


@pytest.mark.parametrize("base, flags, name", OTHER_TRAININGS)
def test_check_same_schedule_refuses_another_training(
    refusals: Any, base: Flags, flags: Flags, name: str
) -> None:
    of_model, of_training = refusals[base, flags]
    assert of_model == ""
    assert f"with {name} = " in of_training and "--override-opt-param-scheduler" in of_training


SOME = (GROUPED + ROTATED, TOP_K, LINEAR)


def changed(value: Any) -> Any:
    if isinstance(value, str) and value in ROUTERS:  # another one, since any other name is refused
        return "quantile-balancing"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [changed(each) for each in value] or [1]
    return 3 if value is None else [value]


def marks_by_comparison() -> dict[str, set[str]]:
    """Return, on a rank, the marks by which a change of each argument is a difference."""
    bases = [arguments(*flags) for flags in (*SOME, ABSOLUTE, YARN, MAMBA_FIRST)]
    # Each router reads other flags.
    bases += [Namespace(**{**vars(bases[0]), "router_type": name}) for name in ROUTERS]
    marks_by_name: dict[str, set[str]] = {name: set() for name in MARKS if hasattr(bases[0], name)}
    for name, marks in marks_by_name.items():
        for base in bases:
            other = Namespace(**{**vars(base), name: changed(getattr(base, name))})
            for mark in ("same", "schedule", "free"):
                marks |= {mark for difference in differences(base, other, mark)}
    return marks_by_name


def test_differences_compare_each_argument_by_its_mark() -> None:
    [marks_by_name] = run_ranks(marks_by_comparison, 1)
    assert len(marks_by_name) > 200
    for implied in ("group_query_attention", "experimental_attention_variant"):
        del marks_by_name[implied]  # the number of groups, or which layers, is compared
    assert {name: {MARKS[name]} for name in marks_by_name} == marks_by_name


def differences_from_an_older_checkpoint() -> list[str]:
    saved, here = arguments(), arguments("--et-logit-softcap", "30")
    del saved.et_logit_softcap, saved.rotary_interleaved
    return [difference.name for difference in differences(saved, here)]


def test_setting_value_of_an_older_checkpoint_is_the_default() -> None:
    assert run_ranks(differences_from_an_older_checkpoint, 1) == [["et_logit_softcap"]]


def what_conversion_and_inference_change() -> tuple[list[str], list[str]]:
    """Return, on a rank, settings that conversion loses silently and that loading changes."""
    from megatron_ext.hf.architecture import from_args
    from megatron_ext.inference.loading import ParallelLayout, for_inference

    lost, overridden = [], []
    for base in (arguments(*flags) for flags in SOME):
        architecture = from_args(base)
        # Exported models leave the depths of multi-token prediction out.
        for name in (MARKS.keys() & vars(base).keys()) - {"mtp_num_layers"}:
            other = Namespace(**{**vars(base), name: changed(getattr(base, name))})
            if not any(differences(base, other)):
                continue
            with contextlib.suppress(UserError):
                lost += [name] if from_args(other) == architecture else []
        loaded = deepcopy(base)
        for_inference(loaded, ParallelLayout(tensor=2, expert=2), None)
        overridden += [difference.name for difference in differences(base, loaded)]
    return lost, overridden


def test_conversion_and_inference_keep_every_setting_or_refuse_it() -> None:
    assert run_ranks(what_conversion_and_inference_change, 1) == [([], [])]
