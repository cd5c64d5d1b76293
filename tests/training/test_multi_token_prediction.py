"""Tests that depths of multi-token prediction learn, resume on every layout and are not exported.

`test_layouts.py` compares their layouts with one rank.
"""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT, run_ranks
from tests.training.layouts import ONE_RANK, STEPS, Layout, difference, holds, layouts_of, train
from tests.warm import warm_python

SAVED = 12
ALONE = ONE_RANK["depths"]
LAYOUTS = layouts_of("depths")

Trained = Callable[[Layout], tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the folder and the rows of a run, which has a checkpoint of step SAVED."""

    @cache
    def run(layout: Layout) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("run")
        interval = ("--save-interval", str(SAVED))
        return folder, train(folder, layout, *interval, save=True)

    return run


@pytest.mark.slow
def test_depths_learn_with_separate_thresholds(trained: Trained) -> None:
    _, rows = trained(ALONE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for depth in (1, 2):
        name = f"mtp_{depth}_loss"
        assert rows[-1][name] < rows[0][name] - 0.05
    layers = {match[1] for key in rows[-1] if (match := re.match(r"moe/layer_(\d\d)/", key))}
    assert layers == {"01", "02", "03", "04", "05"}  # three of the decoder, then the depths
    thresholds = [rows[-1][f"moe/layer_{layer}/experts/threshold"] for layer in sorted(layers)]
    assert len({tuple(values) for values in thresholds}) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target",
    [(ALONE, LAYOUTS["PP 2"]), (LAYOUTS["PP 2"], LAYOUTS["TP 2, EP 2"])],
    ids=lambda layout: layout.name,
)
def test_depths_resume_on_another_layout(
    source: Layout, target: Layout, trained: Trained, tmp_path: Path
) -> None:
    _, undisturbed = trained(ALONE)
    folder, _ = trained(source)
    load = ("--load", str(folder / "checkpoints"), "--ckpt-step", str(SAVED))
    rows = train(tmp_path, target, *load, "--exit-interval", str(SAVED + 4))
    result = difference(rows, undisturbed[SAVED : SAVED + 4])
    assert holds(result, target), result


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
