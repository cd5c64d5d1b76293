"""Check a run before it starts: flags, memory, data, folders, packages, nodes and network.

    python -m tools.preflight --ranks 64 --device-memory 80 --recipe FILE.yaml [flags]
    torchrun --nproc-per-node 8 -m tools.preflight --recipe FILE.yaml [flags]

The flags are those of pretrain_et.py. A single process runs the checks that need no other ranks.
Under torchrun, started like the run itself, the command also compares the ranks, their clocks and
speed, and tests collectives over every group of the layout. It trains nothing and leaves no files.
The exit status is 0 if no check failed, and 2 otherwise.
"""

import argparse
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_ext.devices import activate, is_cpu_device
from megatron_ext.errors import ToolParser, UserError, run_on_ranks, run_tool
from megatron_ext.planning.preflight.findings import SKIPPED, CheckResult, Report
from megatron_ext.planning.preflight.rank_memory import DryRun
from megatron_ext.planning.preflight.version_checks import check_versions
from megatron_ext.quiet import quiet_megatron
from megatron_ext.recipes import check_flag_names

if TYPE_CHECKING:
    from megatron_ext.planning.preflight.check_runner import Runner

_HASHING = 20 * 60  # seconds in which all files of a checkpoint must be read


class PreflightFlags:
    """Values of the command line, without the flags of training."""

    ranks: int | None
    device_memory: float | None
    keep_checkpoints: int
    megabytes: float
    slow_rank: float
    clock_tolerance: float
    stall_timeout: float
    json: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    options, flags = _parser().parse_known_args(argv, PreflightFlags())
    check_flag_names(flags)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if any(word.startswith("--dry-run") for word in flags):
        raise UserError("--dry-run is one of the checks of preflight. Leave it out.")
    for name in ("ranks", "stall_timeout", "megabytes"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0.")
    if size > 1 and options.ranks not in (None, size):
        raise UserError(
            f"--ranks {options.ranks} differs from the number of started ranks, {size}. Leave it "
            "out."
        )
    options.ranks = options.ranks or size
    dry_run = DryRun(flags, options.ranks) if rank == 0 else None  # before Megatron and CUDA
    try:
        report = Report(rank, options.json)
        with quiet_megatron():
            activate()  # before anything of Megatron is imported, which takes seconds
            from megatron_ext.planning.preflight.check_runner import Runner

            runner = Runner(report, options.stall_timeout)
            _check_all(runner, options, flags, rank, size, dry_run)
        return runner.end()
    finally:
        if dry_run is not None:
            dry_run.stop()


def _check_all(
    runner: "Runner",
    options: PreflightFlags,
    flags: list[str],
    rank: int,
    size: int,
    dry_run: DryRun | None,
) -> None:
    """Run every check that does not depend on a failed one."""
    from megatron_ext.planning.preflight import run_checks as run
    from megatron_ext.training.launch import Launch

    ranks = options.ranks or size

    def meet() -> CheckResult:
        runner.launch = Launch.join(rank, size, runner.patience)
        nodes = runner.launch.gather("nodes", platform.node())
        return CheckResult(f"{size} on {len(set(nodes))} node(s)")

    if size > 1 and not runner.check("ranks", meet):
        return
    for package, result in check_versions(has_gpu=not is_cpu_device()):
        runner.report.add(package, result)
    parsed: list[Any] = []

    def configure() -> CheckResult:
        parsed[:] = run.configuration(flags, ranks)
        return run.layout(parsed[0])

    if not runner.check("configuration", configure):
        runner.report.add("everything else", CheckResult("depends on the configuration", SKIPPED))
        return
    args, config = parsed
    if size > 1:
        runner.check("ranks alike", lambda: run.same_settings(args, runner.launch))
    runner.check("routing", lambda: run.routing(args, config))
    facts = _facts(runner, dry_run)
    if facts is not None:
        alone = size < ranks
        runner.check("memory of a rank", lambda: run.memory(facts, options.device_memory, alone))
    runner.check("data and tokenizer", lambda: run.data(args, config))
    saved = runner.check("checkpoint folder", lambda: run.folder(args, runner.launch))
    if saved and args.save is not None and facts is not None:
        keep = options.keep_checkpoints
        runner.check("room for checkpoints", lambda: run.room(args, facts, keep))
    runner.check(
        "checkpoint to resume", lambda: run.resuming(args, config, runner.launch), _HASHING
    )
    if size > 1:
        _check_nodes(runner, options, args)
    else:
        message = "start it under torchrun to check ranks, clocks, speeds and collectives"
        runner.report.add("nodes and network", CheckResult(message, SKIPPED))


def _facts(runner: "Runner", dry_run: DryRun | None) -> dict[str, Any] | None:
    """Return the results of rank 0's dry run on every rank, None if it failed."""
    facts: list[Any] = [None]

    def share() -> CheckResult:
        problem = None
        try:
            facts[0] = dry_run and dry_run.facts(1.5 * runner.patience)
        except UserError as error:
            problem = str(error)
        if problem := runner.launch.first_problem("dry run", problem):
            raise UserError(problem)
        facts[0] = runner.launch.share("facts", facts[0])
        return CheckResult(f"{facts[0]['parameters']['total']:,} parameters")

    return facts[0] if runner.check("model", share) else None


def _check_nodes(runner: "Runner", options: PreflightFlags, args: Namespace) -> None:
    """Check clocks, speeds, and collectives over every group of the layout."""
    from megatron_ext.planning.preflight import group_checks as groups
    from megatron_ext.planning.preflight import rank_checks as ranks

    launch = runner.launch
    runner.check("clocks", lambda: ranks.clocks(launch, options.clock_tolerance))
    runner.check("speed of ranks", lambda: ranks.speeds(launch, options.slow_rank))
    if not runner.check("network", lambda: groups.meet(args, launch)):
        return
    size = round(options.megabytes * 1e6)
    for kind, group in groups.kinds():
        if not runner.check(kind, partial(groups.measure, launch, kind, group, size)):
            return  # ranks may still wait in a collective


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="python -m tools.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=int,
        metavar="N",
        help="Number of ranks of the run. Default: WORLD_SIZE, or 1.",
    )
    add(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="Memory of one device in GiB. Default: that of this machine's GPU.",
    )
    add(
        "--keep-checkpoints",
        type=int,
        default=2,
        metavar="K",
        help="Number of checkpoints that must fit on disk. Default: 2.",
    )
    add("--megabytes", type=float, default=16, help="Size of each collective in MB. Default: 16.")
    add(
        "--slow-rank",
        type=float,
        default=1.5,
        metavar="X",
        help="Report a rank whose work takes this many times the median. Default: 1.5.",
    )
    add(
        "--clock-tolerance",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="Largest difference between the clocks of nodes in seconds. Default: 1.",
    )
    add(
        "--stall-timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="Wait this many seconds for another rank. Default: 60.",
    )
    add(
        "--json",
        metavar="FILE",
        help="File for the table with all values, as JSON. Default: print only.",
    )
    return parser


def _on_ranks() -> None:
    sys.exit(main())


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        run_on_ranks(_on_ranks)
    else:
        run_tool(main)
