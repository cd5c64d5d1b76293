"""Tests of the metrics of a training step."""

import pytest

from alignment.engines.protocol import StepResult
from alignment.rl.metrics import update_metrics


def test_update_metrics_count_overflows_without_a_norm():
    stepped = StepResult(1.0, 3.0, 0.1, {"clipped": 0.25})
    overflowed = StepResult(2.0, None, 0.1, {"clipped": 0.75})
    row = update_metrics([overflowed, stepped])
    assert row == pytest.approx(
        {"loss": 1.5, "grad_norm": 3.0, "overflows": 1.0, "lr": 0.1, "clipped": 0.5}
    )
    assert "overflows" not in update_metrics([stepped])
    assert update_metrics([overflowed], "value_").keys() == {
        "value_loss", "value_overflows", "value_lr", "clipped",
    }  # fmt: skip
