"""Tests that preflight reports problems that would stop a run, and ranks that would delay it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import ROOT, run_ranks
from tests.megatron import TINY
from tests.pretraining import start as train
from tests.warm import warm_python

REAL_DATA = [flag for flag in TINY if flag != "--mock-data"]
SLOW = """
while [[ -e $1 ]]; do kill -STOP $0; sleep 0.1; kill -CONT $0; sleep 0.005; done
"""


def start(argv: list[str], port: int, trouble: dict[int, str], mark: str) -> tuple[int, str, str]:
    """Run the tool on this rank, with a fault if there is one; return exit code, stdout, stderr.

    A preflight begins without process groups, and its ranks meet at the store of `port`.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # as at Python's start
    os.environ.update(MASTER_PORT=str(port))
    from tools import preflight

    undo = globals()[trouble[rank]](Path(mark)) if rank in trouble else lambda: None
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            code = preflight.main(argv)
        finally:
            undo()
    return code, stdout.getvalue(), stderr.getvalue()


def slow_and_with_a_wrong_clock(mark: Path) -> Any:
    """Stop this process most of the time while ranks work; its clock is five seconds ahead."""
    from megatron_ext.planning.preflight import rank_checks as ranks

    right, work = time.time, ranks.own_work
    time.time = lambda: right() + 5

    def slowed(launch: Any) -> Any:
        mark.touch()
        stopper = subprocess.Popen(["bash", "-c", SLOW, str(os.getpid()), str(mark)])
        try:
            return work(launch)
        finally:
            mark.unlink()
            stopper.wait()

    ranks.own_work = slowed

    def undo() -> None:
        time.time = right

    return undo


def stopped_in_a_collective(mark: Path) -> Any:
    """Stop this process, as far as other ranks can observe, in its first all-to-all."""
    all_to_all = dist.all_to_all_single

    def stop(*args: Any, **kwargs: Any) -> Any:
        dist.all_to_all_single = all_to_all
        subprocess.Popen(["bash", "-c", "sleep 16; kill -CONT $0", str(os.getpid())])
        os.kill(os.getpid(), signal.SIGSTOP)
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = stop
    return lambda: None


def preflight(
    tmp_path: Path,
    *argv: str,
    ranks: int = 1,
    trouble: Mapping[int, str] = MappingProxyType({}),
    **env: str,
) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Return the exit code, the table by name of the check, and rank 0's output."""
    file = tmp_path / "table.json"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mark = str(tmp_path / "slow")
    words = [*argv, "--json", str(file)]
    ended = run_ranks(start, ranks, words, store.port, dict(trouble), mark, env=env, timeout=100)
    assert len({code for code, _, _ in ended}) == 1, ended
    output = "".join(out + err for _, out, err in ended)
    assert "Traceback" not in output, output
    assert all(out == "" for _, out, _ in ended[1:])  # one rank reports
    table = {row["check"]: row for row in json.loads(file.read_text())["checks"]}
    for row in table.values():
        assert row["text"] in ended[0][1]
    return ended[0][0], table, output


def statuses(table: dict[str, dict[str, Any]], status: str) -> set[str]:
    return {name for name, row in table.items() if row["status"] == status}


@pytest.mark.slow
def test_preflight_of_a_valid_run_passes(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*REAL_DATA, "--data-path", str(dataset), "--run-dir", str(run)]
    flags += ["--hidden-size", "128", "--ffn-hidden-size", "512"]
    code, table, output = preflight(tmp_path, *flags)
    assert (code, statuses(table, "FAILED"), statuses(table, "warning")) == (0, set(), set()), (
        output
    )
    assert not run.exists()  # it leaves nothing behind
    # 8 sequences of 32 tokens, 2 at once; each of 4 experts takes a quarter.
    assert "256 tokens a step in 4 micro-batch(es); k = 16 of" in table["routing"]["text"]

    assert [end for end, _ in run_ranks(train, 1, [*flags, "--exit-interval", "1"], {}, {})] == [0]
    folder = run / "checkpoints/iter_0000001"
    tensors = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    assert table["room for checkpoints"]["bytes"] == pytest.approx(tensors, rel=0.1)
    code, table, output = preflight(tmp_path, *flags)
    assert (code, table["checkpoint to resume"]["text"]) == (0, f"{folder} is intact"), output

    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    code, table, output = preflight(tmp_path, *flags)
    assert (code, statuses(table, "FAILED")) == (2, {"checkpoint to resume"}), output


def test_preflight_refuses_inconsistent_sizes(tmp_path: Path) -> None:
    code, table, _ = preflight(tmp_path, *TINY, "--ranks", "3")
    assert (code, statuses(table, "FAILED")) == (2, {"configuration"})
    assert "--global-batch-size 8 is not divisible" in table["configuration"]["text"]


def test_preflight_reports_all_problems_at_once(
    dataset: Path, tmp_path: Path, small_disk: Path
) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{dataset}.{suffix}", tmp_path)
    prefix = tmp_path / dataset.name
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-10])
    packages = tmp_path / "packages"
    (packages / "apex/lib").mkdir(parents=True)  # as the web framework of that name
    (packages / "apex/__init__.py").write_text("from pyramid.config import Configurator\n")
    old = packages / "transformer_engine-1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Name: transformer-engine\nVersion: 1.0\n")
    code, table, output = preflight(
        tmp_path,
        *(*REAL_DATA, "--data-path", str(prefix), "--run-dir", str(small_disk / "run")),
        *("--device-memory", "0.0001", "--keep-checkpoints", "4"),
        PYTHONPATH=os.pathsep.join([str(packages), str(ROOT)]),
    )
    assert code == 2
    fixes = {
        "apex": "pip uninstall apex",
        "transformer-engine": "version 1.0 is outside of <3,>=2.10: pip install",
        "memory of a rank": "lower --micro-batch-size",
        "data and tokenizer": "is truncated, make it again",
        "room for checkpoints": "Free space",
    }
    assert statuses(table, "FAILED") == set(fixes), output
    for name, fix in fixes.items():
        assert fix in table[name]["text"]


def test_preflight_with_a_wrong_tokenizer_and_a_full_disk(
    dataset: Path, tmp_path: Path, small_disk: Path
) -> None:
    with contextlib.suppress(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    small = ["--vocab-size", "90", "--make-vocab-size-divisible-by", "1"]
    run = ["--run-dir", str(small_disk / "run")]
    code, table, output = preflight(tmp_path, *REAL_DATA, *small, "--data-path", str(dataset), *run)
    assert (code, statuses(table, "FAILED")) == (2, {"data and tokenizer", "checkpoint folder"}), (
        output
    )
    assert "contains token id 98, outside the vocabulary" in table["data and tokenizer"]["text"]
    assert "No space left on device" in table["checkpoint folder"]["text"]


@pytest.mark.slow
def test_preflight_reports_a_slow_rank_and_a_wrong_clock(tmp_path: Path) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    layout += ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    code, table, output = preflight(
        tmp_path,
        *(*TINY, *layout, "--run-dir", str(tmp_path / "run"), "--megabytes", "1"),
        ranks=4,
        trouble={1: "slow_and_with_a_wrong_clock"},
    )
    assert (code, statuses(table, "FAILED")) == (2, {"clocks"}), output
    assert "rank 1's node is +5." in table["clocks"]["text"] or "+4.9" in table["clocks"]["text"]
    assert table["speed of ranks"]["status"] == "warning", output
    assert "rank 1 on" in table["speed of ranks"]["text"].split(";")[1].split(",")[0]
    members = {
        "tensor parallel": [[0, 1], [2, 3]],
        "data parallel": [[0, 2], [1, 3]],
        "expert parallel": [[0, 1], [2, 3]],
        "expert data parallel": [[0, 2], [1, 3]],
    }
    result = {name: row["groups"] for name, row in table.items() if "groups" in row}
    assert {name: [g["ranks"] for g in groups] for name, groups in result.items()} == members
    assert all(g["all-to-all"] > 0 for groups in result.values() for g in groups)


@pytest.mark.slow
def test_preflight_names_a_hanging_rank(tmp_path: Path) -> None:
    code, table, output = preflight(
        tmp_path,
        *(*TINY, "--expert-model-parallel-size", "2", "--stall-timeout", "6"),
        ranks=2,
        trouble={1: "stopped_in_a_collective"},
    )
    assert (code, statuses(table, "FAILED")) == (2, {"expert parallel"}), output
    assert "all-to-all over ranks 0 1 fails" in table["expert parallel"]["text"]
    assert "no answer from rank(s) 1" in table["expert parallel"]["text"]


def test_preflight_refuses_wrong_flags_in_one_sentence() -> None:
    done = subprocess.run(
        [warm_python(), "-m", "tools.preflight", "--keep-checkpoints", "few"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--keep-checkpoints" in done.stderr


def test_slow_ranks_exceed_the_median_by_a_factor() -> None:
    from megatron_ext.planning.preflight.rank_checks import slow_ranks

    assert slow_ranks([1.0, 1.1, 1.0, 1.2], 1.5) == []
    assert slow_ranks([1.0, 3.0, 1.0, 2.0], 1.5) == [(1, 3.0), (3, 2.0)]
    assert slow_ranks([1.0, 2.0], 1.5) == [(1, 2.0)]
