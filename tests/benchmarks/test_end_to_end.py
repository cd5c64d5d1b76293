"""Tests of the training benchmark with a tiny model: all models train, and rows are complete."""

import contextlib
import io
import json
import time
from unittest import mock

import pytest

from benchmarks import end_to_end
from tests.distributed import run_ranks

PHASES = {"attention", "experts", "gradients", "optimizer", "data", "other"}


@pytest.mark.slow
def test_a_table_and_a_json_object_a_row() -> None:
    tiny = ["--hidden-size", "64", "--layers", "2", "--rounds", "1", "--ranks", "2"]
    argv = ["end_to_end.py", *tiny, "--seq-length", "32"]
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()) as printed:
        end_to_end.main()
    lines = printed.getvalue().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["router"] for row in rows] == list(end_to_end.ROUTERS)
    for row in rows:
        mixture = row["router"] != "dense"
        phases = row["phases_percent"]
        expected = PHASES | ({"dispatch", "router", "cutoffs"} if mixture else {"cutoffs"})
        assert set(phases) == expected
        assert sum(phases.values()) == pytest.approx(100, abs=0.1)
        assert all(share >= 0 for share in phases.values())
        if "token choice" in row["router"] or row["router"] == "expert choice":
            assert row["experts"] == 1
        elif mixture:
            assert 0.5 <= row["experts"] <= 1.5  # what the capacity allows
        assert any(row["router"] in line and f"{row['step_ms']:,.0f}" in line for line in lines)
        tokens = 2 * 8 * 32
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["step_ms"], rel=0.05)
    reference = next(row for row in rows if row["router"] == end_to_end.REFERENCE)
    assert reference["speed"] == reference["speed_least"] == reference["speed_most"] == 1


def test_speed_is_the_median_ratio_of_the_slowest_ranks() -> None:
    def steps(*seconds: float) -> list[end_to_end.TimedStep]:
        # Steps with timed phases, of 100 s, and warm-up steps do not count.
        times = iter(seconds)
        numbers = range(end_to_end.WARMUP + end_to_end.TURNS)
        timed = [n >= end_to_end.WARMUP and not end_to_end.keeps_phases(n) for n in numbers]
        return [end_to_end.TimedStep(next(times) if plain else 100.0) for plain in timed]

    model = {
        end_to_end.REFERENCE: [steps(2.0, 1.0), steps(1.0, 4.0)],
        "other": [steps(1.0, 1.0), steps(0.5, 2.0)],
    }
    for of_ranks in model.values():
        for rank in of_ranks:
            for step in rank:
                step.phases.update(attention=3, other=1)
    reference, other = end_to_end.summary(model, ranks=2, tokens=600)
    assert (other["step_ms"], reference["step_ms"]) == (1500, 3000)
    assert (other["speed"], other["tokens_per_s"]) == (2.0, 400.0)
    assert other["phases_percent"] == {"attention": 75.0, "other": 25.0}


def _watched() -> dict[str, float]:
    from benchmarks._phases import Phases

    clock = [0.0, 1.0, 3.0, 7.0, 15.0]
    with mock.patch.object(time, "perf_counter", side_effect=clock):
        phases = Phases()
        phases.enter("dispatch")
        phases.enter("experts")
        phases.leave("experts")
        phases.leave("dispatch")
    return dict(phases.seconds)


def test_time_counts_for_the_innermost_phase() -> None:
    (seconds,) = run_ranks(_watched, 1)
    assert seconds == {"other": 1.0, "dispatch": 2.0 + 8.0, "experts": 4.0}
