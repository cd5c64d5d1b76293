"""`pretrain_et.py` with faults, for tests of how a run reacts.

The environment variable FAULTS says what: `name:rank:step` for each attempt of torchrun, separated
by commas. A name is that of a function below; the fault befalls that rank in that training step.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from megatron_ext.devices import activate

activate()  # before anything of Megatron is imported

import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.training import checkpointing, get_args, training  # noqa: E402

import pretrain_et  # noqa: E402
from megatron_ext.errors import run_on_ranks  # noqa: E402
from megatron_ext.moe import step_cutoffs  # noqa: E402


def before(owner: Any, name: str, at: int, fault: Callable[..., None]) -> None:
    """Call `fault` before the first call of a function in step `at`."""
    function, done = getattr(owner, name), False

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if not done and get_args().curr_iteration + 1 == at:
            done = True
            fault(*args)
        return function(*args, **kwargs)

    setattr(owner, name, faulty)


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_forward(at: int) -> None:
    before(pretrain_et, "forward_step", at, kill)


def hung_in_forward(at: int) -> None:
    before(pretrain_et, "forward_step", at, lambda *_: time.sleep(600))


def killed_in_cutoff_collective(at: int) -> None:
    before(step_cutoffs, "kth_largest", at, kill)


def when_saving(at: int, arm: Callable[[], None]) -> None:
    """Call `arm` before iteration `at` is saved."""
    save = training.save_checkpoint

    def armed(iteration: int, *args: Any, **kwargs: Any) -> None:
        if iteration == at:
            arm()
        save(iteration, *args, **kwargs)

    training.save_checkpoint = armed


def killed_while_saving(at: int) -> None:
    rank = os.getpid()

    def torn(*_: Any) -> None:  # in the process that writes the file
        os.kill(rank, signal.SIGKILL)
        os._exit(1)

    when_saving(at, lambda: setattr(filesystem_async, "_write_item", torn))


def killed_before_tracker(at: int) -> None:
    """Kill the rank when the files are complete but not yet named as the newest."""
    when_saving(at, lambda: setattr(checkpointing, "get_checkpoint_tracker_filename", kill))


def nan_in_gradient(at: int) -> None:
    def poison(model: torch.nn.Module, *_: Any) -> None:
        gradient: Any = next(p for p in model.parameters() if p.requires_grad)
        gradient.main_grad.fill_(torch.nan)

    before(DistributedDataParallel, "finish_grad_sync", at, poison)


def slow(at: int) -> None:
    """Make every step long enough for a test to act."""
    train_step = training.train_step

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.5)
        return train_step(*args, **kwargs)

    training.train_step = slowed


if __name__ == "__main__":
    faults = os.environ.get("FAULTS", "").split(",")
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt < len(faults) and faults[attempt]:
        name, rank, at = faults[attempt].split(":")
        if os.environ["RANK"] == rank:
            globals()[name](int(at))
    run_on_ranks(pretrain_et.main)
