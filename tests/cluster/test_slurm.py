"""The job scripts on a real Slurm: two nodes, preemption, warnings, the way back."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, cluster, missing
from tests.distributed import ROOT, SINGLE_THREADED
from tests.megatron import TINY
from tests.training.test_faults import rows, train, whole_checkpoints

STEPS = 120
SAME = [*TINY, "--train-iters", str(STEPS), "--expert-model-parallel-size", "2"]

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Two nodes whose jobs meet on the loopback interface, a rank on each."""
    variables = {
        **SINGLE_THREADED,
        "MASTER_ADDR": "127.0.0.1",
        "NODE_ADDR": "127.0.0.1",
        "INTERFACE": "lo",
        "NPROC_PER_NODE": "1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    with cluster(**variables) as made:
        yield made
    assert made.processes() == []


def submit(slurm: Cluster, folder: Path, *words: str) -> str:
    """Submit a job from the repository's root; its number."""
    output = f"--output={folder}/%x-%j-%N.log"
    return slurm.run("sbatch", "--parsable", output, *words)


def steps(run: Path) -> int:
    """How many a run has done so far."""
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def wait_for_steps(slurm: Cluster, job: str, run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while steps(run) < count:
        found = slurm.job(job)
        assert found["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_slurm_cuts_short_twice_ends_like_an_undisturbed_run(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = "examples/slurm/pretrain.sbatch"
    job = submit(slurm, tmp_path, "--partition=low", script, str(run), *SAME)
    began = time.monotonic()
    wait_for_steps(slurm, job, run, 5)
    print("5 steps", time.monotonic() - began)
    # Another job needs the nodes: after a preemption with GraceTime the ranks get SIGTERM.
    urgent = submit(slurm, tmp_path, "--partition=high", "--nodes=2", "--wrap=true")
    slurm.wait_for(urgent, ("COMPLETED",), 60)
    print("urgent", time.monotonic() - began)
    cut = steps(run)
    assert 5 <= cut < STEPS
    assert whole_checkpoints(run) == [f"iter_{cut:07d}"]

    wait_for_steps(slurm, job, run, cut + 5)
    print("resumed", time.monotonic() - began)
    # What --signal=B:USR1@N does before the time limit.
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, ("PENDING",), 60)
    print("requeued", time.monotonic() - began)
    again = steps(run)
    assert cut + 5 <= again < STEPS
    assert whole_checkpoints(run)[-1] == f"iter_{again:07d}"

    ended = slurm.wait_for(job, ("COMPLETED", "FAILED"), 120)
    print("ended", time.monotonic() - began)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2")
    train([*SAME, "--run-dir", str(tmp_path / "undisturbed")])
    print("ref", time.monotonic() - began)
    assert rows(run) == rows(tmp_path / "undisturbed")

    logs = run / "logs"
    for node in range(2):
        assert next(logs.glob(f"pretrain-{job}-*-{node}.log")).read_text()
        assert len(list(logs.glob(f"ranks/node{node}/*/attempt_0/0/stdout.log"))) == 3
    for start in range(3):
        recorded = (logs / f"environment-{job}-{start}.txt").read_text()
        assert f"JobId={job}" in recorded and "torch==" in recorded
