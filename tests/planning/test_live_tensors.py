"""Tests of the bytes of all tensors of a step, against sums by hand and torch's allocator."""

import pytest
import torch
from torch import Tensor

from megatron_ext.planning.dry_run.memory import LiveTensors
from megatron_ext.planning.dry_run.traffic import Traffic


def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the cross-entropy of logits in fp32, as a language model computes it."""
    logits = (hidden @ weight.T).float()
    return -torch.log_softmax(logits, -1)[..., 0].sum()


def test_tensors_count_until_they_are_freed() -> None:
    live = LiveTensors()
    x = torch.empty(100, device="meta", requires_grad=True)
    with Traffic(live=live):
        total = (x * 2).relu().sum()
        # Two tensors of 400 bytes at once, and then the sum next to the saved output of relu.
        assert live.peak == 800
        before, _ = live.begin_phase()
        assert (before, live.peak) == (800, 404)
        total.backward()
        del total
        x.grad = None
        live.begin_phase()
    assert live.peak == 0


def test_views_of_tensors_from_before_do_not_count() -> None:
    live = LiveTensors()
    x = torch.empty(100, device="meta")
    with Traffic(live=live):
        y = x.view(10, 10).t()
        y += 1
        assert live.peak == 0
        z = y.contiguous().view(100)
        assert live.peak == 400 and z.numel() == 100


def test_logits_are_tensors_with_a_row_for_the_vocabulary() -> None:
    live = LiveTensors(vocabulary=50)
    hidden = torch.empty(4, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(50, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Traffic(live=live):
        loss_of(hidden, weight)
    # Logits in bf16 and fp32 are alive together, or those in fp32 and their log-probabilities.
    assert live.logits == 2 * 4 * 50 * 4


def test_peak_is_that_of_torchs_allocator_on_real_tensors() -> None:
    """The reference is the CPU allocator's record of the same step."""
    sizes = (64, 32, 1000)

    def step(device: str) -> None:
        hidden = torch.ones(sizes[0], sizes[1], device=device, requires_grad=True)
        weight = torch.ones(sizes[2], sizes[1], device=device, requires_grad=True)
        loss_of(hidden, weight).backward()

    live = LiveTensors(1000)
    with Traffic(live=live):
        step("meta")
    step("cpu")  # libraries allocate their own memory the first time
    with torch.profiler.profile(profile_memory=True) as profile:
        step("cpu")
    now = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert live.peak == pytest.approx(most, rel=0.02)
