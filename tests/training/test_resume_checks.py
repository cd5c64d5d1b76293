"""Tests of the checks of a run against the checkpoint that it resumes from."""

from argparse import Namespace

from megatron_ext.training.resume_checks import _SAME_SCHEDULE, _schedule_setting


def schedule(**settings):
    return {name: _schedule_setting(Namespace(**settings), name) for name in _SAME_SCHEDULE}


def test_a_schedule_counted_in_samples_is_the_same_in_flags_and_checkpoint():
    """A checkpoint also has the steps and the decay that Megatron derived from the samples."""
    flags = schedule(train_iters=None, train_samples=24, lr_decay_samples=None)
    saved = schedule(train_iters=6, train_samples=24, lr_decay_iters=6, lr_decay_samples=24)
    assert flags == saved
    other = schedule(train_iters=8, train_samples=32, lr_decay_iters=8, lr_decay_samples=32)
    assert other["train_samples"] != saved["train_samples"]


def test_a_schedule_counted_in_steps_decays_over_all_of_them_by_default():
    flags = schedule(train_iters=6, train_samples=None, lr_decay_iters=None)
    saved = schedule(train_iters=6, train_samples=None, lr_decay_iters=6)
    assert flags == saved and flags["lr_decay_iters"] == 6
    assert schedule(train_iters=8, train_samples=None)["lr_decay_iters"] == 8
