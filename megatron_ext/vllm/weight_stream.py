"""Streams of weights from a training run to the workers of a vLLM server.

Both sides import this module, which needs torch alone. A stream consists of buckets, the bytes of
several tensors, which the training broadcasts in a process group whose other ranks are the server's
workers.
"""

import ast
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TRANSPORTS = ("gloo", "nccl", "ipc")
"""Ways of a stream: process groups of gloo or NCCL, or memory that processes share."""
BUCKET_BYTES = 2**28
"""Maximum size of a bucket, in bytes, unless one tensor is larger."""
_ALIGNMENT = 16  # bytes; a view of bytes as another data type must begin at a multiple of its size

TensorPlace = tuple[str, str, Sequence[int], int]
"""Name, data type, shape, and first byte in the bucket of a tensor."""


@dataclass(frozen=True)
class Bucket:
    """Bytes of several tensors.

    Attributes:
        places: The tensors in it.
        data: The bytes, uint8 `[size]`.
    """

    places: list[TensorPlace]
    data: Tensor

    def describe(self) -> tuple[int, list[TensorPlace]]:
        """Return the size and the tensors, as JSON values."""
        return self.data.numel(), self.places


def pack(tensors: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Copy tensors into buckets in the memory of the CPU, in their order.

    Args:
        tensors: Names and tensors. One bucket of them is in memory at a time.
        limit: Maximum size of a bucket, in bytes, unless one tensor is larger.
    """
    waiting, size = list[tuple[TensorPlace, Tensor]](), 0
    for name, tensor in tensors:
        bytes_ = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if waiting and size + bytes_ > limit:
            yield _bucket(waiting, size)
            waiting, size = [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = (name, dtype, list(tensor.shape), size)
        waiting.append((place, tensor.detach().cpu()))
        size += bytes_
    if waiting:
        yield _bucket(waiting, size)


def _bucket(tensors: list[tuple[TensorPlace, Tensor]], size: int) -> Bucket:
    data = torch.zeros(size, dtype=torch.uint8)
    for place, tensor in tensors:
        _view(place, data).copy_(tensor)
    return Bucket([place for place, _ in tensors], data)


def unpack(places: Sequence[TensorPlace], data: Tensor) -> list[tuple[str, Tensor]]:
    """Return the names and tensors of a bucket, which share its memory.

    Raises:
        ValueError: A tensor does not fit into the bucket.
    """
    return [(place[0], _view(place, data)) for place in places]


def _view(place: TensorPlace, data: Tensor) -> Tensor:
    name, dtype_name, shape, begin = place
    dtype = getattr(torch, dtype_name)
    end = begin + torch.Size(shape).numel() * dtype.itemsize
    if end > data.numel():
        raise ValueError(f"The tensor {name} of shape {list(shape)} does not fit into its bucket.")
    return data[begin:end].view(dtype).view(torch.Size(shape))


@dataclass(frozen=True)
class Stream:
    """Address and settings of one stream.

    Attributes:
        name: Name that no other stream of the training has.
        host: Address of the training's first rank.
        port: Port of its store.
        transport: One of `TRANSPORTS`. They differ in nothing else.
        timeout: Seconds after which a rank that waits for the others fails.
    """

    name: str
    host: str
    port: int
    transport: str
    timeout: float


class ProcessGroupChannel:
    """Process group of one stream. Rank 0 sends, the others are the workers of a server."""

    def __init__(
        self, store: dist.Store, stream: Stream, rank: int, size: int, device: torch.device
    ) -> None:
        """Join the group; waits for its other ranks.

        Args:
            store: Store of this stream, to which all ranks are connected.
            stream: The stream.
            rank: Rank of this process in the group.
            size: Number of ranks.
            device: Device of this process.
        """
        limit = timedelta(seconds=stream.timeout)
        self._group: Any
        if stream.transport == "nccl":
            self.device = device
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            self.device = torch.device("cpu")
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = limit
            host = stream.host if rank == 0 else own_address(stream.host)
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            self._group = dist.ProcessGroupGloo(store, rank, size, gloo)

    def broadcast(self, data: Tensor) -> None:
        """Copy the bytes of rank 0, which are on `device`, into those of all ranks."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([data], options).wait()

    def close(self) -> None:
        """Leave the group, which ends a call of another rank that waits for this one."""
        self._group.abort()


class SharedMemoryChannel:
    """Memory of rank 0 that the workers, on the same machine, copy: by CUDA IPC on GPUs."""

    def __init__(
        self, store: dist.Store, stream: Stream, rank: int, size: int, device: torch.device
    ) -> None:
        """Make a channel; see `ProcessGroupChannel`."""
        self._store, self._rank, self.device = store, rank, device
        self._readers, self._number = range(1, size), 0

    def broadcast(self, data: Tensor) -> None:
        """Copy the bytes of rank 0 into those of all ranks."""
        key = f"bucket/{self._number}"
        self._number += 1
        if self._rank:
            handle = ast.literal_eval(self._store.get(key).decode())
            data.untyped_storage().copy_(self._open(handle, data))
            if data.is_cuda:
                torch.cuda.synchronize(data.device)
            self._store.set(f"{key}/{self._rank}", "")
            return
        with NamedTemporaryFile(dir="/dev/shm") as file:
            if data.is_cuda:
                handle = data.untyped_storage()._share_cuda_()
            else:
                handle = file.name
                self._open(handle, data).copy_(data.untyped_storage())
            self._store.set(key, repr(handle))
            self._store.wait([f"{key}/{reader}" for reader in self._readers])

    @staticmethod
    def _open(handle: Any, data: Tensor) -> Any:
        if data.is_cuda:
            return torch.UntypedStorage._new_shared_cuda(*handle)
        return torch.UntypedStorage.from_file(handle, shared=True, nbytes=data.nbytes)

    def close(self) -> None:
        """Do nothing: memory that no process uses is released."""


def own_address(host: str) -> str:
    """Return the address under which a host reaches this one.

    Raises:
        OSError: The name of the host is unknown.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def send(stream: Stream, size: int, buckets: Iterable[Bucket], device: torch.device) -> None:
    """Send buckets to the workers of a server.

    Args:
        stream: The stream.
        size: Number of ranks, this one included.
        buckets: The buckets.
        device: Device of this process.
    """
    store = _connect(stream, "127.0.0.1")
    channel = _open(store, stream, 0, size, device)
    try:
        for bucket in buckets:
            channel.broadcast(bucket.data.to(channel.device))
        # If this rank left before the others, they might lose what they have not read.
        store.wait([f"{stream.name}/left/{rank}" for rank in range(1, size)])
    finally:
        channel.close()


def receive(
    stream: Stream,
    buckets: Sequence[tuple[int, Sequence[TensorPlace]]],
    rank: int,
    size: int,
    device: torch.device,
) -> Iterator[list[tuple[str, Tensor]]]:
    """Request a stream, and yield the names and tensors of each bucket.

    Args:
        stream: The stream, whose name must be new.
        buckets: Descriptions of the buckets.
        rank: Number of this worker, from 1.
        size: Number of ranks, that of the training included.
        device: Device of this process.
    """
    store = _connect(stream, stream.host)
    if rank == 1:
        store.set(f"request/{store.add('requests', 1)}", json.dumps([asdict(stream), size]))
    channel = _open(store, stream, rank, size, device)
    try:
        for bytes_, places in buckets:
            data = torch.empty(bytes_, dtype=torch.uint8, device=channel.device)
            channel.broadcast(data)
            yield unpack(places, data)
        if channel.device.type == "cuda":
            torch.cuda.synchronize(channel.device)  # a broadcast must not be aborted
    finally:
        store.set(f"{stream.name}/left/{rank}", "")
        channel.close()


def _open(
    store: dist.Store, stream: Stream, rank: int, size: int, device: torch.device
) -> ProcessGroupChannel | SharedMemoryChannel:
    kind = SharedMemoryChannel if stream.transport == "ipc" else ProcessGroupChannel
    return kind(dist.PrefixStore(stream.name, store), stream, rank, size, device)


def _connect(stream: Stream, host: str) -> dist.Store:
    timeout = timedelta(seconds=stream.timeout)
    return dist.TCPStore(host, stream.port, is_master=False, timeout=timeout)
