"""Test of the FLOPs of training that runs record."""

from tests import megatron
from tests.distributed import run_ranks


def flops_of_a_token(*flags: str) -> float:
    """Return, on a rank, the FLOPs of a token of the tiny model with further flags."""
    from megatron_ext.flops import training_flops

    args, *_ = megatron.start(*flags)
    return training_flops(args, 1) / args.seq_length


def test_flops_follow_the_mean_fan_out_of_thresholds() -> None:
    [one] = run_ranks(flops_of_a_token, 1)
    [half] = run_ranks(flops_of_a_token, 1, "--et-mean-experts", "0.5")
    parameters_of_an_expert = 2 * 32 * 48
    assert one - half == 0.5 * 6 * parameters_of_an_expert
