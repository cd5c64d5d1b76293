"""Tests that values that would end a run late are refused before it starts."""

from argparse import Namespace
from functools import cache

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_ext.errors import ToolParser, UserError
from megatron_ext.ranges import check_ranges
from megatron_ext.run_flags import add_arguments

SMALL = [
    *("--train-iters", "8", "--lr", "1e-3", "--eval-interval", "4", "--micro-batch-size", "2"),
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "64"),
]


@cache
def parser() -> ToolParser:
    parser = ToolParser(prog="pretrain_et.py", add_help=False, allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    return parser


def parsed(*flags: str) -> Namespace:
    return parser().parse_args([*SMALL, *flags])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--log-interval", "0"], "--log-interval 0 must be at least 1"),
        (["--tensorboard-log-interval", "0"], "--tensorboard-log-interval 0 must be at least 1"),
        (["--save-interval", "0"], "--save-interval 0 must be at least 1"),
        (["--log-memory-interval", "0"], "--log-memory-interval 0"),
        (["--save-interval", "-2"], "--save-interval -2"),
        (["--exit-interval", "-1"], "--exit-interval -1 must not be negative"),
        (["--weight-decay", "-1"], "--weight-decay -1 must not be negative"),
        (["--lr", "nan"], "--lr nan is not a finite number"),
        (["--norm-epsilon", "0"], "--norm-epsilon 0 must be above 0"),
        (["--hidden-size", "0"], "--hidden-size 0 must be at least 1"),
        (
            ["--rotary-seq-len-interpolation-factor", "0"],
            "--rotary-seq-len-interpolation-factor 0 must be at least 1",
        ),
        (["--kv-channels", "0"], "--kv-channels 0 must be at least 1"),
        (["--seed", "0"], "--seed 0 must be at least 1"),
        (["--num-workers", "-1"], "--num-workers -1"),
        (["--adam-beta2", "1"], "--adam-beta2 1 must be in [0, 1)"),
        (["--hidden-dropout", "1.5"], "--hidden-dropout 1.5 must be in [0, 1)"),
        (["--lr-warmup-fraction", "1"], "--lr-warmup-fraction 1 must be in [0, 1)"),
        (["--eval-micro-batch-size", "0"], "--eval-micro-batch-size 0 must be at least 1"),
        (["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by 0"),
        (["--min-lr", "-1"], "--min-lr -1 must not be negative"),
        (["--min-lr", "1"], "--min-lr 1 must not be above --lr 0.001"),
        (["--lr-warmup-init", "1"], "--lr-warmup-init 1 must not be above --lr"),
        (["--lr-decay-style", "WSD"], "needs --lr-wsd-decay-iters. Add it"),
        (
            ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "9"],
            "--lr-wsd-decay-iters 9 must not be above --train-iters 8",
        ),
        (["--start-weight-decay", "0.1"], "need --weight-decay-incr-style linear or cosine"),
        (["--weight-decay-incr-style", "linear"], "needs --start-weight-decay and --end-weight"),
        (
            ["--weight-decay-incr-style", "cosine", "--start-weight-decay", "0.2"]
            + ["--end-weight-decay", "0.1"],
            "--end-weight-decay 0.1 must not be below --start-weight-decay 0.2",
        ),
        (["--rampup-batch-size", "2", "2", "8"], "Use --step-batch-size-schedule"),
        (
            ["--global-batch-size", "4", "--step-batch-size-schedule", "0:2"],
            "both set the batch size",
        ),
        (["--step-batch-size-schedule", "0:3"], "the batch of 3 samples is not divisible by"),
        (["--step-batch-size-schedule", "0:4 640:2"], "batches must not shrink"),
        (["--step-batch-size-schedule", "0:2 10:4"], "must be a sample apart"),
        (["--step-batch-size-schedule", "640:4"], "must begin with 0:BATCH"),
        (["--step-batch-size-schedule", "four"], "must be pairs TOKENS:BATCH"),
        (["--phase-transition-iterations", "a"], "must be numbers of steps"),
        (["--phase-transition-iterations", "4"], "requires --train-samples"),
        (["--multiple-validation-sets"], "needs --full-validation"),
        (
            ["--num-distributed-optimizer-instances", "3"],
            "instances 3 does not divide the 1 data-parallel ranks. Choose a divisor.",
        ),
        (["--full-validation"], "needs --multiple-validation-sets"),
    ],
)
def test_value_outside_of_its_range_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_ranges(parsed(*flags), ranks=1)
    assert message in str(caught.value)


def test_values_that_disable_a_setting_are_accepted() -> None:
    off = ["--exit-interval", "0", "--manual-gc-interval", "0", "--clip-grad", "0"]
    check_ranges(parsed(*off, "--lr", "0", "--eval-iters", "0"), ranks=1)
    check_ranges(parsed("--step-batch-size-schedule", "0:2 640:4 1K:8"), ranks=1)
    muon = parsed("--optimizer", "muon")
    muon.lr = None  # it has the paper's
    check_ranges(muon, ranks=1)


def test_a_missing_learning_rate_is_named() -> None:
    args = parsed()
    args.lr = None
    with pytest.raises(UserError, match=r"The learning rate is missing\. Add --lr"):
        check_ranges(args, ranks=1)
