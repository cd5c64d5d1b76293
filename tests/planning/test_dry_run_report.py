"""What the report of a dry run says of devices."""

import pytest

from megatron_ext.planning.dry_run.dry_run_report import fit, largest_rank

GIB = 2**30


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (10 * GIB, "needs 10,240.00 MiB: it fits A100 40 GB, H100 80 GB, H200, B200 ("),
        (84_777 * 2**20, "needs 84,777.00 MiB: it fits H200, B200 and does not fit A100 40 GB, H"),
        (78 * GIB, "it fits H200, B200 and does not fit A100 40 GB, H100 80 GB (10% of"),
        (200 * GIB, "it does not fit A100 40 GB, H100 80 GB, H200, B200 ("),
    ],
)
def test_fit_names_the_devices_with_room_for_the_largest_rank(size, words):
    assert words in fit(size)


def test_largest_rank_counts_all_models_that_a_rank_holds():
    stages = [{"memory": {"parameters": 3, "activations": 1}}, {"memory": {"parameters": 5}}]
    assert largest_rank({"stages": stages}) == 5
    # Keys and values of answers take the place of activations.
    assert largest_rank({"stages": stages, "answers": 1}) == 6
    assert largest_rank({"stages": stages[:1], "answers": 1}) == 4
    assert largest_rank({"stages": stages[:1], "answers": 3}) == 6
    together = {"policy": [3, 5], "judge": [9, 2], "together at most": [12, 7]}
    assert largest_rank({"stages": stages, "together": together}) == 12
