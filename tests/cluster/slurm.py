"""A Slurm cluster of two nodes on this machine, which is removed completely after use.

munged, slurmctld and two slurmd run as root on free ports, and everything they write is under one
temporary folder.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.distributed import ROOT

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Return why no cluster can be made here, or an empty text."""
    absent = [name for name in COMMANDS if shutil.which(name, path=_SEARCHED) is None]
    if absent:
        return f"Slurm and munge are not installed (make system-deps): no {', '.join(absent)}"
    return None if os.geteuid() == 0 else "starting Slurm needs root"


class Cluster:
    """Two nodes, node1 and node2, and the partitions `low`, whose jobs are preempted and requeued
    by those of `high`.

    Attributes:
        environment: of every command that talks to it.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Store the settings; use :func:`cluster` to make a cluster."""
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            **environment,
            "PATH": _SEARCHED,
            "SLURM_CONF": str(self.conf),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job` by their names."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, states: tuple[str, ...], timeout: float) -> dict[str, str]:
        """Wait until a job is in one of `states`."""
        deadline = time.monotonic() + timeout
        while (status := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {status}\n{self.logs()}"
            time.sleep(0.2)
        return status

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"\n== {file.name}\n{file.read_text()[-1500:]}" for file in files)

    def start(self) -> None:
        """Start the daemons and wait for both nodes."""
        host = socket.gethostname().partition(".")[0]
        controller, *nodes = _free_ports(3)
        self.conf.write_text(_configuration(self.folder, host, controller, nodes))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}={self.folder}/munge.{name[:4]}" for name in ("pid-file", "seed-file")]
        self._start(
            *("munged", "--foreground", "--force", f"--key-file={key}", *files),
            *(f"--socket={self.folder}/munge.socket", f"--log-file={self.folder}/munge.log"),
        )
        self._start("slurmctld", "-D", "-i")
        for node in ("node1", "node2"):
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 120
        while True:
            status = subprocess.run(
                ["sinfo", "--noheader", "--partition=low", "--format=%D %t"],
                env=self.environment,
                capture_output=True,
                text=True,
            )
            if status.stdout.strip() == "2 idle":
                return
            assert time.monotonic() < deadline, status.stdout + status.stderr + self.logs()
            time.sleep(0.2)

    def _start(self, *command: str) -> None:
        null = subprocess.DEVNULL
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdin=null,
                stdout=null,
                stderr=null,
                start_new_session=True,
            )
        )

    def stop(self) -> None:
        """Kill every daemon and all that a job started."""
        while processes := self.processes():
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            psutil.wait_procs(processes, timeout=5)
        for daemon in self._daemons:
            daemon.wait()

    def processes(self) -> list[psutil.Process]:
        """Return all processes of this cluster."""
        running = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self._owns(process):
                    running.append(process)
            except psutil.Error:
                continue
        return running

    def _owns(self, process: psutil.Process) -> bool:
        """Return whether a process belongs to the cluster.

        Jobs and daemons have the configuration in their environment. slurmstepd clears its
        environment, but writes the log of its node.
        """
        if process.name() == "slurmstepd":
            return any(Path(file.path).parent == self.folder for file in process.open_files())
        return process.environ().get("SLURM_CONF") == str(self.conf)


@contextmanager
def cluster(**environment: str) -> Iterator[Cluster]:
    """Run a cluster while the context is open, with the environment of its commands."""
    # Not a test's own folder, whose name is too long for the socket's.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        made = Cluster(Path(folder), environment)
        try:
            made.start()
            yield made
        finally:
            made.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [made.getsockname()[1] for made in sockets]
    for made in sockets:
        made.close()
    return ports


def _configuration(folder: Path, host: str, controller: int, nodes: list[int]) -> str:
    settings: dict[str, Any] = {
        "ClusterName": "test",
        # The ranks of a job meet at a port that follows from its number, and each worker of the
        # tests may have a cluster at the same time.
        "FirstJobId": 1 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]),
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        # How long a requeued job waits; with less than 5 it would be two minutes.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "SlurmUser": "root",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "%n.log",
        "SlurmdParameters": "config_overrides",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1,bf_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "MpiDefault": "none",
        "ReturnToService": 2,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for number, port in enumerate(nodes, 1):
        lines.append(
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
        )
    common = "Nodes=node[1-2] MaxTime=INFINITE State=UP"
    lines.append(f"PartitionName=low Default=YES PriorityTier=1 GraceTime=120 {common}")
    lines.append(f"PartitionName=high PriorityTier=2 PreemptMode=OFF {common}")
    return "\n".join(lines) + "\n"
