"""Tests that impossible layouts are refused with the nearest possible ones."""

import re
from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.planning.layout import FLAGS, RULES, RunSizes, check_layout, nearest, run_sizes

D12 = {
    "num_layers": 12, "hidden_size": 768, "num_attention_heads": 6, "group_query_attention": False,
    "num_query_groups": 1, "ffn_hidden_size": None, "swiglu": False, "num_experts": 16,
    "moe_ffn_hidden_size": 1536, "moe_shared_expert_intermediate_size": 1536, "seq_length": 2048,
    "micro_batch_size": 4, "global_batch_size": 48, "sequence_parallel": True,
    "tensor_model_parallel_size": 1, "context_parallel_size": 1,
    "pipeline_model_parallel_size": 1, "num_layers_per_virtual_pipeline_stage": None,
    "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None, "optimizer": "adam",
    "use_distributed_optimizer": True, "muon_router": "adam", "et_norm_scale": False,
}  # fmt: skip


def refusal(ranks: int, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(Namespace(**{**D12, **changes}), ranks)
    return str(caught.value)


TP, CP = "tensor_model_parallel_size", "context_parallel_size"
PP, EP = "pipeline_model_parallel_size", "expert_model_parallel_size"
VIRTUAL = "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    "ranks, changes, message",
    [
        (
            6,
            {TP: 4, "num_attention_heads": 12},
            "6 ranks cannot be distributed over --tensor-model-parallel-size 4. Use "
            "--tensor-model-parallel-size 2, or start 4 or 8 ranks",
        ),
        (
            8,
            {TP: 2, PP: 2, CP: 4},
            "--tensor-model-parallel-size 2 times --context-parallel-size 4 times "
            "--pipeline-model-parallel-size 2. Use",
        ),
        (
            4,
            {TP: 4},
            "--num-attention-heads 6 is not divisible by --tensor-model-parallel-size 4. Use "
            "--tensor-model-parallel-size 2",
        ),
        (
            1,
            {"group_query_attention": True, "num_query_groups": 4},
            "--num-attention-heads 6 is not divisible by --num-query-groups 4. Use "
            "--num-query-groups 3 or 6",
        ),
        (
            2,
            {TP: 2, "group_query_attention": True, "num_query_groups": 3},
            "--num-query-groups 3 is not divisible by --tensor-model-parallel-size 2. Use",
        ),
        (
            6,
            {TP: 3, "group_query_attention": True, "num_query_groups": 2, "seq_length": 2049},
            "--tensor-model-parallel-size 3 is not divisible by --num-query-groups 2. Use "
            "--num-query-groups 1 or 3",
        ),
        (
            2,
            {TP: 2, "moe_ffn_hidden_size": 1535},
            "--moe-ffn-hidden-size 1535 is not divisible by --expert-tensor-parallel-size 2. Use "
            "--expert-tensor-parallel-size 1, or --moe-ffn-hidden-size 1534 or 1536",
        ),
        (
            2,
            {TP: 2, "moe_shared_expert_intermediate_size": 1535},
            "--moe-shared-expert-intermediate-size 1535 is not divisible by",
        ),
        (2, {TP: 2, "ffn_hidden_size": 999}, "--ffn-hidden-size 999 is not divisible by"),
        (
            12,
            {EP: 3},
            "--num-experts 16 is not divisible by --expert-model-parallel-size 3. Use "
            "--expert-model-parallel-size 2 or 4, or --num-experts 15 or 18",
        ),
        (
            4,
            {EP: 8},
            "4 ranks cannot be distributed over --expert-model-parallel-size 8. Use "
            "--expert-model-parallel-size 4",
        ),
        (
            4,
            {EP: 4, PP: 2},
            "a pipeline stage of 2 ranks cannot be distributed over --expert-model-parallel-size "
            "4. Use --expert-model-parallel-size 2, or start 8 ranks",
        ),
        (
            5,
            {PP: 5},
            "--num-layers 12 is not divisible by --pipeline-model-parallel-size 5. Use "
            "--num-layers 10 or 15",
        ),
        (
            4,
            {PP: 4, VIRTUAL: 2},
            "--num-layers 12 is not divisible by --num-layers-per-virtual-pipeline-stage 2 times "
            "--pipeline-model-parallel-size 4. Use --num-layers-per-virtual-pipeline-stage 1 or 3",
        ),
        (
            4,
            {PP: 4, VIRTUAL: 1, "global_batch_size": 24},
            "--global-batch-size 24 is not divisible by --micro-batch-size 4 times "
            "--pipeline-model-parallel-size 4. Use --micro-batch-size 3 or 6",
        ),
        (1, {VIRTUAL: 1}, "needs --pipeline-model-parallel-size of at least 2"),
        (
            2,
            {CP: 2, "seq_length": 2046},
            "--seq-length 2046 is not divisible by 2 times --context-parallel-size 2. Use "
            "--context-parallel-size 1, or --seq-length 2044 or 2048",
        ),
        (
            2,
            {TP: 2, "seq_length": 2047},
            "--seq-length 2047 is not divisible by --tensor-model-parallel-size 2. Use "
            "--tensor-model-parallel-size 1, or --seq-length 2046 or 2048",
        ),
        (
            5,
            {},
            "--global-batch-size 48 is not divisible by --micro-batch-size 4 times 5 data-parallel "
            "ranks. Use --global-batch-size 40 or 60, or start 4 or 6 ranks",
        ),
        (
            2,
            {"micro_batch_size": 48},
            "--global-batch-size 48 is too small for --micro-batch-size 48 times 2 data-parallel "
            "ranks. Use --micro-batch-size 24",
        ),
        (2, {TP: 2, "sequence_parallel": False}, "needs --sequence-parallel. Add it"),
        (
            2,
            {TP: 2, "expert_tensor_parallel_size": 1, "optimizer": "muon"},
            "have 2 copies where all other parameters have one. Leave it out, or use "
            "--expert-model-parallel-size 2",
        ),
        (
            4,
            {PP: 4, "optimizer": "muon", "muon_router": "muon"},
            "leaves AdamW no parameter on the inner of more than 2 pipeline stages",
        ),
        (1, {"num_experts": -1}, "--num-experts -1 must be at least 0"),
        (1, {TP: 0}, "--tensor-model-parallel-size 0 must be at least 1"),
        (2, {CP: 2, "hierarchical_context_parallel_sizes": [2]}, "Use --context-parallel-size"),
    ],
)
def test_refusals(ranks: int, changes: dict[str, object], message: str) -> None:
    output = refusal(ranks, **changes)
    assert message in output
    assert "\n" not in output


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (1, {}),
        (8, {TP: 2, EP: 2, CP: 2, "global_batch_size": 64}),
        (4, {PP: 4, VIRTUAL: 1}),
        (2, {PP: 2, "num_layers": 11, "decoder_first_pipeline_num_layers": 5}),
        (6, {TP: 6, "group_query_attention": True, "seq_length": 2052}),  # one KV head, copied
        (4, {PP: 4, VIRTUAL: 1, "global_batch_size": 24, "microbatch_group_size_per_vp_stage": 6}),
        (2, {TP: 2, "num_experts": None, "sequence_parallel": False}),
        (1, dict.fromkeys(("num_layers", "num_attention_heads", "seq_length", "num_experts"))),
    ],
)
def test_layouts_that_work(ranks: int, changes: dict[str, object]) -> None:
    check_layout(Namespace(**{**D12, **changes}), ranks)


layouts = st.fixed_dictionaries(
    {
        **{name: st.sampled_from([1, 2, 3, 4, 6, 8]) for name in (TP, CP, PP, EP)},
        "num_layers": st.integers(1, 24),
        "num_attention_heads": st.sampled_from([4, 6, 8, 12]),
        "num_experts": st.integers(1, 24),
        "seq_length": st.sampled_from([96, 100, 2048]),
        "global_batch_size": st.integers(1, 64),
        "micro_batch_size": st.integers(1, 4),
    }
)


def sound(layout: RunSizes) -> bool:
    return all(rule.holds(layout) for rule in RULES)


@given(layouts, st.integers(1, 24))
def test_advice_is_the_nearest_setting_that_works(sizes: dict[str, int], ranks: int) -> None:
    args = Namespace(**{**D12, **sizes})
    layout = run_sizes(args, ranks)
    try:
        check_layout(args, ranks)
    except UserError as error:
        advice = str(error).removesuffix(".").rsplit(". ", 1)[1]
    else:
        assert sound(layout)
        return
    names = {flag: name for name, flag in FLAGS.items()}
    advised: dict[str, list[int]] = {}
    for way in advice.removeprefix("Use ").split(", or "):
        words = re.findall(r"--[a-z-]+|\d+", way)
        name = names[words.pop(0)] if words[0].startswith("--") else "ranks"
        advised[name] = [int(word) for word in words]
    assert advised

    def changed(name: str, value: int) -> RunSizes:
        sizes: dict[str, Any] = {name: value}
        if name == "tensor":  # experts' tensor parallelism follows
            sizes["expert_tensor"] = value
        return replace(layout, **sizes)

    is_fixed = {(n, v): sound(changed(n, v)) for n, values in advised.items() for v in values}
    # One change may not be enough; then it is right for the rule that was named.
    assert all(is_fixed.values()) or not any(is_fixed.values())
    if all(is_fixed.values()):
        for name, values in advised.items():
            here = getattr(layout, name)
            for value in values:
                between = range(min(here, value) + 1, max(here, value))
                assert not any(sound(changed(name, other)) for other in between)


def test_nearest_looks_both_ways() -> None:
    assert nearest(6, lambda n: n % 4 == 0, 9) == [4, 8]
    assert nearest(6, lambda n: n % 4 == 0, 7) == [4]
    assert nearest(3, lambda n: n % 4 == 0, 9) == [4]
    assert nearest(8, lambda n: 8 % n == 0, 99) == [4]


def test_every_size_has_a_flag() -> None:
    sizes = {field.name for field in fields(RunSizes) if field.type in (int, "int")}
    assert sizes == set(FLAGS)
