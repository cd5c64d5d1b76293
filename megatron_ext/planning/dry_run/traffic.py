"""Counter of the collectives and FLOPs of a training step, as torch dispatches them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_ext.planning.dry_run.memory import LiveTensors


class Collective(NamedTuple):
    """Kind of collective whose calls are counted together.

    Attributes:
        purpose: Use of the collective in training.
        operation: Name of the operation.
        group: Megatron's name of the process group.
        ranks: Size of the group.
    """

    purpose: str
    operation: str
    group: str
    ranks: int


class Amount(NamedTuple):
    """Calls and bytes of a collective on one rank.

    Attributes:
        calls: Number of calls.
        bytes: Bytes of the input or of the output, whichever are more; of an all-to-all those of
            the input. The part that a rank sends to itself is included.
    """

    calls: int
    bytes: int


MUON = "Muon"

# Purpose of the collectives of a group, unless `Traffic.purpose` sets another.
_PURPOSES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor parallel",
    "CONTEXT_PARALLEL_GROUP": "context parallel",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert dispatch",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert dispatch",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert dispatch",
    "EMBEDDING_GROUP": "tied embeddings",
}
_OPERATIONS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


_aten = torch.ops.aten


def _convolution_backward(
    gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, *rest: Any, **_: Any
) -> int:
    """Return the FLOPs of the gradients of a convolution's inputs and weight.

    torch's formula counts each channel of a convolution in groups as if it met all others.
    """
    computed: list[bool] = rest[-1]
    return 2 * gradient.numel() * weight[0].numel() * sum(computed[:2])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of two products: scores, and their sums of values."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Return the FLOPs of five products: scores again, and the gradients of four tensors."""
    sizes = 3 * query.shape[-1] + 2 * value.shape[-1]
    return 2 * query[..., 0].numel() * key.shape[-2] * sizes


_FLOPS = {
    **flop_registry,  # lacks the CPU's names of two kernels
    _aten.convolution_backward: _convolution_backward,
    # torch 2.9 requires as many heads of keys as of queries.
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Traffic(TorchDispatchMode):
    """Dispatch mode that counts collectives and FLOPs while it is active.

    Args:
        answers: Substitutes for operations that need data, for tensors without data.
        live: Counter of the tensors that operations create. Default: they are not counted.

    Attributes:
        collectives: Calls and bytes of each kind; groups of one rank are left out.
        flops: FLOPs of matrix products and attention without those of Muon. A multiplication and
            an addition count two.
    """

    def __init__(
        self,
        answers: Mapping[Any, Callable[..., Any]] | None = None,
        live: LiveTensors | None = None,
    ) -> None:
        super().__init__()
        self._live = live
        self.collectives: dict[Collective, Amount] = {}
        self.flops = 0
        self._answers = answers or {}
        self._purpose: str | None = None

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """Count collectives under the purpose `name`, for the duration of a block."""
        outer, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self._purpose = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        if self._live is not None:
            self._live.record((args, kwargs), result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation or its substitute, and count its collectives and FLOPs."""
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
            return _run_collective(func, args, kwargs)
        answer = self._answers.get(func)
        if answer is not None and args[0].is_meta:
            return answer(func, *args, **kwargs)
        result = func(*args, **kwargs)
        # The share of Muon's work differs from rank to rank.
        if self._purpose != MUON and (count := _FLOPS.get(func.overloadpacket)):
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        """Add a collective to the counts, unless its group has one rank."""
        index = next(i for i, arg in enumerate(args) if isinstance(arg, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(args[index])
        if group.size() == 1 or name == "barrier":
            return
        sizes = [_bytes(arg) for arg in args[:index]]  # outputs come before inputs
        operation = _OPERATIONS.get(name, name)
        # Two pipeline stages communicate over the default group too.
        point_to_point = operation in ("send", "receive")
        default = "pipeline" if point_to_point else "step statistics"
        purpose = self._purpose or _PURPOSES.get(group.group_desc, default)
        key = Collective(purpose, operation, group.group_desc, group.size())
        calls, total = self.collectives.get(key, (0, 0))
        size = sizes[-1] if operation == "all-to-all" else max(sizes)
        self.collectives[key] = Amount(calls + 1, total + size)


def _bytes(tensors: Any) -> int:
    """Return the bytes of a tensor or of nested lists of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _run_collective(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a collective, or skip one that torch cannot run on meta tensors."""
    name = func.overloadpacket.__name__
    if name.endswith("coalesced_") and _first_tensor(args).is_meta:
        return FakeWork().boxed()  # torch has no meta kernels for these
    return func(*args, **kwargs)


def _first_tensor(args: Any) -> Tensor:
    """Return the first tensor of nested lists."""
    return args if isinstance(args, Tensor) else _first_tensor(args[0])
