"""Tests of the host memory that a save takes, as the dry run states it."""

from argparse import Namespace

import pytest

from megatron_ext.planning.dry_run.saving import describe_saving, saving_bytes

STAGES = [
    {"parameters": 100, "memory": {"parameters": 400}},
    {"parameters": 300, "memory": {"parameters": 1200}},
]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 1200 + 4 * 300),  # weights, and the optimizer's view of them
        ({"bf16": True}, 1200),
        ({"data_parallel_size": 2}, 1200 + 12 * 300),
        ({"context_parallel_size": 2}, 1200 + 12 * 300),
        ({"use_distributed_optimizer": False}, 1200),
        ({"no_save_optim": True}, 1200),
        ({"optimizer": "muon"}, None),
        ({"async_save": True}, None),
    ],
)
def test_memory_of_a_save_is_that_of_the_largest_stage(changes, expected):
    args = {"optimizer": "adam", "async_save": False, "use_distributed_optimizer": True}
    args |= {"no_save_optim": None, "data_parallel_size": 1, "context_parallel_size": 1}
    args |= {"bf16": False, "fp16": False} | changes
    assert saving_bytes(Namespace(**args), STAGES) == expected


def test_memory_of_a_save_is_stated_in_mebibytes():
    assert "takes up to 1,536 MiB in addition" in describe_saving(1536 * 2**20)
