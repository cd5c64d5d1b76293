"""Tests that contradictory flags are refused, and that flags without effect cause a warning."""

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import pytest

from megatron_ext.conflicts import check_conflicts
from megatron_ext.errors import UserError

DEFAULTS = {
    "router_type": "expert-threshold", "num_experts": 8, "ckpt_format": "torch_dist",
    "train_iters": 10000, "train_samples": None, "et_warmup_iters": 4000, "et_capacity": 0.5,
    "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": None,
    "moe_router_pre_softmax": False, "moe_router_dtype": None,
    "moe_router_force_load_balancing": False, "moe_router_force_biased": None,
    "bf16": False, "fp16": False, "tokenizer_type": "SentencePieceTokenizer", "vocab_size": None,
    "skip_train": False, "moe_layer_freq": 1, "num_layers": 4, "transformer_impl": "local",
    "use_precision_aware_optimizer": False, "lr_decay_iters": None, "lr_decay_samples": None,
    "lr_warmup_iters": 0, "lr_warmup_samples": 0, "optimizer": "adam", "lr": None,
    "muon_embedding_lr": 0.2, "muon_head_lr": 0.004, "muon_reference_width": 768,
    "muon_momentum": 0.95, "muon_momentum_warmup_iters": 300, "add_bias_linear": True,
    "use_distributed_optimizer": False, "expert_model_parallel_size": 1,
    "eval_interval": 1000, "et_threshold_estimator": "ema", "bias_gelu_fusion": False,
    "swiglu": False, "quick_geglu": False, "squared_relu": False, "mtp_num_layers": None,
    "experimental_attention_variant": None, "linear_attention_freq": None,
    "hybrid_layer_pattern": None, "recompute_modules": None,
}  # fmt: skip

DEPTHS = {
    "mtp_num_layers": 1, "context_parallel_size": 1, "pipeline_model_parallel_layout": None,
    "recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None,
}  # fmt: skip


def warnings(**changes: Any) -> list[str]:
    return check_conflicts(Namespace(**{**DEFAULTS, **changes}), set(changes))


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"train_samples": 5},
            "--train-iters 10000 and --train-samples 5 both set the length of training",
        ),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 both set the precision"),
        (
            DEPTHS | {"context_parallel_size": 2, "calculate_per_token_loss": True},
            "--context-parallel-size 2 is incompatible with --calculate-per-token-loss",
        ),
        (DEPTHS | {"pipeline_model_parallel_layout": "Et|tL"}, "Leave the layout out."),
        (
            DEPTHS | {"recompute_granularity": "full", "recompute_method": "block"},
            "requires --recompute-method uniform and --recompute-num-layers 1",
        ),
        (
            {
                "experimental_attention_variant": "gated_delta_net",
                "linear_attention_freq": 2,
                "et_norm_scale": True,
                "sequence_parallel": False,
                "tensor_model_parallel_size": 2,
            },
            "--tensor-model-parallel-size 2 requires --sequence-parallel",
        ),
        ({"tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
        ({"train_iters": 0}, "Give --train-iters of at least 1"),
        ({"lr_warmup_iters": 10000}, "--lr-warmup-iters 10000 must be below --train-iters 10000"),
        ({"eval_interval": 0}, "--eval-interval 0 must be at least 1. Use --eval-iters 0"),
        ({"lr_decay_iters": 0}, "--lr-warmup-iters 0 must be below --lr-decay-iters 0"),
        (
            {"train_iters": None, "train_samples": 8, "lr_warmup_samples": 9},
            "--lr-warmup-samples 9 must be below --train-samples 8",
        ),
        ({"moe_layer_freq": [0, 1]}, "--moe-layer-freq is a list of 2, but --num-layers is 4"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch is not supported"),
        ({"moe_aux_loss_coeff": 0.01}, "--moe-aux-loss-coeff is incompatible with --router-type"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "without an auxiliary loss. Leave it out"),
        (
            {"moe_router_load_balancing_type": "aux_loss"},
            "--moe-router-load-balancing-type is incompatible",
        ),
        ({"moe_router_topk_scaling_factor": 2.5}, "use --et-gate for the weight"),
        ({"moe_router_score_function": "softmax"}, "use --et-gate for the weight"),
        ({"moe_router_pre_softmax": True}, "use --et-gate for the weight"),
        ({"moe_router_dtype": "fp64"}, "thresholds are fp32"),
        (
            {"moe_router_force_load_balancing": True},
            "--moe-router-force-load-balancing is incompatible",
        ),
        ({"moe_router_force_biased": 1.0}, "--moe-router-force-biased is incompatible"),
    ],
)
def test_check_conflicts_refuses_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        warnings(**values)
    assert message in str(caught.value)
    if all(name.startswith("moe_router") or name == "moe_aux_loss_coeff" for name in values):
        # other routers read these flags
        assert warnings(**values, router_type="token-choice") == []
        assert warnings(**values, num_experts=None) == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fp16": True}, "--fp16 is incompatible with --optimizer muon. Use --bf16"),
        (
            {"decoupled_lr": 0.1},
            "--decoupled-lr is incompatible with --optimizer muon. Use --muon-em",
        ),
        ({"decoupled_min_lr": 0.1}, "decays to the same fraction"),
        ({"use_mup": True}, "Use --muon-reference-width, which scales"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload is incompatible"),
        ({"num_distributed_optimizer_instances": 2}, "Muon supports one instance"),
        (
            {"use_layer_wise_param_layout": False},
            "--no-use-layer-wise-param-layout is incompatible",
        ),
        (
            {"use_distributed_optimizer": True, "expert_model_parallel_size": 2},
            "does not support biases of experts. Add --disable-bias-linear",
        ),
        ({"lr": 0.0}, "--lr 0 must be above 0 with --optimizer muon"),
        ({"muon_embedding_lr": -1.0}, "--muon-embedding-lr -1 must be above 0"),
        ({"muon_reference_width": 0}, "--muon-reference-width 0 must be above 0"),
        ({"muon_momentum_warmup_iters": -1}, "--muon-momentum-warmup-iters -1 must not be neg"),
        ({"muon_momentum": 1.0}, "--muon-momentum 1 must be in [0, 1)"),
        ({"optimizer": "dist_muon"}, "old name of --optimizer muon with --use-distributed-opt"),
    ],
)
def test_check_conflicts_refuses_settings_that_muon_lacks(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        warnings(**{"optimizer": "muon", **values})
    assert message in str(caught.value)


def test_check_conflicts_accepts_muon_without_a_warning() -> None:
    fine = {"add_bias_linear": False, "use_distributed_optimizer": True, "lr": 0.02}
    assert warnings(optimizer="muon", **fine, expert_model_parallel_size=2) == []


@pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="transformer-engine is installed"
)
@pytest.mark.parametrize(
    "values",
    [{"transformer_impl": "transformer_engine"}, {"use_precision_aware_optimizer": True}],
)
def test_check_conflicts_names_transformer_engine_where_it_is_needed(
    values: dict[str, Any],
) -> None:
    with pytest.raises(
        UserError, match=r"needs the package transformer-engine and a GPU\. Install it"
    ):
        warnings(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train_iters": 4000}, ["--et-warmup-iters 4000 is not below --train-iters 4000"]),
        ({"et_warmup_iters": 20, "train_iters": 9}, ["--et-warmup-iters 20 is not below"]),
        (
            {"router_type": "token-choice", "et_gate": "relu", "et_capacity": 0.1},
            [
                "--et-capacity has no effect with --router-type token-choice",
                "--et-gate has no effect with --router-type token-choice",
            ],
        ),
        (
            {"router_type": "quantile-balancing", "et_mean_experts": 1.5},
            ["--et-mean-experts has no effect with --router-type quantile-balancing"],
        ),
        (
            {"num_experts": None, "et_ema_decay": 0.9, "train_iters": 10},
            ["--et-ema-decay has no effect with a model without --num-experts"],
        ),
        (
            {"router_type": "expert-choice", "et_warmup_iters": 5, "et_cutoff_pool": "step"},
            ["--et-warmup-iters has no effect with --router-type expert-choice"],
        ),
        (
            {"muon_head_lr": 0.01, "muon_router": "muon"},
            [
                "--muon-head-lr has no effect with --optimizer adam",
                "--muon-router has no effect with --optimizer adam",
            ],
        ),
        (
            {"optimizer": "muon", "muon_router": "muon", "num_experts": None},
            ["--muon-router has no effect with a model without --num-experts"],
        ),
        (
            {"et_capacity": None, "et_capacity_pool": "global"},
            ["--et-capacity-pool has no effect with --et-capacity none"],
        ),
    ],
)
def test_check_conflicts_warns_of_flags_without_effect(
    values: dict[str, Any], message: list[str]
) -> None:
    sentences = warnings(**values)
    assert len(sentences) == len(message)
    for sentence, start in zip(sentences, message):
        assert sentence.startswith(start)


def test_check_conflicts_ignores_defaults() -> None:
    for router_type in ("expert-threshold", "token-choice", "quantile-balancing"):
        assert warnings(router_type=router_type) == []
    harmless = {"moe_aux_loss_coeff": 0, "moe_router_load_balancing_type": "none"}
    assert warnings(**harmless, moe_router_dtype="fp32") == []


@pytest.mark.parametrize(
    "values, flag",
    [
        ({"squared_relu": True}, "--squared-relu"),
        ({"add_bias_linear": False, "num_experts": None}, "--disable-bias-linear"),
        ({}, "--num-experts"),
        ({"num_experts": None}, None),
        ({"swiglu": True}, None),
    ],
)
def test_fusion_of_bias_and_gelu_is_turned_off_where_it_fails(
    values: dict[str, Any], flag: str | None
) -> None:
    args = Namespace(**{**DEFAULTS, "bias_gelu_fusion": True, "et_warmup_iters": 0, **values})
    warned = check_conflicts(args, set())
    assert args.bias_gelu_fusion == (flag is None)
    assert [w.split()[0] for w in warned] == ([flag] if flag else [])
