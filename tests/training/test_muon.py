"""Tests of Muon and AdamW on real ranks against both in one process, and of their checkpoints."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_ext.optimizer import momentum_at
from tests.distributed import run_ranks
from tests.training.layouts import (
    EP2,
    MODEL,
    ONE_RANK,
    OVERLAP,
    PP2,
    SHARDED,
    TP2,
    WHOLE_EXPERTS,
    Layout,
    _pretrain,
    train,
)

STEPS, SAVED, WARMUP = 10, 5, 4
RATES = {"muon": 0.02, "embedding": 0.2, "head": 0.004}  # the defaults
FLAGS = (
    *("--optimizer", "muon", "--lr", "0.02", "--min-lr", "0.002", "--lr-decay-style", "WSD"),
    *("--muon-reference-width", "8", "--muon-momentum-warmup-iters", str(WARMUP)),
    *("--group-query-attention", "--num-attention-heads", "4", "--num-query-groups", "2"),
    *("--train-iters", str(STEPS), "--et-warmup-iters", "4", "--save-interval", str(SAVED)),
    *("--num-layers", "2", "--moe-layer-freq", "[0,1]"),
)
LAYOUTS = [
    ONE_RANK["fp32"],
    Layout("DP 2", 2, 2, (*SHARDED, *OVERLAP)),
    Layout("TP 2", 2, 1, TP2),
    Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED)),
    Layout("EP 2", 2, 2, EP2),
    Layout("PP 2", 2, 1, (*PP2, *SHARDED)),
]


class Reference:
    """Muon and AdamW on whole parameters, as in their papers, in fp64.

    `step` takes the place of a Megatron optimizer's in a run on one rank.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        zero = torch.zeros(())
        self.averages = {name: [zero, zero] for name in self.parameters}  # of g, and of g * g
        self.steps = 0

    def step(self) -> tuple[bool, float, None]:
        left = min((STEPS - self.steps) / (STEPS / 5), 1.0)
        factor = (0.1 + 0.9 * left) * (32 / 8) ** -0.5
        momentum = 0.85 + 0.10 * min(self.steps / WARMUP, 1.0)
        self.steps += 1
        for name, parameter in self.parameters.items():
            gradient = parameter.main_grad.double()
            if "embedding" in name or "output" in name or "router" in name:
                rate = RATES["embedding" if "embedding" in name else "head"]
                update = self._adam(name, gradient)
            else:
                rate, update = RATES["muon"], self._muon(name, gradient, momentum)
            parameter.data -= factor * rate * update
        return True, 0.0, None

    def _adam(self, name: str, gradient: Tensor) -> Tensor:
        average = self.averages[name]
        average[0] = 0.8 * average[0] + 0.2 * gradient
        average[1] = 0.95 * average[1] + 0.05 * gradient**2
        mean, square = average[0] / (1 - 0.8**self.steps), average[1] / (1 - 0.95**self.steps)
        return mean / (square.sqrt() + 1e-10)

    def _muon(self, name: str, gradient: Tensor, momentum: float) -> Tensor:
        average = self.averages[name]
        average[0] = momentum * average[0] + (1 - momentum) * gradient
        update = momentum * average[0] + (1 - momentum) * gradient
        if "linear_qkv" not in name:
            return orthogonal(update)
        heads = update.view(2, 4, 8, 32)  # of each KV head: two queries, a key and a value
        parts = [heads[:, :2], heads[:, 2:3], heads[:, 3:]]
        parts = [orthogonal(part.reshape(-1, 32)).view(part.shape) for part in parts]
        return torch.cat(parts, dim=1).view_as(update)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return five steps of the quintic iteration, scaled by the shape, `[d_out, d_in]`."""
    x = matrix / max(float(matrix.norm()), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5 * x


def _pretrain_by_reference(flags: list[str]) -> None:
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def with_reference(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        optimizer.step = Reference(model[0]).step
        return model, optimizer, scheduler

    training.setup_model_and_optimizer = with_reference
    _pretrain([*flags, "--no-save-optim"])


def weights(run: Path, step: int = STEPS, prefix: str = "") -> dict[str, Tensor]:
    """Return whole tensors of a run's checkpoint by their global names."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
        and name.startswith(prefix or ("decoder", "embedding", "output_layer"))
        and name.endswith("weight")
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    # Tensor parallelism pads the vocabulary further.
    return {name: t[:127] if t.shape[0] > 127 else t for name, t in state.items()}


def furthest(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of a weight, and the weight's name."""
    assert tensors.keys() == expected.keys() and len(tensors) > 5
    return max((float((tensors[n] - expected[n]).abs().max()), n) for n in expected)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    run = tmp_path_factory.mktemp("reference")
    flags = [*MODEL, "--run-dir", str(run), *ONE_RANK["fp32"].all_flags, *FLAGS]
    run_ranks(_pretrain_by_reference, 1, flags)
    return weights(run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """Return the folder of an undisturbed run on a layout, with checkpoints of two steps."""

    @cache
    def run(layout: Layout) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        train(folder, layout, *FLAGS, save=True)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[x.name for x in LAYOUTS])
def test_muon_layout_equals_the_reference_and_resumes_from_another(
    number: int, reference: dict[str, Tensor], trained: Any, tmp_path: Path
) -> None:
    layout, other = LAYOUTS[number], LAYOUTS[number - 1]
    difference, name = furthest(weights(trained(layout)), reference)
    assert difference < 1e-5, name
    momentum = "optimizer.state.momentum_buffer."
    ours, theirs = (weights(trained(x), SAVED, momentum) for x in (layout, other))
    difference, name = furthest(ours, theirs)
    assert difference < 1e-5, name
    load = ("--load", str(trained(other) / "checkpoints"), "--ckpt-step", str(SAVED))
    train(tmp_path, layout, *FLAGS, *load, save=True)
    difference, name = furthest(weights(tmp_path), reference)
    assert difference < 1e-5, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_muon_in_bf16_resumes_bit_for_bit_on_the_same_layout(tmp_path: Path) -> None:
    shared_out, whole = (
        Layout(x.name, x.ranks, x.data_parallel, x.flags, kind="bf16") for x in LAYOUTS[1:5:3]
    )
    rows = train(tmp_path / "run", shared_out, *FLAGS, save=True)
    load = ("--load", str(tmp_path / "run" / "checkpoints"), "--ckpt-step", str(SAVED))
    train(tmp_path / "same", shared_out, *FLAGS, *load, save=True)
    for prefix in ("", "optimizer.state."):
        runs = [weights(tmp_path / name, prefix=prefix) for name in ("run", "same")]
        assert furthest(*runs)[0] == 0.0
    resumed = train(tmp_path / "other", whole, *FLAGS, *load)
    for row, undisturbed in zip(resumed, rows[SAVED:], strict=True):
        assert row["loss"] == pytest.approx(undisturbed["loss"], abs=5e-3)


def test_muon_momentum_grows_over_the_warmup() -> None:
    assert [momentum_at(step, 0.95, 300) for step in (0, 150, 300, 9000)] == [
        0.85, pytest.approx(0.9), 0.95, 0.95,
    ]  # fmt: skip
    assert momentum_at(0, 0.95, 0) == 0.95
    assert momentum_at(0, 0.5, 300) == 0.5
