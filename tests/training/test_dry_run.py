"""`--dry-run` against the paper's totals, real ranks, and bytes counted on them."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import ROOT, run_ranks
from tests.megatron import TINY

RANKS = 4
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP2 = ("--expert-model-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer",)
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "DP4": (),
    "DP4-sharded": (*SHARDED, *OVERLAP),
    "TP2-EP2-DP2": (*TP2, *EP2, "--expert-tensor-parallel-size", "1", *SHARDED),
    "PP2-DP2": ("--pipeline-model-parallel-size", "2", *SHARDED, "--bf16"),
    "CP2-DP2": ("--context-parallel-size", "2", "--et-capacity", "none"),
}


class Counted(TorchDispatchMode):
    """Bytes of every collective that torch dispatches, by (operation, group)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        c10d = torch.ops.c10d
        # operation: name, argument whose bytes count, argument that is the group
        table = {
            c10d.allreduce_.default: ("all-reduce", 0, 1),
            c10d.allreduce_coalesced_.default: ("all-reduce", 0, 1),
            c10d._allgather_base_.default: ("all-gather", 0, 2),
            c10d.allgather_.default: ("all-gather", 0, 2),
            c10d.allgather_into_tensor_coalesced_.default: ("all-gather", 0, 2),
            c10d._reduce_scatter_base_.default: ("reduce-scatter", 1, 2),
            c10d.reduce_scatter_.default: ("reduce-scatter", 1, 2),
            c10d.reduce_scatter_tensor_coalesced_.default: ("reduce-scatter", 1, 2),
            c10d.alltoall_base_.default: ("all-to-all", 1, 2),
            c10d.broadcast_.default: ("broadcast", 0, 1),
            c10d.send.default: ("send", 0, 1),
            c10d.recv_.default: ("receive", 0, 1),
        }
        if func.namespace == "c10d" and func is not c10d.barrier.default:
            name, counted, index = table[func]
            group = dist.ProcessGroup.unbox(args[index])
            if group.size() > 1:
                leaves = tree_leaves(args[counted])
                size = sum(t.numel() * t.element_size() for t in leaves)
                self.bytes[name, group.group_desc] += size
        return func(*args, **(kwargs or {}))


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages that autograd saves, parameters apart."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._kept: dict[int, torch.Tensor] = {}  # kept alive, so that no address returns

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()
        if kept.untyped_storage().data_ptr() not in self._own:
            self._kept[kept.untyped_storage().data_ptr()] = kept
        return kept

    def bytes(self) -> int:
        return sum(kept.untyped_storage().nbytes() for kept in self._kept.values())


def nbytes(tensors: list[torch.Tensor], apart_from: set[int] = frozenset()) -> int:  # type: ignore[assignment]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in apart_from)


def _owned(model: Any, optimizer: Any) -> dict[str, int]:
    """What a rank owns after a step, in bytes, and how many parameters it holds."""
    weights = [p for chunk in model for p in chunk.parameters()]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    groups = [g for part in parts for g in part.optimizer.param_groups]
    stepped = [p for group in groups for p in group["params"]]
    state = [
        value
        for part in parts
        for values in part.optimizer.state.values()
        for value in values.values()
    ]
    addresses = {p.untyped_storage().data_ptr() for p in weights}
    return {
        "held": sum(p.numel() for p in weights),
        "parameters": nbytes(weights),
        "gradients": nbytes([p.main_grad for p in weights]),
        "optimizer": nbytes([*stepped, *state], apart_from=addresses),
    }


def _really(flags: list[str]) -> dict[str, Any]:
    """Train on this rank as a user does and count in the second step, which routes by expert
    choice, and in the fourth, which routes by thresholds."""
    from megatron.training import training

    seen: dict[str, Any] = {}
    train_step = training.train_step

    def counted(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        phase = {1: "expert choice", 3: "thresholds"}.get(kwargs["iteration"])
        if phase is None:
            return train_step(step, data, model, optimizer, *args, **kwargs)
        saved = Saved([p for chunk in model for p in chunk.parameters()])
        with Counted() as mode, saved:
            result = train_step(step, data, model, optimizer, *args, **kwargs)
        seen[phase] = {"bytes": mode.bytes, "saved": saved.bytes()}
        seen["owned"] = _owned(model, optimizer)
        return result

    training.train_step = counted
    sys.argv = [str(ROOT / "pretrain_et.py"), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return seen


def _predicted(flags: list[str]) -> list[dict[str, Any]]:
    """The same of every rank, in this one process and without a step."""
    from megatron_ext.arguments import parse_args
    from megatron_ext.training.dry_run.rank import Rank, fake_rank

    dist.destroy_process_group()
    args, config = parse_args([*flags, "--dry-run", str(RANKS)])
    ranks = []
    for number in range(RANKS):
        with contextlib.redirect_stdout(io.StringIO()), fake_rank(args, number):
            rank = Rank(args, config)
            choice, thresholds = (rank.take_step(by_threshold) for by_threshold in (False, True))
        ranks.append({"expert choice": choice, "thresholds": thresholds, "held": sum(w.numel() for w in rank.weights)})
    return ranks


def by_group(step: Any, routing: bool) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for key, amount in step.collectives.items():
        if (key.purpose == "routing") == routing:
            found[key.operation, key.group] += amount.bytes
    return found


ROUTING = ("all-reduce", "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP")
DISPATCH = ("all-to-all", "EXPERT_MODEL_PARALLEL_GROUP")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_predicts_what_real_ranks_hold_and_send(name: str) -> None:
    flags = [*TINY, *LAYOUTS[name]]
    real = run_ranks(_really, RANKS, flags, timeout=200)
    (predicted,) = run_ranks(_predicted, 1, flags, timeout=200)
    for rank, (truth, guess) in enumerate(zip(real, predicted)):
        memory = guess["thresholds"].memory
        for kind in ("parameters", "gradients", "optimizer"):
            assert getattr(memory, kind) == truth["owned"][kind], (rank, kind)
        assert guess["held"] == truth["owned"]["held"]
        for phase in ("expert choice", "thresholds"):
            counted = dict(truth[phase]["bytes"])
            counted.pop(ROUTING, None)
            expected = dict(by_group(guess[phase], routing=False))
            counted.pop(DISPATCH, None), expected.pop(DISPATCH, None)
            assert counted == expected, (rank, phase)
            print(rank, phase, truth[phase]["saved"], memory, truth[phase]["bytes"][ROUTING], by_group(guess[phase], routing=True))
    sent = [sum(r["expert choice"]["bytes"][DISPATCH] for r in real)]
    sent.append(sum(by_group(r["expert choice"], False)[DISPATCH] for r in predicted))
    assert sent[0] == sent[1]
    print(sent)
