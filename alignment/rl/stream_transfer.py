"""Transfer of weights as a stream from the memory of the training to the servers.

Rank 0 keeps the bytes of the served version in the memory of its CPU, because asynchronous rollouts
train the model while the servers still have the weights from before, and a restarted server
requires these. A thread of rank 0 sends them to the workers of one server at a time, whichever rank
calls that server.
"""

import atexit
import json
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import on_first_rank
from alignment.rl.vllm_servers import ServerRefused, VLLMServer, VLLMServers
from megatron_ext.console import console
from megatron_ext.errors import UserError
from megatron_ext.vllm import TRANSFER_BACK_END
from megatron_ext.vllm.weight_stream import (
    BUCKET_BYTES,
    Bucket,
    Stream,
    own_address,
    pack,
    send,
)

_ROUTER = ".gate."  # in the names of the tensors of a router
_POLL_INTERVAL = 0.01  # seconds between looks for requests of a stream


def stream_order(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in the order of a stream: as they come, but the routers last.

    vLLM keeps the tensors of a module until it has all of them, so that a router whose thresholds
    come last must come last as a whole.
    """
    routers = list[tuple[str, Tensor]]()
    for name, tensor in tensors:
        if _ROUTER in name:
            routers.append((name, tensor))
        else:
            yield name, tensor
    yield from routers


class StreamTransfer:
    """Transfer by the plug-in's back end of vLLM's weight transfer; see `WeightTransfer`."""

    def __init__(
        self,
        engine: AlignmentEngine,
        transport: str,
        patience: float = 600.0,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Begin to wait for requests of streams; a collective.

        Args:
            engine: Engine whose weights are served.
            transport: One of `weight_stream.TRANSPORTS`.
            patience: Seconds after which a rank of a stream that waits for the others fails.
            bucket_bytes: Size of the buckets.

        Raises:
            UserError: The transport requires GPUs, and there are none.
        """
        if transport == "nccl" and dist.get_backend() != "nccl":
            raise UserError(
                "--weight-transfer nccl requires training on GPUs. Choose folder, or gloo."
            )
        self.engine, self.transport, self.patience = engine, transport, patience
        self.bucket_bytes = bucket_bytes
        self.buckets: list[Bucket] = []
        self._hosts: dict[str, str] = {}  # of rank 0, as the server of an address reaches it
        self._port = on_first_rank(self._begin_to_serve)

    def prepare(self, version: int) -> None:
        """Gather a version into rank 0's memory, in place of the one before; a collective."""
        self.buckets = []
        tensors = stream_order(self.engine.parameters())
        if dist.get_rank() == 0:
            self.buckets = list(pack(tensors, self.bucket_bytes))
        else:
            for _ in tensors:  # a collective for each
                pass
        self._described = on_first_rank(lambda: [bucket.describe() for bucket in self.buckets])

    def update_weights(self, version: int, servers: VLLMServers) -> None:
        """Stream a version to all servers; see `WeightTransfer.update_weights`."""
        self._hosts = on_first_rank(lambda: {url: _address_for(url) for url in servers.urls})
        servers.call(lambda server: self.reload_lost_server(version, server))

    async def reload_lost_server(self, version: int, server: VLLMServer) -> None:
        """Stream a version to one server; see `WeightTransfer.reload_lost_server`."""
        while True:
            server.lost = False
            try:
                return await self._stream_to(server)
            except ServerRefused:
                if not server.lost:
                    raise
                # It was restarted in between, and knows nothing of the calls before.

    async def _stream_to(self, server: VLLMServer) -> None:
        async def post(path: str, body: dict[str, Any]) -> None:
            await server.while_healthy(server.post(path, body), lambda: "receives weights")

        stream = Stream(
            uuid.uuid4().hex, self._hosts[server.url], self._port, self.transport, self.patience
        )
        try:
            await post("/init_weight_transfer_engine", {"init_info": {"stream": asdict(stream)}})
        except ServerRefused as error:
            raise ServerRefused(
                f"{error} --weight-transfer {self.transport} requires the plug-in and "
                f'--weight-transfer-config \'{{"backend": "{TRANSFER_BACK_END}"}}\' of vLLM.'
            ) from error
        try:
            await post("/start_weight_update", {})
        except ServerRefused:  # a training that was killed may have left an update open
            await post("/finish_weight_update", {})
            await post("/start_weight_update", {})
        await post("/update_weights", {"update_info": {"buckets": self._described}})
        await post("/finish_weight_update", {})

    def _begin_to_serve(self) -> int:
        """Return the port of a store from which a thread takes requests of streams."""
        # It listens on all interfaces, whatever the host.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        device, stop = torch.cuda.current_device(), threading.Event()
        threading.Thread(target=self._serve, args=(torch.device(device), stop), daemon=True).start()
        atexit.register(stop.set)
        return int(self._store.port)

    def _serve(self, device: torch.device, stop: threading.Event) -> None:
        number = 1
        while not stop.wait(_POLL_INTERVAL):
            if self._store.check([f"request/{number}"]):
                request = json.loads(self._store.get(f"request/{number}"))
                threading.Thread(target=self._send, args=(*request, device), daemon=True).start()
                number += 1

    def _send(self, stream: dict[str, Any], size: int, device: torch.device) -> None:
        try:
            send(Stream(**stream), size, self.buckets, device)
        except RuntimeError as error:  # the server, too, reports an error
            console.warn(f"A server no longer receives weights: {error}")


def _address_for(url: str) -> str:
    try:
        return own_address(urlsplit(url).hostname or "")
    except OSError as error:
        raise UserError(
            f"--rollout-url {url} is not the address of a server: {error}. Correct it."
        ) from error
