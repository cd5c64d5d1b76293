"""Tests of the console lines of a training of a judge or policy."""

from types import SimpleNamespace
from typing import Any

import pytest

from alignment.training.run_console import RunConsole

STEP = {
    "tokens": 1000, "seconds": 2.0, "loss": 0.25, "grad_norm": 1.0, "reward": 0.5, "length": 42.4,
    "cut_off": 0.125, "entropy": 2.345, "kl_from_old": 0.5, "skipped": 0, "unrewarded": 0.0,
}  # fmt: skip


def console(steps: int = 20, every: int = 1, writes: bool = True) -> RunConsole:
    run: Any = SimpleNamespace(writes=writes)
    lines = RunConsole(run, steps, every)
    lines.resume(0)
    return lines


def test_a_line_has_reward_divergence_entropy_length_and_truncation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console().finish_step(1, STEP)
    line = capsys.readouterr().out.rstrip("\n")
    start = "step  1/20 | reward 0.500 | KL of the step 0.5000 | entropy 2.35 | "
    assert line.startswith(f"{start}length 42 | cut off 12% | 500 tokens/s | 0:00:00 left")
    console().finish_step(1, STEP | {"kl_from_reference": 0.0125, "moe/fan_out": 1.5})
    line = capsys.readouterr().out
    assert "KL 0.0125" in line and "KL of the step" not in line and "fan-out 1.50" in line
    console(writes=False).finish_step(1, STEP)
    assert capsys.readouterr().out == ""


def test_lines_come_after_the_first_and_last_step_and_every_few(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = console(steps=11, every=5)
    for step in range(1, 12):
        lines.finish_step(step, STEP)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[-1] for line in printed] == ["1", "5", "10", "11"]


def test_alarms_are_at_the_end_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    alarming = {
        "loss": float("nan"), "skipped": 1, "overflows": 2.0, "unrewarded": 0.2,
        "monitor_alarms": 1,
    }  # fmt: skip
    console().finish_step(1, STEP | alarming)
    assert (
        capsys.readouterr()
        .out.rstrip("\n")
        .endswith(
            "ATTENTION: loss, gradient or reward is not a finite number, "
            "1 step skipped, as no rewards of a prompt differ, "
            "2 optimizer steps skipped, as gradients overflowed, "
            "20% of the responses without a reward, 1 monitor alarm"
        )
    )
    console().finish_step(1, {"loss": 1.0, "grad_norm": None})
    assert "optimizer step skipped, as gradients overflowed" in capsys.readouterr().out


def test_an_evaluation_shows_scores_and_no_errors_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"step": 5, "grade/proxy": 0.5, "grade/proxy_error": 0.1, "grade/proxy_unjudged": 0.0}
    console().evaluate(5, row | {"grade/gold": 0.25, "grade/gap": 0.25, "grade/kl": None})
    line = capsys.readouterr().out
    assert line == "step  5/20 | evaluation | proxy 0.5 | gold 0.25 | gap 0.25\n"
