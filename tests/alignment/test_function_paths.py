"""Tests of function paths: loading, and training with a custom loss and schedule."""

import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from alignment.engines.protocol import Optimization, TokenScores
from alignment.function_paths import load_function
from alignment.rl.algorithms import ALGORITHMS, algorithm_by_name
from megatron_ext.errors import UserError

LOSS = """
from alignment.engines.protocol import LossSums

def reinforce(scores, batch):
    gain = scores.log_probs * batch.extras["advantage"] * batch.loss_mask
    return LossSums(-gain.sum(), batch.loss_mask.sum())

def constant(step, optimization):
    return optimization.lr

number = 3
"""


def test_function_of_a_file_and_of_a_module(tmp_path):
    (tmp_path / "own.py").write_text(LOSS)
    assert load_function(f"{tmp_path}/own.py:reinforce", "--loss").__name__ == "reinforce"
    assert load_function("math:sqrt", "--loss")(4) == 2


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("own.py", "is not a function path"),
        ("missing.py:f", "cannot be loaded"),
        ("own.py:missing", "cannot be loaded"),
        ("no.such.module:f", "cannot be loaded"),
        ("own.py:number", "is not a function"),
    ],
)
def test_paths_without_a_function_are_refused(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(LOSS)
    with pytest.raises(UserError, match=f"--loss .*{problem}"):
        load_function(path, "--loss")


def test_loss_by_function_path_replaces_that_of_an_algorithm(tmp_path):
    (tmp_path / "own.py").write_text(LOSS)
    algorithm = algorithm_by_name("rloo", loss_path=f"{tmp_path}/own.py:reinforce")
    assert algorithm.advantages is ALGORITHMS["rloo"].advantages
    assert not algorithm.uses_reference and not algorithm.uses_entropy
    assert not algorithm.derives_old_log_probs and ALGORITHMS["rloo"].derives_old_log_probs
    batch = TokenBatch.of([TokenSample([1, 2, 3], 1, {"advantage": 2.0})])
    log_probs = torch.tensor([[0.0, -1.0, -2.0]])
    sums = algorithm.loss(TokenScores(log_probs), batch)
    assert float(sums.total / sums.weight) == 3


def test_schedule_by_function_path_sets_the_learning_rate(tmp_path):
    (tmp_path / "own.py").write_text(LOSS)
    schedule = load_function(f"{tmp_path}/own.py:constant", "--lr-schedule")
    assert Optimization(lr=3e-4, steps=10, warmup=2, schedule=schedule).rate(0) == 3e-4
    assert Optimization(lr=3e-4, steps=10, warmup=2).rate(0) == 0
