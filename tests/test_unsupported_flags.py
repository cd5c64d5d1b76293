"""Flags of Megatron that would end a run in a stack trace are refused with the fix."""

from argparse import ArgumentParser
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_ext.errors import UserError
from megatron_ext.run_flags import add_arguments
from megatron_ext.unsupported_flags import check_unsupported
from tests.distributed import run_ranks

FINE = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--num-experts", "4"),
    *("--disable-bias-linear", "--position-embedding-type", "rope"),
]


def check(*flags: str) -> None:
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args([*FINE, *flags])
    check_unsupported(args)


def test_supported_flags_pass() -> None:
    check()
    check("--kv-channels", "6", "--rotary-percent", "0.5", "--rerun-mode", "disabled")
    check("--kv-channels", "15", "--position-embedding-type", "learned_absolute")
    check("--main-params-dtype", "fp32", "--dataloader-type", "cyclic", "--optimizer", "muon")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--multi-latent-attention",
            "--multi-latent-attention is not supported by this project. Leave it out",
        ),
        ("--heterogeneous-layers-config-path x", "is not supported by this project. Leave it out"),
        ("--mtp-use-repeated-layer", "--mtp-use-repeated-layer is not supported by this project"),
        ("--save-dgrads-interval 1", "--save-dgrads-interval is not supported by this project."),
        ("--fault-injector-num-ranks -1", "is not supported by this project. Leave it out."),
        ("--overlap-moe-expert-parallel-comm", "is not supported by this project. Leave it out"),
        ("--hybrid-override-pattern M-", "Use --hybrid-layer-pattern"),
        ("--experimental-attention-variant dsa", "is not supported by this project. Use gated_d"),
        ("--moe-use-upcycling", "is not supported by this project. Use python -m tools.upcycle"),
        ("--init-method-xavier-uniform", "Use --init-method-std"),
        (
            "--no-pad-vocab-size",
            "--disable-pad-vocab-size is not supported by this project. Use --make-vocab",
        ),
        (
            "--dataloader-type external",
            "--dataloader-type external is not supported by this project. Use single",
        ),
        ("--rerun-mode report_stats", "Use disabled or validate_results"),
        ("--optimizer soap", "--optimizer soap is not supported by this project. Use adam or muon"),
        (
            "--tokenizer-type MultimodalTokenizer",
            "Use HuggingFaceTokenizer or SentencePieceTokenizer",
        ),
        ("--sharp-enabled-group dp", "--sharp-enabled-group dp needs --use-sharp. Add it"),
        ("--dataloader-fast-cache-load", "needs --data-cache-path. Add it"),
        ("--exp-avg-dtype bf16", "needs --use-precision-aware-optimizer"),
        ("--hidden-size 30", "makes heads of 15, which is odd"),
        ("--kv-channels 15", "--kv-channels 15 is odd, and --position-embedding-type rope rotates"),
    ],
)
def test_unsupported_flags_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(*flags.split())
    assert message in str(caught.value)


def refusals(*cases: str) -> list[str]:
    """Return the messages for some flags on a rank, which has the CPU device."""
    messages = []
    for flags in cases:
        with pytest.raises(UserError) as caught:
            check(*flags.split())
        messages.append(str(caught.value))
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is a GPU")
def test_flags_that_need_a_gpu_are_refused_without_one() -> None:
    cases = ("--gpu-sniff-test-interval 1", "--use-nccl-ub", "--distributed-backend nccl")
    [messages] = run_ranks(refusals, 1, *cases)
    assert messages == [
        "--gpu-sniff-test-interval needs a GPU. Leave it out.",
        "--use-nccl-ub needs a GPU. Leave it out.",
        "--distributed-backend nccl needs a GPU. Leave it out.",
    ]


@pytest.mark.skipif(
    find_spec("nvidia_resiliency_ext") is not None, reason="nvidia-resiliency-ext is installed"
)
def test_flag_without_its_package_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs the package nvidia-resiliency-ext\. Install it"):
        check("--enable-ft-package")


def test_biases_of_experts_are_refused() -> None:
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args: Any = parser.parse_args([flag for flag in FINE if flag != "--disable-bias-linear"])
    with pytest.raises(UserError, match="--num-experts is incompatible with biases"):
        check_unsupported(args)
    args.moe_shared_expert_intermediate_size = 8
    with pytest.raises(UserError, match="--moe-shared-expert-intermediate-size is incompatible"):
        check_unsupported(args)
    args.num_experts = None
    check_unsupported(args)
