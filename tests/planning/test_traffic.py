"""Tests of the counted FLOPs of operations that torch counts differently."""

import torch
import torch.nn.functional as F

from megatron_ext.planning.dry_run.traffic import Traffic


def test_gradients_of_a_convolution_in_groups_take_twice_its_flops() -> None:
    inputs = torch.randn(2, 12, 10, requires_grad=True)
    weight = torch.randn(12, 1, 4, requires_grad=True)
    with Traffic() as traffic:
        output = F.conv1d(inputs, weight, groups=12)
        forward = traffic.flops
        assert forward == 2 * output.numel() * 4
        output.sum().backward()
    assert traffic.flops == 3 * forward
