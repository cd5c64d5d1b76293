"""Tests of the job scripts on a real Slurm: two nodes, preemption, warnings, requeuing."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Cluster, cluster, missing
from tests.distributed import ROOT, SINGLE_THREADED
from tests.megatron import TINY
from tests.pretraining import train
from tests.training.test_faults import rows, whole_checkpoints

STEPS = 80
SAME = [*TINY, "--train-iters", str(STEPS), "--expert-model-parallel-size", "2"]

STAND_IN = """#!{python}
import json, os, signal, sys, time
if "pip" in sys.argv:
    sys.exit()
warned = []
if "pretrain_et.py" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: warned.append(1))
names = ("NODE_RANK", "NNODES", "MASTER_ADDR", "CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME")
print(json.dumps([sys.argv[1:], *(os.environ.get(name) for name in names)]), flush=True)
if "tools.preflight" in sys.argv:
    sys.exit(2 * ("--broken" in sys.argv))
while "--wait-for-warning" in sys.argv and not warned:
    time.sleep(0.05)
"""

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Make two nodes whose jobs meet on the loopback interface, with one rank on each."""
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
    """Submit a job from the root of the repository, and return its number."""
    output = f"--output={folder}/%x-%j-%N.log"
    return slurm.run("sbatch", "--parsable", output, *words)


def steps(run: Path) -> int:
    """Return the number of finished steps of a run."""
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for at most three minutes."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_is_preempted_ends_like_an_undisturbed_run(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = "examples/slurm/pretrain.sbatch"
    job = submit(slurm, tmp_path, "--partition=low", script, str(run), *SAME)
    wait_until(lambda: steps(run) >= 5)
    # With GraceTime the ranks get SIGTERM, and the script must requeue itself.
    urgent = submit(slurm, tmp_path, "--partition=high", "--nodes=2", "--wrap=true")
    slurm.wait_for(urgent, ("COMPLETED",), 240)
    cut = steps(run)
    assert 5 <= cut < STEPS
    assert whole_checkpoints(run) == [f"iter_{cut:07d}"]

    train([*SAME, "--run-dir", str(tmp_path / "undisturbed")])
    ended = slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert rows(run) == rows(tmp_path / "undisturbed")

    logs = run / "logs"
    for node in range(2):
        assert next(logs.glob(f"pretrain-{job}-*-{node}.log")).read_text()
        assert len(list(logs.glob(f"ranks/node{node}/*/attempt_0/0/stdout.log"))) == 2
    for start in range(2):
        recorded = (logs / f"environment-{job}-{start}.txt").read_text()
        assert f"JobId={job}" in recorded and "torch==" in recorded


@pytest.mark.slow
def test_every_script_starts_its_tool_on_every_node_and_requeues_only_itself(
    slurm: Cluster, tmp_path: Path
) -> None:
    """A substitute for Python reports how torchrun is started, and ends at the warning."""
    python, apptainer = tmp_path / "python", tmp_path / "apptainer"
    python.write_text(STAND_IN.format(python=sys.executable))
    apptainer.write_text(
        '#!/bin/bash\necho "$@"\nwhile [[ $1 != *.sif ]]; do shift; done\n"${@:2}"\n'
    )
    for command in (python, apptainer):
        command.chmod(0o755)
    started = f"PYTHON={python},PATH={tmp_path}:{slurm.environment['PATH']}"
    lines = tmp_path / "lines"
    lines.write_text("--lr 1\n--lr 2 --wait-for-warning\n")

    def submitted(name: str, *words: str, variables: str = "") -> str:
        script = f"examples/slurm/{name}.sbatch"
        exported = f"--export=ALL,{started}{variables}"
        options = [word for word in words if word.startswith("--array")]
        return submit(slurm, tmp_path, exported, *options, script, *words[len(options) :])

    def of_nodes(folder: Path) -> list[list[Any]]:
        files = sorted(folder.glob("logs/*-[0-9].log"))
        return [json.loads(lines[-1]) for f in files if (lines := f.read_text().splitlines())]

    evaluation = submitted("evaluate", str(tmp_path / "cut"), "--wait-for-warning")
    wait_until(lambda: of_nodes(tmp_path / "cut"))
    slurm.run("scancel", "--batch", "--signal=USR1", evaluation)
    slurm.wait_for(evaluation, ("PENDING",), 240)
    slurm.run("scancel", evaluation)

    sweep = submitted("sweep", "--array=1-2", str(lines), str(tmp_path / "runs"), "--seed", "5")
    slurm.wait_for(f"{sweep}_1", ("COMPLETED",), 240)
    wait_until(lambda: of_nodes(tmp_path / "runs/2"))
    slurm.run("scancel", "--batch", "--signal=USR1", f"{sweep}_2")
    slurm.wait_for(f"{sweep}_2", ("PENDING",), 240)
    assert slurm.job(f"{sweep}_1")["JobState"] == "COMPLETED"
    assert slurm.job(f"{sweep}_2")["Restarts"] == "1"
    slurm.run("scancel", f"{sweep}_2")
    for number in (1, 2):
        [[command, rank, nodes, *_]] = of_nodes(tmp_path / f"runs/{number}")
        program = command[command.index("pretrain_et.py") :]
        assert (rank, nodes) == ("0", "1")
        assert program[1:7] == [
            *("--run-dir", str(tmp_path / f"runs/{number}"), "--seed", "5", "--lr", str(number))
        ]

    jobs = [
        submitted("convert", str(tmp_path / "convert"), "--from", "hf"),
        submitted("evaluate", str(tmp_path / "core"), "--load", "run"),
        submitted(
            "pretrain",
            str(tmp_path / "two"),
            "--seed",
            "1",
            variables=",CONTAINER=it.sif,PREFLIGHT=1",
        ),
    ]
    for job in jobs:
        slurm.wait_for(job, ("COMPLETED",), 240)
    job = submitted("pretrain", str(tmp_path / "bad"), "--broken", variables=",PREFLIGHT=1")
    assert slurm.wait_for(job, ("COMPLETED", "FAILED"), 240)["ExitCode"] == "2:0"
    assert all("tools.preflight" in row[0] for row in of_nodes(tmp_path / "bad"))
    [[command, *_]] = of_nodes(tmp_path / "convert")
    assert command[-4:] == ["-m", "tools.convert_checkpoint", "--from", "hf"]
    assert command[command.index("--max-restarts") + 1] == "0"
    [[command, *_]] = of_nodes(tmp_path / "core")
    out = ["--out", str(tmp_path / "core"), "--load", "run"]
    assert command[-6:] == ["-m", "tools.eval_core", *out]
    for node, row in enumerate(of_nodes(tmp_path / "two")):
        assert row[1:] == [str(node), "2", "127.0.0.1", "1", "lo"]
        assert row[0][row[0].index("--rdzv-conf") + 1] == f"is_host={int(node == 0)}"
        assert row[0][-2:] == ["--seed", "1"]
    first, *log = next((tmp_path / "two/logs").glob("pretrain-*-1.log")).read_text().splitlines()
    assert any("tools.preflight" in line for line in log)
    assert first.startswith(f"exec --nv --bind {ROOT}:{ROOT},{tmp_path}/two:{tmp_path}/two it.sif")
