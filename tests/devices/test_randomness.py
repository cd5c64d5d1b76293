"""Tests of random numbers on the CPU device."""

import logging
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices.on_cpu import on_cpu
from tests.distributed import run_ranks


def _two_states():
    from megatron_ext.devices.randomness import drawing_on_host

    places = st.sampled_from(["host", "device"])

    @settings(max_examples=50)
    @given(st.integers(0, 2**32), st.lists(st.tuples(places, st.integers(1, 20)), max_size=8))
    def holds(seed, draws):
        torch.manual_seed(seed)
        reference = {place: torch.Generator().manual_seed(seed) for place in ("host", "device")}
        for place, count in draws:
            expected = torch.rand(count, generator=reference[place])
            with drawing_on_host() if place == "host" else nullcontext():
                assert torch.equal(torch.rand(count), expected)
        assert torch.equal(torch.get_rng_state(), reference["host"].get_state())
        assert torch.equal(torch.cuda.get_rng_state(), reference["device"].get_state())
        assert torch.initial_seed() == torch.cuda.initial_seed() == seed

    holds()


@on_cpu
def test_host_and_device_draw_from_separate_random_states():
    run_ranks(_two_states, 1)


class _Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(2)


def _loaders(workers):
    torch.manual_seed(7)
    device, host = torch.cuda.get_rng_state(), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(_Noise(), shuffle=True, num_workers=workers)
    batches = torch.cat(list(loader))
    assert torch.equal(torch.cuda.get_rng_state(), device)
    assert not torch.equal(torch.get_rng_state(), host)
    torch.set_rng_state(host)
    assert torch.equal(torch.cat(list(loader)), batches)


@on_cpu
@pytest.mark.parametrize("workers", [0, 1])
def test_data_loaders_leave_the_device_random_state(workers):
    run_ranks(_loaders, 1, workers)


def _fork_rng():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert not torch.equal(torch.cuda.get_rng_state(), states[1])


@on_cpu
def test_device_seed_leaves_the_host_random_state():
    run_ranks(_fork_rng, 1)


def _tracker(rank):
    """Return a rank's draws inside and outside Megatron's parallel region, and the log."""
    from megatron.core.tensor_parallel import random as megatron_random

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(megatron_random.__name__).addHandler(handler)
    megatron_random.model_parallel_cuda_manual_seed(11, tp_rank=rank, ep_rank=rank, etp_rank=0)
    tracker = megatron_random.get_cuda_rng_tracker()
    host = torch.get_rng_state()

    def draw():
        with tracker.fork():
            parallel = torch.nn.functional.dropout(torch.ones(64), 0.5)
            with tracker.fork(megatron_random.get_expert_parallel_rng_tracker_name()):
                expert = torch.empty(64).normal_()
        return parallel, expert, torch.nn.functional.dropout(torch.ones(64), 0.5)

    saved = tracker.get_states(), torch.cuda.get_rng_state()
    first = draw()
    second = draw()
    tracker.set_states(saved[0])
    torch.cuda.set_rng_state(saved[1])
    for once, again, later in zip(first, draw(), second):
        assert torch.equal(once, again)
        assert not torch.equal(once, later)
    assert torch.equal(torch.get_rng_state(), host)
    return first, records


def _tracker_on_ranks():
    return _tracker(dist.get_rank())


@on_cpu
def test_rng_tracker_draws_per_rank_reproducibly_without_a_warning():
    (first, quiet), (second, also_quiet) = run_ranks(_tracker_on_ranks, 2)
    alike = [torch.equal(ours, theirs) for ours, theirs in zip(first, second)]
    assert alike == [False, False, True]
    assert quiet == also_quiet == []


def _recompute(checkpoint):
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random.model_parallel_cuda_manual_seed(11, tp_rank=0, ep_rank=0, etp_rank=0)
    tracker = megatron_random.get_cuda_rng_tracker()
    draws = []

    def layer(x):
        with tracker.fork():
            x = torch.nn.functional.dropout(x, 0.5)
        x = torch.nn.functional.dropout(x, 0.5)
        draws.append(x.detach().clone())
        return x

    x = torch.ones(256, requires_grad=True)
    y = checkpoint(layer, x)
    torch.rand(5)
    after = torch.cuda.get_rng_state(), torch.get_rng_state()
    y.sum().backward()
    forward, recomputed = draws
    assert torch.equal(forward, recomputed)
    assert x.grad is not None
    assert torch.equal(x.grad, forward)
    assert torch.equal(torch.cuda.get_rng_state(), after[0])
    assert torch.equal(torch.get_rng_state(), after[1])


def _megatron_checkpoint(layer, x):
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(layer, False, x)


@on_cpu
def test_recomputation_restores_dropout_masks():
    run_ranks(_recompute, 1, _megatron_checkpoint)


def _plain_recompute(use_reentrant):
    draws = []

    def layer(x):
        x = torch.nn.functional.dropout(x, 0.5)
        draws.append(x.detach().clone())
        return x * x

    x = torch.ones(256, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.rand(5)
    y.sum().backward()
    assert torch.equal(*draws)


@on_cpu
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torch_recomputation_restores_dropout_masks(use_reentrant):
    run_ranks(_plain_recompute, 1, use_reentrant)
