"""Tests of two torchrun agents as two nodes, each in a separate network."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed import ROOT, SINGLE_THREADED
from tests.megatron import TINY
from tests.pretraining import train
from tests.training.test_faults import rows, whole_checkpoints

STEPS = 12
SAME = [*TINY, "--train-iters", str(STEPS), "--save-interval", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
ADDRESS = "10.231.7.{}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Nodes:
    """Two network namespaces connected by one cable."""

    def __init__(self) -> None:
        self.names = [f"node{i}-{os.getpid()}" for i in range(2)]
        self.cables = [f"cable{i}" for i in range(2)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = self.names
        ip("-n", a, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", b)
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            ip("-n", name, "address", "add", f"{ADDRESS.format(i + 1)}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def plug(self, state: str) -> None:
        """Pull the cable ("down") or put it back ("up")."""
        ip("-n", self.names[1], "link", "set", "cable1", state)

    def torchrun(self, node: int, log: Path, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the agent of a node with one rank."""
        command = [
            *("ip", "netns", "exec", self.names[node]),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"),
            *("--rdzv-endpoint", f"{ADDRESS.format(1)}:29400"),
            *("--rdzv-conf", f"is_host={1 - node}"),
            *("--local-addr", ADDRESS.format(node + 1), "--shutdown-timeout", "1"),
            *args,
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                **SINGLE_THREADED,
                "GLOO_SOCKET_IFNAME": self.cables[node],
                "PYTHONPATH": str(ROOT),
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log.open("wb"),
            start_new_session=True,
        )


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError):
        made.remove()
        pytest.skip("network namespaces need root and the command ip")
    yield made
    made.remove()


def wait_until(condition: Callable[[], bool], agents: list[subprocess.Popen[bytes]]) -> None:
    """Wait for at most two minutes; then, or after an error, stop all agents."""
    deadline = time.monotonic() + 120
    try:
        while not condition():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.1)
    except BaseException:
        kill(agents)
        raise


def kill(agents: list[subprocess.Popen[bytes]]) -> None:
    """Kill all processes that still run, including ranks."""
    for agent in agents:
        if agent.poll() is None:
            agent_process = psutil.Process(agent.pid)
            for process in [*agent_process.children(recursive=True), agent_process]:
                process.kill()
            agent.wait()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_on_two_nodes_survives_the_loss_of_the_network(nodes: Nodes, tmp_path: Path) -> None:
    train([*SAME, *EP2, "--run-dir", str(tmp_path / "one")])
    expected = rows(tmp_path / "one")

    run, logs = tmp_path / "two", [tmp_path / f"node{i}.log" for i in range(2)]
    flags = [*SAME, *EP2, "--run-dir", str(run), "--stall-timeout", "10"]
    script = "tests/training/faulty_pretrain.py"
    agents = [nodes.torchrun(i, logs[i], script, *flags, FAULTS="slow:0:1") for i in range(2)]
    wait_until((run / "checkpoints/iter_0000004/integrity.json").exists, agents)
    nodes.plug("down")
    messages = [
        "rank 1 does not answer: it is stopped, or its node is unreachable",
        "store does not answer",
    ]
    wait_until(lambda: all(t in log.read_text() for t, log in zip(messages, logs)), agents)
    wait_until(lambda: agents[0].poll() not in (None, 0), agents)
    kill(agents)  # that of node 1 waits for its own store on node 0
    assert whole_checkpoints(run)[-1] in ("iter_0000004", "iter_0000006")
    assert rows(run) == expected[: len(rows(run))]

    nodes.plug("up")
    agents = [nodes.torchrun(i, logs[i], "pretrain_et.py", *flags) for i in range(2)]
    wait_until(lambda: all(agent.poll() is not None for agent in agents), agents)
    assert [agent.returncode for agent in agents] == [0, 0], logs[0].read_text()[-3000:]
    assert rows(run) == expected
