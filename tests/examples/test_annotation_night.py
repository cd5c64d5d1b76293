"""Tests of the arithmetic of the page on annotating, with the numbers of the job scripts."""

import re

from alignment.endpoints.cost_estimate import CALLS_PER_REPLICA, Speed, format_hours
from alignment.judges.kinds.endpoint import ENDPOINT_TIMEOUT
from tests.distributed import ROOT

SLURM = ROOT / "examples/alignment/slurm"
GPUS, ROWS, NIGHT = 8, 271_000, 10 * 3600


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return float(match[1].replace(",", ""))


def test_a_node_labels_the_papers_rows_overnight_by_the_numbers_of_page_and_scripts() -> None:
    serve, annotate = ((SLURM / f"{name}.sbatch").read_text() for name in ("serve", "annotate"))
    page = " ".join((ROOT / "docs/how-to/annotating.md").read_text().split())
    assert "replicas=${REPLICAS:-$gpus}" in serve  # one on each GPU
    replicas = int(number(r'--replicas "\$\{REPLICAS:-(\d+)\}"', annotate))
    speed = number(r"--tokens-per-second (\d+)", annotate)
    answer = number(r"--answer-tokens (\d+)", annotate)
    most = number(r"--max-tokens (\d+)", annotate)
    assert replicas == GPUS
    calls = replicas * CALLS_PER_REPLICA
    [seconds] = Speed(calls, replicas, speed).seconds(ROWS, 0, ROWS * answer).values()
    assert seconds < NIGHT
    assert most / (speed / CALLS_PER_REPLICA) < ENDPOINT_TIMEOUT
    for stated in (
        f"{replicas} x {CALLS_PER_REPLICA} = {calls} calls at a time",
        f"{answer:,.0f} / {speed / 64:.0f} = {answer / (speed / 64):.0f} s",
        f"of {most:,.0f} tokens, {most / (speed / 64):.0f} s, which is within",
        f"{ROWS * answer / 1e6:,.1f} million answer tokens at {replicas} x {speed:,.0f} = "
        f"{replicas * speed:,.0f} tokens/s take {seconds:,.0f} s, or {format_hours(seconds)[:-2]} "
        "hours",
        f"answers of up to {NIGHT * replicas * speed / ROWS:,.0f} tokens on average",
        f"after its first {2 * calls:,} answers",
    ):
        assert stated in page, stated
