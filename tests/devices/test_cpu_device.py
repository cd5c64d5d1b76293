"""The CPU device: what it answers, where it puts tensors, what is random, and a real training."""

import io
import logging
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.devices import cpu
from tests.distributed import HAS_GPU, ROOT, run_ranks

on_cpu = pytest.mark.skipif(HAS_GPU, reason="the CPU device is for machines without CUDA")

PRETENDING_CUDA = """
import torch, torch._dynamo, torch.distributed as dist

def picture():
    places = torch, torch.Tensor, torch.cuda, torch.random, torch.accelerator, dist
    return {(str(place), name): id(it) for place in places for name, it in vars(place).items()}

torch.cuda.is_available = lambda: True
before = picture()
from megatron_ext.devices import activate, is_cpu_device
assert activate() == activate() == "cuda" and not is_cpu_device()
after = picture()
changed = [key for key in before if after.get(key) != before[key]]
assert not changed, changed
assert not torch.cuda._initialized
"""


def test_torch_is_untouched_where_cuda_is_available():
    env = {**os.environ, "PYTHONPATH": os.fspath(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", PRETENDING_CUDA], env=env, cwd=ROOT, check=True)


@on_cpu
def test_activation_after_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_device", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    with pytest.raises(RuntimeError, match="before anything of megatron"):
        cpu.activate()


def _runtime():
    from megatron_ext.devices import activate, is_cpu_device

    assert activate() == "cpu"
    assert is_cpu_device()
    assert torch.cuda.is_available()
    assert not torch.accelerator.is_available()
    assert torch.cuda.current_device() == torch.cuda.random.current_device() == 0
    assert torch.cuda.device_count() == 1
    torch.cuda.set_device(1)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.get_device_properties(0).total_memory > 0

    side = torch.cuda.Stream()
    assert side == torch.cuda.current_stream() == torch.cuda.default_stream()
    side.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(side):
        side.record_event(end)
    end.synchronize()
    assert 0 <= start.elapsed_time(end) < 1e3
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(torch.cuda.Event())

    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    assert 0 < resident <= torch.cuda.max_memory_allocated()
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= resident
    assert torch.cuda.memory_stats()["no such statistic"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total

    done: list[int] = []
    torch.cuda._lazy_call(partial(done.append, 1))
    assert done == [1]
    torch.cuda.nvtx.range_push("a")
    torch.cuda.nvtx.range_pop()
    with torch.cuda.nvtx.range("b"):
        pass

    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()


@on_cpu
def test_cuda_answers_for_the_cpu():
    run_ranks(_runtime, 1)


def _placement():
    like = torch.ones(2)
    for device in ("cuda", "cuda:1", 0, torch.device("cuda"), torch.device("cuda", 1)):
        made = [
            torch.zeros(2, device=device),
            torch.tensor([1.0, 2.0], device=device),
            torch.arange(2, device=device),
            torch.empty_like(like, device=device),
            torch.full((2,), 1.0, device=device, pin_memory=True),
            torch.normal(0.0, 1.0, (2,), device=device),
            like.new_empty(2, device=device),
            like.to(device),
            like.to(device=device, dtype=torch.float64),
            torch.nn.Linear(2, 2, device=device).weight,
            torch.nn.Linear(2, 2).to(device).weight,
        ]
        assert {str(tensor.device) for tensor in made} == {"cpu"}
        with torch.device(device):
            assert torch.zeros(2).device.type == "cpu"
    assert like.cuda() is like.pin_memory() is like.to("cuda") is like
    like.record_stream(torch.cuda.current_stream())
    assert like.to(torch.int64).dtype == torch.int64
    assert like.to(like.double()).dtype == torch.float64
    assert like.data.device.type == "cpu"
    assert not like.is_cuda

    with torch.device("meta"):
        assert torch.zeros(2).is_meta
    assert torch.zeros(2, device="meta").is_meta
    with pytest.raises(RuntimeError, match="no such device"):
        torch.zeros(2, device="no such device")

    scripted = torch.jit.script(_scripted)
    assert torch.equal(scripted(like), like + 1)


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(2)


@on_cpu
def test_cuda_tensors_are_placed_in_host_memory():
    run_ranks(_placement, 1)


def _types():
    names = {dtype: torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)}
    assert names == {
        torch.float32: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
    }
    with torch.device("cpu"):
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert vars(torch.cuda)["FloatTensor"] is torch.FloatTensor
    assert isinstance(torch.zeros(1), torch.FloatTensor)


@on_cpu
def test_tensor_types_have_the_names_of_cuda():
    run_ranks(_types, 1)


def _load_from_gpu():
    file = io.BytesIO()
    with mock.patch("torch.serialization.location_tag", return_value="cuda:3"):
        torch.save({"w": torch.arange(3)}, file)
    for where in (None, "cuda", "cuda:0", torch.device("cuda"), "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=where)["w"]
        assert loaded.device.type == "cpu"
        assert loaded.tolist() == [0, 1, 2]


@on_cpu
def test_files_saved_on_a_gpu_load():
    run_ranks(_load_from_gpu, 1)


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
def test_host_and_device_draw_from_states_of_their_own():
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
def test_data_loaders_leave_the_device_state_alone(workers):
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
def test_seeding_the_device_leaves_the_host_alone():
    run_ranks(_fork_rng, 1)


def _tracker(rank):
    """What a rank draws in Megatron's parallel region and outside it, and what was logged."""
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
def test_parallel_regions_draw_per_rank_reproducibly_and_without_a_warning():
    (first, quiet), (second, also_quiet) = run_ranks(_tracker_on_ranks, 2)
    alike = [torch.equal(ours, theirs) for ours, theirs in zip(first, second)]
    assert alike == [False, False, True]
    assert quiet == also_quiet == []


def _recompute(checkpoint):
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random.model_parallel_cuda_manual_seed(11, tp_rank=0, ep_rank=0, etp_rank=0)
    tracker = megatron_random.get_cuda_rng_tracker()
    seen = []

    def layer(x):
        with tracker.fork():
            x = torch.nn.functional.dropout(x, 0.5)
        x = torch.nn.functional.dropout(x, 0.5)
        seen.append(x.detach().clone())
        return x

    x = torch.ones(256, requires_grad=True)
    y = checkpoint(layer, x)
    torch.rand(5)
    after = torch.cuda.get_rng_state(), torch.get_rng_state()
    y.sum().backward()
    forward, recomputed = seen
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
    seen = []

    def layer(x):
        x = torch.nn.functional.dropout(x, 0.5)
        seen.append(x.detach().clone())
        return x * x

    x = torch.ones(256, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.rand(5)
    y.sum().backward()
    assert torch.equal(*seen)


@on_cpu
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torch_recomputation_restores_dropout_masks(use_reentrant):
    run_ranks(_plain_recompute, 1, use_reentrant)


def _collectives():
    rank = dist.get_rank()
    for async_op in (False, True):
        parts = [torch.empty(size, 2) for size in (3, 0, 1)]
        mine = torch.full_like(parts[rank], float(rank))
        handle = dist.all_gather(parts, mine, async_op=async_op)
        assert (handle is not None) == async_op
        if handle:
            assert handle.wait()
            assert handle.is_completed()
        assert [part.tolist() for part in parts] == [[[0.0, 0.0]] * 3, [], [[2.0, 2.0]]]

    pair = dist.new_group([0, 2])
    if rank != 1:
        parts = [torch.empty(1), torch.empty(2)]
        dist.all_gather(parts, torch.full((1 if rank == 0 else 2,), float(rank)), group=pair)
        assert [part.tolist() for part in parts] == [[0.0], [2.0, 2.0]]

    # Rank i sends j rows of i to rank j.
    sends, receives = torch.tensor([0, 1, 2]), torch.tensor([rank] * 3)
    output = torch.empty(3 * rank)
    dist.all_to_all_single(output, torch.full((3,), float(rank)), receives, sends)
    assert output.tolist() == sorted([0.0, 1.0, 2.0] * rank)


@on_cpu
def test_collectives_that_gloo_refuses():
    run_ranks(_collectives, 3)


def _pretrain(*flags):
    """Train with Megatron's own `pretrain` and return the parameters of this rank."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_ext.devices import cpu_default_args
    from megatron_ext.training.data import forward_step, train_valid_test_datasets

    models: list[torch.nn.Module] = []

    def remembering(iterator, model, *args):
        models[:] = [model]
        return forward_step(iterator, model, *args)

    with mock.patch.object(sys, "argv", ["pretrain", *cpu_default_args(), *MOE, *flags]):
        args = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        train_valid_test_datasets,
        ModelType.encoder_or_decoder,
        remembering,
    )
    return {name: p.detach().float() for name, p in models[0].named_parameters()}


MOE = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--split", "90,5,5"),
    *("--train-iters", "4", "--lr", "1e-2", "--lr-decay-iters", "8"),
    *("--eval-iters", "1", "--eval-interval", "3", "--log-interval", "1"),
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--moe-aux-loss-coeff", "0.01", "--expert-model-parallel-size", "2"),
    *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--no-create-attention-mask-in-dataloader"),
    *("--moe-token-dispatcher-type", "alltoall", "--use-distributed-optimizer"),
    *("--ckpt-format", "torch_dist", "--save-interval", "2"),
]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-save"]


def _different(left, right):
    """By rank, the parameters that are not the same bits."""
    return [
        [name for name in ours if not torch.equal(ours[name], theirs[name])]
        for ours, theirs in zip(left, right)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every rank's parameters after a run with dropout, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return run_ranks(_pretrain, 2, *RESHARDABLE, "--save", str(folder)), folder


@on_cpu
@pytest.mark.slow
def test_megatron_resumes_exactly(trained):
    parameters, folder = trained
    resumed = run_ranks(_pretrain, 2, *RESHARDABLE, "--load", str(folder), "--ckpt-step", "2")
    assert _different(parameters, resumed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_resumes_exactly_in_bf16(tmp_path):
    straight = run_ranks(_pretrain, 2, "--bf16", "--save", str(tmp_path))
    resumed = run_ranks(_pretrain, 2, "--bf16", "--load", str(tmp_path), "--ckpt-step", "2")
    assert _different(straight, resumed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_trains_the_same_when_it_recomputes(trained):
    how = ["full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    recomputed = run_ranks(_pretrain, 2, "--recompute-granularity", *how)
    assert _different(trained[0], recomputed) == [[], []]


@on_cpu
@pytest.mark.slow
def test_megatron_trains_alike_with_either_dispatcher(trained):
    gathered = run_ranks(_pretrain, 2, "--moe-token-dispatcher-type", "allgather")
    for ours, theirs in zip(trained[0], gathered):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
