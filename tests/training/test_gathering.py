"""Tests of the distributed optimizer's state, gathered for a checkpoint one tensor at a time."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

SIZES = (3, 40, 5, 17, 31)  # of parameters, 96 elements with padding; some span ranks
KEYS = ("param", "exp_avg", "exp_avg_sq")


def optimizer():
    """Return the parts of a distributed optimizer that Megatron reads, with distinct values."""
    size, rank = dist.get_world_size(), dist.get_rank()
    params = [torch.nn.Parameter(torch.empty(length)) for length in SIZES]
    index, ranges, state, start = {}, {}, {}, 0
    part = 96 // size
    for param in params:
        end = start + param.numel()
        index[param] = (start, end, 0)
        low, high = max(start, rank * part), min(end, (rank + 1) * part)
        if low < high:
            local = SimpleNamespace(start=low - rank * part, end=high - rank * part)
            ranges[param] = {"gbuf_local": local}
            state[param] = {
                key: torch.arange(low, high, dtype=torch.float32) + 1000 * number
                for number, key in enumerate(KEYS)
            }
        start = end
    bucket = SimpleNamespace(grad_data=torch.empty(96), offset=0, numel_unpadded=96)
    return SimpleNamespace(
        data_parallel_group=dist.group.WORLD,
        data_parallel_group_gloo=dist.group.WORLD,
        gbuf_ranges=[{torch.float32: [{"param_map": ranges}]}],
        buffers=[SimpleNamespace(buckets=[bucket], param_index_map=index, numel_unpadded=96)],
        optimizer_state_keys=KEYS[1:],
        _get_main_param_and_optimizer_states=lambda param: dict(state[param]),
    )


def gather(asynchronous):
    """Return, on a rank, the state that Megatron and this project gather, and shared storage."""
    from megatron_ext.training import gathering

    own_optimizer = optimizer()
    settings = SimpleNamespace(async_save=asynchronous)
    with mock.patch.object(gathering, "get_args", return_value=settings):
        ours = gathering.gather_state(own_optimizer, return_on_all_ranks=True)
    theirs = gathering._gather_buffers(own_optimizer)
    if dist.get_rank():
        return ours, theirs
    places = [(start, end) for start, end, _ in own_optimizer.buffers[0].param_index_map.values()]
    ours, theirs = ours[0][torch.float32], theirs[0][torch.float32]
    first = next(iter(own_optimizer.buffers[0].param_index_map))
    own = own_optimizer._get_main_param_and_optimizer_states(first)["param"]
    shared = ours["param"][slice(*places[0])].data_ptr() == own.data_ptr()
    tensors = [
        [[state[key][start:end].clone() for key in KEYS] for start, end in places]
        for state in (ours, theirs)
    ]
    return *tensors, shared


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathered_state_equals_that_of_megatron(ranks):
    [(ours, theirs, shared), *others] = run_ranks(gather, ranks, False)
    for here, there in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert shared  # without a copy
    assert others == [(None, None)] * (ranks - 1)


def test_asynchronous_save_gets_a_copy_of_the_state():
    [(_, _, shared)] = run_ranks(gather, 1, True)
    assert not shared


PADDED = [(20, 3), (5, 17, 1)]  # parameters of each bucket, which has 24 elements with padding


def gather_buckets(on_gpu):
    """Return, on the first rank, whether the state of every parameter is its own."""
    from megatron_ext.training import gathering

    size, rank = dist.get_world_size(), dist.get_rank()
    part, index, buckets, ranges, state = 24 // size, {}, [], [], {}
    for number, lengths in enumerate(PADDED):
        offset = start = 24 * number
        own = {}
        for length in lengths:
            param, end = torch.nn.Parameter(torch.empty(length)), start + length
            index[param] = (start, end, number)
            low = max(start, offset + rank * part)
            high = min(end, offset + (rank + 1) * part)
            if low < high:
                first = low - offset - rank * part
                own[param] = {"gbuf_local": SimpleNamespace(start=first, end=first + high - low)}
                state[param] = {
                    key: torch.arange(low, high).float() + 1000 * place
                    for place, key in enumerate(KEYS)
                }
            start = end
        ranges.append({"param_map": own})
        buckets.append(
            SimpleNamespace(grad_data=torch.empty(24), offset=offset, numel_unpadded=start - offset)
        )
    unpadded = sum(bucket.numel_unpadded for bucket in buckets)
    assert unpadded < 48
    sharded = SimpleNamespace(
        data_parallel_group=dist.group.WORLD,
        data_parallel_group_gloo=dist.group.WORLD,
        gbuf_ranges=[{torch.float32: ranges}],
        buffers=[SimpleNamespace(buckets=buckets, param_index_map=index, numel_unpadded=unpadded)],
        optimizer_state_keys=KEYS[1:],
        _get_main_param_and_optimizer_states=lambda param: dict(state[param]),
    )
    settings = SimpleNamespace(async_save=False)
    with (
        mock.patch.object(gathering, "get_args", return_value=settings),
        mock.patch.object(gathering, "is_cpu_device", return_value=not on_gpu),
    ):
        gathered = gathering.gather_state(sharded)
    if rank:
        return gathered is None
    tensors = gathered[0][torch.float32]
    return all(
        torch.equal(tensors[key][start:end], torch.arange(start, end).float() + 1000 * place)
        for place, key in enumerate(KEYS)
        for start, end, _ in index.values()
    )


@pytest.mark.parametrize("on_gpu", [False, True])
def test_state_of_padded_buckets_belongs_to_its_parameter(on_gpu):
    assert run_ranks(gather_buckets, 2, on_gpu) == [True, True]
