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


def test_attention_with_shared_keys_takes_the_flops_of_one_key_for_each_query() -> None:
    def flops(shared: int) -> tuple[int, int]:
        """Return the FLOPs of the forward pass and of both, with keys shared by query heads."""
        query = torch.randn(2, 6, 10, 8, requires_grad=True)
        key, value = (torch.randn(2, 6 // shared, 10, 8, requires_grad=True) for _ in "kv")
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with Traffic() as traffic:
            output = kernel(query, key, value, 0.0, True)[0]
            forward = traffic.flops
            output.sum().backward()
        return forward, traffic.flops

    scores = 2 * 2 * 6 * 10 * 10 * 8  # of one product
    assert flops(1) == flops(3) == (2 * scores, 7 * scores)
