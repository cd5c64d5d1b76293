"""Streams of weights: workers of a server receive exactly what the exported folder has."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.alignment.chat_model import make_model as make_dense
from tests.distributed import run_ranks
from tests.vllm.servers import make_model as make_experts

WORKERS = 2
BUCKET_BYTES = 20_000


def receive_as_worker(stream, update, rank):
    """Return the order, and copies of the tensors, of one worker."""
    from megatron_ext.vllm.weight_stream import Stream, receive

    cpu = torch.device("cpu")
    buckets = receive(Stream(**stream), update["buckets"], rank, 1 + WORKERS, cpu)
    return [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket]


class Workers:
    """Server that keeps what its workers receive."""

    url = "http://127.0.0.1:1/v1"
    urls = [url]

    async def post(self, path, body):
        if path == "/init_weight_transfer_engine":
            self.stream = body["init_info"]["stream"]
        if path == "/update_weights":
            update = body["update_info"]
            self.sizes = [size for size, _ in update["buckets"]]
            with ThreadPoolExecutor() as pool:
                calls = [
                    asyncio.get_running_loop().run_in_executor(
                        pool, receive_as_worker, self.stream, update, 1 + worker
                    )
                    for worker in range(WORKERS)
                ]
                self.received = await asyncio.gather(*calls)

    async def while_healthy(self, work, _):
        return await work

    def call(self, work):
        """Call as `VLLMServers.call` does, but from the last rank, as for a lost server."""
        import torch.distributed as dist

        if dist.get_rank() == dist.get_world_size() - 1:
            asyncio.run(work(self))
        dist.barrier()


def stream_and_export(model, place, layout, transport):
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization
    from alignment.rl.stream_transfer import StreamTransfer

    engine = MegatronEngine(model, Optimization(steps=9), MegatronLayout(**layout))
    engine.export(place)
    server: Any = Workers()
    transfer = StreamTransfer(engine, transport, 60.0, BUCKET_BYTES)
    for version in range(2):
        transfer.prepare(version)
        transfer.update_weights(version, server)
    return getattr(server, "received", None), getattr(server, "sizes", None)


@pytest.mark.parametrize(
    "experts, ranks, layout, transport",
    [
        (False, 1, {}, "gloo"),
        (False, 2, {"tensor": 2}, "ipc"),
        (True, 1, {}, "ipc"),
        (True, 2, {"tensor": 2}, "gloo"),
        (True, 2, {"expert": 2}, "gloo"),
        (True, 2, {"pipeline": 2}, "gloo"),
    ],
)
def test_stream_equals_the_exported_folder(experts, ranks, layout, transport, tmp_path):
    if experts:
        make_experts(tmp_path / "model", "paper")
    else:
        make_dense(tmp_path / "model")
    *_, (received, sizes) = run_ranks(
        stream_and_export, ranks, tmp_path / "model", tmp_path / "export", layout, transport
    )
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    folder = {
        name: tensor
        for file in {*index["weight_map"].values()}
        for name, tensor in load_file(tmp_path / "export" / file).items()
    }
    for worker in received:
        assert len(worker) == len(folder)
        for name, tensor in worker:
            assert tensor.dtype == folder[name].dtype and torch.equal(tensor, folder[name]), name
    names = [name for name, _ in received[0]]
    assert names == [name for name, _ in received[1]]
    is_router = [".gate." in name for name in names]
    assert is_router == sorted(is_router)
    assert sum(".gate.thresholds" in name for name in names) == 3 * experts
    # Embeddings are larger than a bucket.
    largest = max(tensor.nbytes for tensor in folder.values())
    assert len(sizes) > 5 and max(sizes) == largest > BUCKET_BYTES
