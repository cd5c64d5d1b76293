"""Tests of schedules that follow the trained samples, against step-by-step computation."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.training import training

from megatron_ext.planning.preflight.storage_checks import check_room
from megatron_ext.training import run_progress, schedule
from megatron_ext.training.run_progress import RunProgress, record_step

PEAK = 1.0


@pytest.fixture(autouse=True)
def _without_calculator() -> Iterator[None]:
    calculator.unset_num_microbatches_calculator()
    yield
    calculator.unset_num_microbatches_calculator()


def run(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Namespace:
    """Return the arguments of a run, and Megatron's calculator of its batch size."""
    usual: dict[str, Any] = {
        "train_iters": 8, "train_samples": None, "global_batch_size": 4, "micro_batch_size": 2,
        "step_batch_size_schedule": None, "seq_length": 16, "lr": PEAK, "min_lr": 0.0,
        "lr_decay_style": "linear", "lr_decay_iters": None, "lr_decay_samples": None,
        "lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_fraction": None,
        "lr_warmup_init": 0.0, "lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None,
        "lr_wsd_decay_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 1.0,
        "weight_decay_incr_style": "linear", "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True, "skip_train": False,
        "decrease_batch_size_if_needed": False,
    }  # fmt: skip
    args = Namespace(**usual | flags)
    calculator.init_num_microbatches_calculator(
        rank=1,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=1,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    monkeypatch.setattr(schedule, "get_args", lambda: args)
    monkeypatch.setattr(run_progress, "get_args", lambda: args)
    monkeypatch.setattr(training, "get_args", lambda: args)
    update = lambda args: schedule._set_train_iters(args, args.progress)  # noqa: E731
    monkeypatch.setattr(training, "update_train_iters", update)
    return args


def scheduler(args: Namespace, progress: RunProgress) -> tuple[Any, Any]:
    """Return the schedule that a run starts with, advanced to the step where it resumes."""
    args.progress = progress
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    built = schedule._wrap_scheduler(training.get_optimizer_param_scheduler, progress)(optimizer)
    built.step(progress.samples)
    return built, optimizer.param_groups[0]


def rates(args: Namespace, progress: RunProgress) -> list[float]:
    """Return the learning rate after each further step, as rows record it."""
    built, group = scheduler(args, progress)
    result, samples = [], progress.samples
    for _ in range(progress.iteration, args.train_iters):
        size = run_progress.next_batch_size(samples)
        samples += size
        built.step(size)
        result.append(group["lr"])
    return result


def test_rate_of_a_resumed_run_follows_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(monkeypatch, global_batch_size=8)
    progress = RunProgress(iteration=6, samples=24, history=[[0, 0], [6, 24]])
    assert rates(args, progress) == pytest.approx([1 - 32 / 40, 0], abs=1e-12)
    built, group = scheduler(args, progress)
    built.step(16)
    assert group["weight_decay"] == pytest.approx(1.0)


def test_warmup_before_the_resumption_keeps_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(monkeypatch, global_batch_size=8, lr_warmup_iters=2)
    progress = RunProgress(iteration=6, samples=24, history=[[0, 0], [6, 24]])
    # The warm-up had 8 samples, with the batch size of its steps.
    assert rates(args, progress) == pytest.approx([1 - (32 - 8) / (40 - 8), 0], abs=1e-12)


def test_wsd_anneals_over_the_samples_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(monkeypatch, global_batch_size=8, lr_decay_style="WSD", lr_wsd_decay_iters=4)
    progress = RunProgress(iteration=6, samples=24, history=[[0, 0], [6, 24]])
    begin, end = 16, 40  # steps 5 and 6 had four samples each, 7 and 8 have eight
    assert rates(args, progress) == pytest.approx([1 - (32 - begin) / (end - begin), 0], abs=1e-12)


def test_rate_with_a_growing_batch_ends_with_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing = {"step_batch_size_schedule": "0:2 128:6", "global_batch_size": 2}
    args = run(monkeypatch, train_iters=6, **growing)
    trained = [2, 4, 6, 8, 14, 20]  # 128 tokens are 8 samples
    expected = [1 - samples / 20 for samples in trained]
    assert rates(args, RunProgress()) == pytest.approx(expected, abs=1e-12)


def test_unchanged_resumption_has_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(monkeypatch, lr_warmup_iters=3, lr_decay_iters=7)
    whole = rates(args, RunProgress())
    for step in (1, 4, 7):
        progress = RunProgress(step, 4 * step, history=[[0, 0], [step, 4 * step]])
        assert rates(args, progress) == whole[step:]


def test_batch_that_does_not_fit_is_counted_as_it_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = run(monkeypatch, global_batch_size=5, decrease_batch_size_if_needed=True, train_iters=4)
    assert rates(args, RunProgress()) == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-12)


def test_steps_of_samples_count_from_the_step_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(monkeypatch, train_iters=None, train_samples=40, global_batch_size=8)
    progress = RunProgress(iteration=6, samples=24, history=[[0, 0], [6, 24]])
    args.progress = progress
    schedule._set_train_iters(args, progress)
    assert args.train_iters == 8
    args.train_iters = None
    assert not progress.finished(args)
    assert RunProgress(iteration=8, samples=40).finished(args)


def test_steps_record_tokens_and_changes_of_the_batch() -> None:
    args = Namespace(trained_tokens=100, batch_history=[[0, 0], [3, 6]], seq_length=10)
    args.consumed_train_samples = 6
    for iteration, size in ((4, 2), (5, 2), (6, 4), (7, 4)):
        args.consumed_train_samples += size
        record_step(args, iteration, size)
    assert args.trained_tokens == 100 + 10 * 12
    assert args.batch_history == [[0, 0], [3, 6], [5, 10]]
    progress = RunProgress(7, 18, history=[*args.batch_history, [7, 18]])
    assert [progress.samples_after(step) for step in range(7)] == [0, 2, 4, 6, 8, 10, 14]


@pytest.mark.parametrize("schedule_of_batches", [None, "0:2 128:6"])
def test_preflight_counts_the_checkpoints_of_samples_as_training_makes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule_of_batches: str | None
) -> None:
    args = run(
        monkeypatch,
        train_iters=None,
        train_samples=24,
        global_batch_size=2,
        step_batch_size_schedule=schedule_of_batches,
    )
    vars(args).update(save=str(tmp_path), save_interval=1, save_retain_interval=None)
    _, message = check_room(args, 1, 1)
    schedule._set_train_iters(args, RunProgress())
    assert message.endswith(f"; the run keeps {args.train_iters}")
    assert args.train_iters == (12 if schedule_of_batches is None else 4 + 3)
