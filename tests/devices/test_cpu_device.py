"""Tests of the CPU device: its answers, and the placement of tensors."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import types
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from megatron_ext.devices import cpu
from tests.devices.on_cpu import on_cpu
from tests.distributed import ROOT, run_ranks

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


def test_activate_leaves_torch_untouched_with_cuda():
    env = {**os.environ, "PYTHONPATH": os.fspath(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", PRETENDING_CUDA], env=env, cwd=ROOT, check=True)


def _importable(folder: str) -> list[str]:
    """Return the packages that need a GPU and that a rank can import, including a folder's."""
    sys.path.insert(0, folder)
    results = []
    for name in ("transformer_engine", "apex"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            results.append(name)
    return results


@on_cpu
def test_activate_hides_packages_that_need_a_gpu(tmp_path):
    for name in ("transformer_engine", "apex"):
        (tmp_path / f"{name}.py").touch()
    assert run_ranks(_importable, 1, str(tmp_path)) == [[]]


def test_default_args_on_cuda_turn_off_kernels_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_device", "cuda")
    of_apex = "fused_weight_gradient_mlp_cuda"
    for module in ("transformer_engine", of_apex):
        monkeypatch.setitem(sys.modules, module, None)
    assert cpu.device_default_args() == ["--no-rope-fusion", "--no-gradient-accumulation-fusion"]
    monkeypatch.delitem(sys.modules, of_apex)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{of_apex}.py").touch()
    assert cpu.device_default_args() == ["--no-rope-fusion"]


@on_cpu
def test_activate_after_the_import_of_megatron_is_refused(monkeypatch):
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
def test_torch_cuda_functions_describe_the_cpu():
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
def test_torch_load_reads_files_saved_on_a_gpu():
    run_ranks(_load_from_gpu, 1)


def _collectives():
    rank = dist.get_rank()
    for async_op in (False, True):
        parts = [torch.empty(size, 2) for size in (3, 0, 1)]
        own = torch.full_like(parts[rank], float(rank))
        handle = dist.all_gather(parts, own, async_op=async_op)
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
def test_collectives_that_gloo_lacks_equal_their_definitions():
    run_ranks(_collectives, 3)
