"""Tests that a model with depths of multi-token prediction trains alike on every layout."""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, run_ranks
from tests.training.layouts import (
    EP2,
    FULL,
    INTERLEAVED,
    ONE_RANK,
    OVERLAP,
    PP2,
    SHARDED,
    STEPS,
    TP2,
    WHOLE_EXPERTS,
    Layout,
    difference,
    train,
)
from tests.warm import warm_python

DEPTHS = ("--mtp-num-layers", "2", "--mtp-loss-scaling-factor", "0.3")
SAVED = 12
ALONE = ONE_RANK["fp32"]
LAYOUTS = [
    Layout("DP 2, distributed optimizer", 2, 2, (*SHARDED, *OVERLAP)),
    Layout("EP 2", 2, 2, EP2),
    Layout("TP 2, EP 2", 2, 1, (*TP2, *EP2, *WHOLE_EXPERTS, *SHARDED)),
    Layout("PP 2", 2, 1, PP2),
    Layout("PP 2, interleaved", 2, 1, (*PP2, *INTERLEAVED)),
    Layout("full recomputation", 1, 1, (*FULL, "--recompute-num-layers", "1")),
]

Trained = Callable[[Layout], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the rows of a run, which has a checkpoint of step SAVED."""

    @cache
    def run(layout: Layout) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("run")
        interval = ("--save-interval", str(SAVED))
        return folder, train(folder, layout, *DEPTHS, *interval, save=True)

    return run


def depth_losses(rows: list[Any]) -> list[list[float]]:
    return [[row["mtp_1_loss"], row["mtp_2_loss"]] for row in rows]


@pytest.mark.slow
def test_depths_learn_with_separate_thresholds(trained: Trained) -> None:
    _, rows = trained(ALONE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for depth in (0, 1):
        first, *_, last = (losses[depth] for losses in depth_losses(rows))
        assert last < first - 0.05
    layers = {match[1] for key in rows[-1] if (match := re.match(r"moe/layer_(\d\d)/", key))}
    assert layers == {"01", "02", "03", "04", "05"}  # three of the decoder, then the depths
    thresholds = [rows[-1][f"moe/layer_{layer}/experts/threshold"] for layer in sorted(layers)]
    assert len({tuple(values) for values in thresholds}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_depths_train_as_on_one_rank(layout: Layout, trained: Trained) -> None:
    _, expected = trained(ALONE)
    _, rows = trained(layout)
    result = difference(rows, expected)
    assert result.loss <= 1e-5 and result.rest <= 1e-4 and result.counts, result
    for losses, others in zip(depth_losses(rows), depth_losses(expected)):
        assert losses == pytest.approx(others, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("source, target", [(ALONE, LAYOUTS[3]), (LAYOUTS[3], LAYOUTS[2])])
def test_depths_resume_on_another_layout(
    source: Layout, target: Layout, trained: Trained, tmp_path: Path
) -> None:
    _, undisturbed = trained(ALONE)
    folder, _ = trained(source)
    load = ("--load", str(folder / "checkpoints"), "--ckpt-step", str(SAVED))
    rows = train(tmp_path, target, *DEPTHS, *load, "--exit-interval", str(SAVED + 4))
    result = difference(rows, undisturbed[SAVED : SAVED + 4])
    assert result.loss <= 1e-5 and result.rest <= 1e-4 and result.counts, result


def _validation_loss(folder: str) -> list[float]:
    """Return the losses by token of a fixed text."""
    from megatron_ext.devices import activate

    activate()
    import torch

    from megatron_ext.inference.loading import load_model

    loaded = load_model(folder)
    tokens = torch.arange(32).unsqueeze(0) % 7
    with torch.no_grad():
        logits = loaded.model(tokens, torch.arange(32).unsqueeze(0), None)
    assert not hasattr(loaded.model, "mtp")
    return logits[0, :, :127].log_softmax(-1).max(-1).values.tolist()


@pytest.mark.slow
def test_inference_and_export_leave_the_depths_out(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained(ALONE)
    words = ["--from", "megatron", "--to", "hf", "--load", str(folder), "--save"]
    command = [warm_python(), "-m", "tools.convert_checkpoint", *words, str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [ours] = run_ranks(_validation_loss, 1, str(folder), timeout=200)
    [exported] = run_ranks(_validation_loss, 1, str(tmp_path / "hf"), timeout=200)
    assert exported == pytest.approx(ours, abs=1e-5)
