"""Tests of the selection of the best model, which must be better by more than rounding."""

import json
from types import SimpleNamespace
from typing import Any

from tests.distributed import run_ranks

VALUES = [
    # value, sound, whether it is a new best
    (0.8, False, True),
    (0.5, True, True),
    (0.5000001, True, False),
    (0.9, False, False),
    (0.501, True, True),
    (0.501, True, False),
    (0.5010001, False, False),
]


def retained(place):
    """Return for each evaluation whether it is the best so far, and the file of the best."""
    from alignment.training.training_run import TrainingRun

    engine: Any = SimpleNamespace(export=lambda folder: folder.mkdir(exist_ok=True))
    result = []
    with TrainingRun(place, engine, {}) as run:
        for run.step, (value, sound, _) in enumerate(VALUES):
            result.append(run.keep_best("val/alpha", value, sound))
        # The same evaluation again, of a run that was killed after it.
        run.step = 4
        result.append(run.keep_best("val/alpha", 0.501, True))
    return result, json.loads((place / "best" / "best.json").read_text())


def test_keep_best_ignores_an_improvement_by_rounding(tmp_path):
    [(result, note)] = run_ranks(retained, 1, tmp_path)
    assert result == [better for _, _, better in VALUES] + [True]
    assert note == {"step": 4, "val/alpha": 0.501, "sound": True}


def kept_by_log_prob(place):
    from alignment.training.training_run import TrainingRun

    engine: Any = SimpleNamespace(export=lambda folder: folder.mkdir(exist_ok=True))
    with TrainingRun(place, engine, {}) as run:
        result = []
        for run.step, value in enumerate((-2.0, -1.9999999, -1.999, -2.5)):
            result.append(run.keep_best("validation/log_prob", value))
    return result


def test_keep_best_with_negative_log_probs(tmp_path):
    assert run_ranks(kept_by_log_prob, 1, tmp_path) == [[True, False, True, False]]
